"""How does a run that was ended go on? What its products were is on disk, in order.

Every algorithm here is a function of the products it asks for, of its options and its seed: handed
the same products it takes the same course, bit for bit. So a run goes on as the same call once
more, which is given from the file what was computed before, and computes from where that ends. No
algorithm has a state to be saved; some say what they will need no longer (`condense`).

Whatever else a course depends on, such as the memory that was free, is noted with `remember`.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import math
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from spectra.distributed.collectives import Ranks, agreed, leads
from spectra.distributed.recording import SharedRecords
from spectra.errors import CheckpointError, StorageError
from spectra.records import Record, RecordFile
from spectra.results import decode, encode, versions

__all__ = [
    "Journal",
    "Snapshots",
    "Stopped",
    "check_numbers",
    "clock",
    "condensed",
    "current",
    "differences",
    "ended",
    "remember",
    "seal",
    "stopped",
    "unless_stopped",
]

T = TypeVar("T")

_current: contextvars.ContextVar[Journal | None] = contextvars.ContextVar("journal", default=None)

# Rounds of a loop between two snapshots: so many products are the most on record.
_ROUNDS = 16
# What a product computed again may differ by, as a power of eps: other processors and numbers of
# threads round differently, and a network's second derivatives enlarge that.
_ROUNDING = 0.6
_WITNESS = "witness"


class Stopped(BaseException):
    """The run was asked to stop, and what it has is on disk. Never leaves the library.

    Attributes
    ----------
    partial
        What had been found, or None.
    """

    partial: Any = None


class Journal:
    """The record of one run, and what of it has not been handed out again.

    Parameters
    ----------
    path
        Of the file. One that exists is gone on from.
    question
        The function that is called.
    identity
        What must be the same for the run to go on, as text by name: nested dictionaries.
    owner
        The operator whose products are recorded. Where several ranks compute them, rank 0 has the
        file, and all of them make all calls.

    Raises
    ------
    StorageError
        The file cannot be read or written, or is damaged.
    CheckpointError
        It is that of another run.
    """

    def __init__(self, path: Path, question: str, identity: dict[str, Any], owner: Any) -> None:
        self.owner = owner
        self.path = path
        self.notes: list[str] = []
        self.signal: str | None = None
        """What asked the run to stop."""
        self._ranks: Ranks | None = owner.space.ranks
        self.resumed, header = agreed(
            self._ranks, "a checkpoint", lambda: (path.exists(), _header(question, identity))
        )

        def opened() -> RecordFile:
            return RecordFile(path) if self.resumed else RecordFile.create(path, header)

        self._file: RecordFile | SharedRecords = (
            opened() if self._ranks is None else SharedRecords(self._ranks, opened)
        )
        self._next = 0
        self._advance()
        self._compared = not self.resumed
        self._muted = 0
        self._sealed = False
        try:
            if self.resumed:
                _check_identity(path, self._records[0].meta, header)
                _check_complete(path, self._records)
                if self._witness is not None:
                    # A run that is finished reads it no more.
                    list(self._file.read(self._witness))
        except BaseException:
            self._file.close()
            raise
        if self._file.torn:
            self.notes.append(
                "the last record of the checkpoint was cut off or spoiled, and computed again"
            )
        # Not the time of day, which may jump.
        self._before = self._seconds_at(len(self._records) - 1)
        self._start = time.monotonic()

    @property
    def _records(self) -> list[Record]:
        return self._file.records

    @property
    def replaying(self) -> bool:
        """There is more in the file."""
        return not (self._muted or self._sealed) and self._next < len(self._records)

    @property
    def position(self) -> int:
        """The place of the next record."""
        return self._next

    @property
    def sealed(self) -> bool:
        """Nothing is recorded any more."""
        return self._sealed

    def seal(self) -> None:
        """What follows is no part of the run, which goes on from here another time."""
        self._sealed = True

    def clock(self) -> float:
        """Seconds that the run has taken, all of its parts together."""
        if self._next < len(self._records):
            return self._seconds_at(self._next - 1)
        return self._before + time.monotonic() - self._start

    def product(self, rows: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Products with the rows of a (k, n) tensor: those on record, or computed and recorded."""
        if not self.replaying:
            if self._stops():
                self.seal()
                raise Stopped
            self._compare_witness(compute)
            products = compute(rows)
            if self._witness is None:
                pair = [self._to_record(vectors[0]) for vectors in (rows, products)]
                self._append({"kind": _WITNESS}, pair)
            if not self._muted:
                host = self._to_record(products)
                self._append({"kind": "product", "input": self._numbers(rows)}, [host])
            return products
        record = self._take("product")
        self.owner.matvecs += len(rows)
        _check_input(
            self.path, record.meta.get("input"), self._numbers(rows), self.owner.space.n, rows.dtype
        )
        known = self._own(*self._file.read(record))
        if known.shape != rows.shape or known.dtype != rows.dtype:
            raise self._other_course(f"vectors of {tuple(rows.shape)}, {rows.dtype}")
        return known.to(rows.device)

    def remember(self, name: str, make: Callable[[], T]) -> T:
        """The value of `make`, whose products are not recorded one by one.

        It may be anything that a result may hold.
        """
        if self._muted or self._sealed:
            return make()
        if self.replaying:
            return self._value_of(self._take(name))
        matvecs = self.owner.matvecs
        with self._muting():
            value = make()
        self._append(*self._packed(name, value, self.owner.matvecs - matvecs))
        return value

    def stop_if_asked(self) -> None:
        """Let a run that was asked to stop end here, as it does before a product."""
        if not (self.replaying or self._muted) and self._stops():
            self.seal()
            raise Stopped

    def recall(self, name: str, into: Tensor | None = None) -> Any:
        """The value on record if the next record is one of that name, else None.

        Rows that were recorded with it, and not forgotten since, are copied into the first ones of
        a basis.
        """
        if not self.replaying or self._records[self._next].meta["kind"] != name:
            return None
        return self._value_of(self._take(name), into)

    def condense(
        self, begin: int, name: str, value: Any, *, matvecs: int, rows: Tensor | None = None
    ) -> None:
        """Put one value in the place of all records from the position `begin` on.

        Parameters
        ----------
        rows
            Of a basis, to be recorded with the value; those of earlier values of that name are
            needed no longer. The value then holds no arrays itself.
        matvecs
            How many products the replaced records stand for.
        """
        if self._muted or self._sealed:
            return
        meta, arrays = self._packed(name, value, matvecs)
        if rows is not None:
            assert not arrays
            meta["rows"] = len(rows)
            arrays = [self._to_record(row) for row in rows]
        kept = [
            (record, rows is None or record.meta["kind"] != name)
            for i, record in enumerate(self._records)
            if i < begin or record is self._witness
        ]
        with self._guarded():
            self._file.rewrite(kept, meta, arrays)
            self._next = len(self._records)

    def finish(self) -> None:
        """The run is at its end: going on from here computes nothing."""
        if not self.replaying and self._records[-1].meta["kind"] != "finished":
            self._append({"kind": "finished"}, [])

    @property
    def empty(self) -> bool:
        """No product is on record that the run would have to compute again."""
        return not any(
            record.meta["kind"] == "product" or record.meta.get("matvecs")
            for record in self._records
        )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def remove(self) -> None:
        """Let go of the file, and delete it."""
        self._file.remove()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it the owner's products are recorded, and SIGINT and SIGTERM stop it softly."""
        token = _current.set(self)
        try:
            with _signals_to(self._asked_to_stop):
                yield
        finally:
            _current.reset(token)

    def _stops(self) -> bool:
        """Whether the run was asked to stop: on any rank, as all stop at one place."""
        if self._ranks is not None and not self._sealed:
            number = signal.Signals[self.signal] if self.signal else 0
            if latest := int(max(row[0] for row in self._ranks.gathered([float(number)]))):
                self.signal = signal.Signals(latest).name
        return bool(self.signal)

    def _to_record(self, vectors: Tensor) -> Tensor:
        """Whole vectors in memory, where this rank writes them."""
        if self.owner.space.spread:
            vectors = self.owner.space.collected(vectors.detach())
        return vectors.detach().cpu().contiguous() if self._file.writes else vectors

    def _own(self, whole: Tensor) -> Tensor:
        """What is here of vectors on record, where the others are."""
        space = self.owner.space
        return space.own(whole).to(space.device)

    def _numbers(self, rows: Tensor) -> list[float]:
        """Norm and sum of vectors, which tell others apart."""
        space = self.owner.space
        if not space.spread:
            return check_numbers(rows)
        part = space.counted(rows).double()
        square, total = space.summed(torch.stack([part.square().sum(), part.sum()])).tolist()
        return [math.sqrt(square), total]

    def _asked_to_stop(self, name: str) -> None:
        self.signal = name
        if not leads(self._ranks):
            return
        print(
            f"spectra: {name}: stopping after the product under way; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )

    @contextlib.contextmanager
    def _muting(self) -> Iterator[None]:
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def _append(self, meta: dict[str, Any], arrays: Sequence[Tensor]) -> None:
        if self._sealed:
            return
        with self._guarded():
            self._file.append({**meta, "seconds": self.clock()}, arrays)
            self._next = len(self._records)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """A disk that is full ends the recording, not the run."""
        try:
            yield
        except OSError as error:
            self.seal()
            self.notes.append(
                f"the checkpoint {str(self.path)!r} could not be written any more "
                f"({error.strerror or error}); what it holds is whole, and ends there"
            )

    def _take(self, kind: str) -> Record:
        record = self._records[self._next]
        if record.meta["kind"] != kind:
            raise self._other_course(f"{kind!r}, where the file has {record.meta['kind']!r}")
        self._advance()
        return record

    def _advance(self) -> None:
        """Go to the next record that is a part of the course."""
        self._next += 1
        while self._next < len(self._records) and self._records[self._next] is self._witness:
            self._next += 1

    @property
    def _witness(self) -> Record | None:
        """The first product, whatever became of the others."""
        found = (record for record in self._records if record.meta["kind"] == _WITNESS)
        return next(found, None)

    def _packed(self, name: str, value: Any, matvecs: int) -> tuple[dict[str, Any], list[Tensor]]:
        arrays: dict[str, Tensor] = {}
        text = encode(value, "value", arrays)
        if (space := self.owner.space).spread:
            arrays = {
                name: self._to_record(t) if _is_vector(t, space.length) else t
                for name, t in arrays.items()
            }
        meta = {
            "kind": name,
            "value": text,
            "names": list(arrays),
            "matvecs": matvecs,
            "seconds": self.clock(),
        }
        return meta, list(arrays.values())

    def _value_of(self, record: Record, into: Tensor | None = None) -> Any:
        meta, arrays = record.meta, self._file.read(record)
        self.owner.matvecs += meta["matvecs"]
        if meta.get("rows"):
            assert into is not None
            # In one go, or the checksum would not be looked at.
            for i, row in enumerate(arrays):
                into[i] = self._own(row)
            arrays = iter(())
        try:
            known = dict(zip(meta["names"], arrays, strict=True))
            if self.owner.space.spread:
                n = self.owner.space.n
                known = {k: self._own(t) if _is_vector(t, n) else t for k, t in known.items()}
            return decode(meta["value"], known)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"the checkpoint {str(self.path)!r} holds a record that cannot be read: {error}"
            raise StorageError(msg) from error

    def _seconds_at(self, index: int) -> float:
        return float(self._records[index].meta["seconds"])

    def _compare_witness(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Whether the operator still gives the first product that was recorded: one product.

        What identifies an operator cannot hold everything, such as a variable that a loss reads.
        """
        if self._compared or self._witness is None:
            return
        self._compared = True
        space = self.owner.space
        row, recorded = map(self._own, self._file.read(self._witness))
        rows, recorded = row[None], recorded.double()

        def product() -> Tensor:
            self.owner.matvecs -= 1
            return compute(rows)[0].double()

        again = product()
        size = space.norm(recorded) or 1.0
        defect = space.norm(again - recorded) / size
        if defect == 0.0:
            return
        limit = torch.finfo(rows.dtype).eps ** _ROUNDING
        if not defect <= limit:
            # Products that are random differ from themselves as well.
            limit = 10 * space.norm(again - product()) / size
        if not defect <= limit:
            msg = (
                f"the first product in the checkpoint {str(self.path)!r} differs from the same one "
                f"computed now by {defect:.2g}, relative: weights, data or loss have changed. Put "
                "them back, or delete the file, or name another path, to begin anew"
            )
            raise CheckpointError(msg)
        self.notes.append(
            f"resumed where products are rounded differently (by {defect:.1g}, relative): another "
            "machine or number of threads, products that are not deterministic, or a change that "
            "no digest sees and that is no larger"
        )

    def _other_course(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the run asks for {what}: it takes another course than the one recorded in "
            f"{str(self.path)!r}, as with another version of spectra or of its packages. Delete "
            "the file, or name another path, to begin anew"
        )


def current(owner: Any = None) -> Journal | None:
    """The journal of the run that is under way, if it is that of `owner`, or any."""
    journal = _current.get()
    return journal if journal is not None and owner in {None, journal.owner} else None


def remember(name: str, make: Callable[[], T]) -> T:
    """The value of `make`, or what it was when the run was recorded."""
    journal = _current.get()
    return make() if journal is None else journal.remember(name, make)


def condensed(name: str, make: Callable[[], T]) -> T:
    """The same for something long: recorded product by product until it is known as a whole."""
    journal = _current.get()
    if journal is None:
        return make()
    if (known := journal.recall(name)) is not None:
        return cast(T, known)
    begin, matvecs = journal.position, journal.owner.matvecs
    value = make()
    journal.condense(begin, name, value, matvecs=journal.owner.matvecs - matvecs)
    return value


def seal() -> None:
    """What follows is no part of the run that is under way: it ends with an exception."""
    journal = _current.get()
    if journal is not None:
        journal.seal()


class Snapshots:
    """The state of a loop that holds few vectors however long it is.

    Put on record now and then, it takes the place of the loop's products in the journal.

    Parameters
    ----------
    name
        Of the loop.
    state
        What the loop goes on from: anything that a result may hold.
    restore
        Put a recorded state in the place of the present one. Called at once if there is one.
    """

    def __init__(self, name: str, state: Callable[[], Any], restore: Callable[[Any], None]) -> None:
        self._journal = _current.get()
        self._name, self._state = name, state
        self._rounds = 0
        if self._journal is None:
            return
        self._begin, self._matvecs = self._journal.position, self._journal.owner.matvecs
        if (known := self._journal.recall(name)) is not None:
            restore(known)

    def round(self) -> None:
        """The loop is through once more."""
        journal = self._journal
        self._rounds += 1
        if journal is None or journal.replaying or self._rounds % _ROUNDS:
            return
        spent = journal.owner.matvecs - self._matvecs
        journal.condense(self._begin, self._name, self._state(), matvecs=spent)


def ended() -> bool:
    """The run that is under way is at its end, though not at that of its question."""
    journal = _current.get()
    return journal is not None and journal.sealed


def stopped() -> bool:
    """The run that is under way was asked to stop, and what follows is no part of it."""
    journal = _current.get()
    return journal is not None and journal.sealed and journal.signal is not None


def stop_if_asked() -> None:
    """Between pieces of work that are no products: where a run may end softly.

    Raises
    ------
    Stopped
        The run that is under way was asked to.
    """
    journal = _current.get()
    if journal is not None:
        journal.stop_if_asked()


def unless_stopped(make: Callable[[], T]) -> T | None:
    """The value of `make`, or None if the run was asked to stop before there was one."""
    try:
        return make()
    except Stopped:
        return None


def clock() -> float:
    """Seconds, of which differences count: those of the run that is recorded, or of the process."""
    journal = _current.get()
    return time.perf_counter() if journal is None else journal.clock()


@contextlib.contextmanager
def _signals_to(note: Callable[[str], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM is noted, the next one does what it always did."""
    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread alone.
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: types.FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        note(signal.Signals(number).name)
        # A program's own handler runs, too; Python's would end the run at once.
        own = before[signal.Signals(number)]
        if callable(own) and own is not signal.default_int_handler:
            own(number, frame)

    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(each)
            # None: somebody installed it from outside of Python, and it could not be put back.
            if handler is not None:
                before[each] = handler
                signal.signal(each, handle)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def check_numbers(rows: Tensor) -> list[float]:
    """Norm and sum, which tell another vector apart."""
    flat = rows.reshape(-1)
    total = square = 0.0
    for start in range(0, len(flat), 1 << 22):
        part = flat[start : start + (1 << 22)].double()
        total += float(part.sum())
        square += float(torch.dot(part, part))
    return [math.sqrt(square), total]


def _is_vector(tensor: Tensor, length: int) -> bool:
    """Of the tensors in a value that is noted the others are states of generators."""
    return tensor.is_floating_point() and tensor.dim() > 0 and tensor.shape[-1] == length


def _check_input(path: Path, known: Any, found: list[float], n: int, dtype: torch.dtype) -> None:
    # The sum of numbers that cancel is as uncertain as their length is large.
    room = torch.finfo(dtype).eps ** 0.5 * (found[0] or 1.0) * math.sqrt(n)
    if not np.allclose(found, known, rtol=0, atol=room):
        msg = (
            f"the run multiplies another vector than the one recorded in {str(path)!r}: it takes "
            "another course, as with another version of spectra or of its packages. Delete the "
            "file, or name another path, to begin anew"
        )
        raise CheckpointError(msg)


def _check_complete(path: Path, records: Sequence[Record]) -> None:
    """Refuse a file that was cut off so early that vectors which later records held are gone."""
    for kind in {record.meta["kind"] for record in records}:
        last = [record.meta for record in records if record.meta["kind"] == kind][-1]
        if last.get("stripped"):
            msg = (
                f"the checkpoint {str(path)!r} is damaged: its end is missing, with vectors that "
                "the run needs to go on. Delete it, or name another path, to begin anew"
            )
            raise StorageError(msg)


def _header(question: str, identity: dict[str, Any]) -> dict[str, Any]:
    """The first record."""
    return {
        "kind": "header",
        "question": question,
        # As it will be read.
        "identity": json.loads(json.dumps(identity)),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
    }


def _check_identity(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse the checkpoint of another run, and say what is different."""
    if old.get("kind") != "header" or old.get("question") != new["question"]:
        msg = (
            f"the checkpoint {str(path)!r} is one of {old.get('question')}, not of "
            f"{new['question']}; name another path"
        )
        raise CheckpointError(msg)
    found = list(differences(old["identity"], new["identity"]))
    for name in ("spectra", "torch", "numpy", "scipy"):
        before, now = old["versions"].get(name), new["versions"][name]
        if before != now:
            found.append(f"the version of {name} ({before} before, {now} now)")
    if found:
        shown = "; ".join(found[:5])
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        msg = (
            f"the checkpoint {str(path)!r} is of another run. What differs: {shown}{more}. Put it "
            "back as it was, or delete the file, or name another path, to begin anew"
        )
        raise CheckpointError(msg)


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where two identities are not the same, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            place = f"{where} {key}".strip()
            if key == "data" and _of_ranks(old.get(key), new.get(key)):
                yield from _other_batches(old[key], new[key], place)
            elif key not in old:
                yield f"{place} (new)"
            elif key not in new:
                yield f"{place} (gone)"
            else:
                yield from differences(old[key], new[key], place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
        yield f"{where} ({len(old)} before, {len(new)} now)"
    elif isinstance(old, list) and isinstance(new, list):
        for i, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, now, f"{where} {i}")
    elif old != new:
        short = all(len(str(value)) <= 40 for value in (old, new))
        digests = "digest" in where or where.split(" ", maxsplit=1)[0] in {"weights", "data"}
        yield f"{where} ({old} before, {new} now)" if short and not digests else where


def _of_ranks(old: Any, new: Any) -> bool:
    """Digests of batches, of which some were spread over ranks: perhaps over others."""
    both = (isinstance(data, dict) for data in (old, new))
    return all(both) and any(place.startswith("rank ") for place in {**old, **new})


def _other_batches(old: dict[str, str], new: dict[str, str], where: str) -> Iterator[str]:
    """Whether they are others altogether: in which place each is does not matter."""
    before, now = Counter(old.values()), Counter(new.values())
    if before != now:
        alike = (before & now).total()
        yield f"{where} ({len(old)} batches before, {len(new)} now, {alike} of them the same)"
