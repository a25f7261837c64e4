"""How much memory is free on a device, held by this process, and saved by a forward pass?"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "NEGLIGIBLE",
    "Peak",
    "SavedBytes",
    "allocated_bytes",
    "free_bytes",
    "held_bytes",
    "in_words",
    "memory_ran_out",
    "peak_bytes",
    "return_freed_memory",
]

# Bytes that are there wherever Python is. To look at what is free takes as long as the product of a
# small network, and is left out where no more than this is asked for.
NEGLIGIBLE = 1 << 25

_CGROUP = Path("/sys/fs/cgroup")
# The fields of glibc's `struct mallinfo2`.
_MALLOC_INFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated, as far as the system tells."""
    if device.type == "cuda":
        # What PyTorch's allocator holds without using it is free for tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    # Systems without these files: assume room, and let an allocation say otherwise.
    free = 1 << 62
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    # In a container the machine's memory is not what the process may use.
    for group in _groups():
        limit = _number(group, "memory.max", "memory.limit_in_bytes")
        used = _number(group, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free = min(free, max(0, limit - used + _cached_files(group)))
    return free


def _groups() -> list[Path]:
    """The control groups of this process, of either version, as far as they can be seen."""
    found = [_CGROUP, _CGROUP / "memory"]
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, place = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = _CGROUP / "memory" if controllers else _CGROUP
            found.append(root / place.strip("/"))
    return list(dict.fromkeys(found))


def _number(group: Path, *names: str) -> int | None:
    """The first of some files that holds a number."""
    for name in names:
        lines = _lines(group / name)
        if lines and lines[0].isdecimal():
            return int(lines[0])
    return None


def _cached_files(group: Path) -> int:
    """What of a group's memory holds pages of files, which give way to anything else."""
    counts = dict(line.split() for line in _lines(group / "memory.stat"))
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))


def held_bytes(device: torch.device, *, exactly: bool = True) -> int:
    """Bytes that this process holds now: PyTorch's on a GPU, resident ones on the CPU.

    Not `exactly` counts what was freed and not returned to the system, too. To return it takes as
    long as the product of a small network, and the next use of it is slower.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if exactly:
        return_freed_memory(device)
    pages = _text("/proc/self/statm").split()
    if pages:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
    # Systems without that file tell the peak, which grows with whatever does not fit in it.
    return peak_bytes(device)


def allocated_bytes(device: torch.device) -> int:
    """Bytes in use, whether freshly got from the system or not; only differences mean anything."""
    if device.type == "cpu" and _counts_allocations():
        info = _c_library().mallinfo2()
        return int(info.uordblks + info.hblkhd)
    return held_bytes(device)


class _MallocInfo(ctypes.Structure):
    """What glibc knows of its heap: bytes in use, in arenas and in mappings of their own."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLOC_INFO]


@functools.cache
def _counts_allocations() -> bool:
    """Whether the C library is one that counts, and the one that PyTorch allocates with."""
    try:
        function = _c_library().mallinfo2
    except (AttributeError, OSError):
        return False
    function.restype = _MallocInfo
    size = 1 << 20
    before = function()
    tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
    after = function()
    grown = after.uordblks + after.hblkhd - before.uordblks - before.hblkhd
    return bool(tensor.numel() <= grown <= 2 * size)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process has ever held, counted as `held_bytes` does."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not from getrusage, which hands a process the peak of the one that started it.
    found = re.search(r"VmHWM:\s*(\d+)", _text("/proc/self/status"))
    if found is not None:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        # Nothing to ask without another package: no growth is seen, and a budget never binds.
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Peak:
    """The most bytes held within a context, above what was held before.

    Attributes
    ----------
    bytes
        After the context; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0
        self._counts = False
        self.bytes: int | None = None

    def __enter__(self) -> Peak:
        self._held = held_bytes(self._device)
        self._counts = _forget_peak(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        # A peak that may lie before the context tells nothing of it.
        if self._counts:
            self.bytes = peak_bytes(self._device) - self._held


def _forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from now on; whether the system allows that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class SavedBytes:
    """How much the operations of a forward pass save for its backward pass.

    The graph of that pass is good for values only: it may be differentiated, but not twice.

    Parameters
    ----------
    apart_from
        Tensors that are in memory anyway: parameters, inputs.
    """

    def __init__(self, apart_from: Iterable[Tensor]) -> None:
        self._known = {_address(tensor) for tensor in apart_from}
        self._sizes: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes that were saved, those that operations share counted once."""
        return sum(self._sizes.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within it what is saved is counted, apart from what other such contexts count inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and _address(tensor) not in self._known:
            self._sizes[_address(tensor)] = tensor.untyped_storage().nbytes()
        # The tensor itself would keep the operation that saves it, and with it the graph, alive.
        return tensor.detach()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def memory_ran_out(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left."""
    # PyTorch's allocator on the CPU raises what everything else raises, too.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def in_words(size: float) -> str:
    """A number of bytes for people."""
    if size >= 2**40:
        return f"{size / 2**40:.3g} TiB"
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


def return_freed_memory(device: torch.device) -> None:
    """Let the system have what was freed on the CPU: the C library keeps it, and it counts as held.

    What is freed in pieces and kept is not fit for the next use, so the process grows.
    """
    if device.type == "cuda":
        return
    # Other C libraries than glibc have no such function.
    with contextlib.suppress(AttributeError, OSError):
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    # Once: every such object is a cycle of references.
    return ctypes.CDLL(None)


def _lines(path: Path) -> list[str]:
    return _text(str(path)).splitlines()


def _text(path: str) -> str:
    """What a file of the system says, nothing if there is none."""
    try:
        # Such files are asked before and after the first use of every batch.
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
