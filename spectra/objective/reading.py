"""Is the next batch read while the present one is worked on?

Where reading is slow, and uses no global random generator: the first passes over the data show it.
Those generators are shared by threads, so that a loader which draws from one for every batch
(augmentation), or seeds one and puts it back, is read in its turn, and draws what it did.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import overrides
from torch.utils import _device, _python_dispatch

from spectra.objective.batches import Moved, batches_of
from spectra.objective.keeping import (
    global_random_states,
    random_states,
    set_random_states,
)

__all__ = ["Reader", "is_slow"]

_END = object()
# Reading that takes less, of a pass or for each batch, is not worth a thread.
_SHARE, _SECONDS = 0.02, 1e-3
# Methods of random generators that only look at them.
_LOOKS = {"getstate", "get_state", "initial_seed"}


def is_slow(reading: float, whole: float, count: int) -> bool:
    """Whether seconds of reading so many batches matter in a pass of `whole` seconds."""
    return reading > _SHARE * whole and reading > _SECONDS * count


class Reader:
    """Reads data, pass after pass.

    Attributes
    ----------
    ahead
        Whether the next batch is read in a thread of its own; None while that is not decided, after
        one pass where reading was quick, or two.
    moved
        Copies on another device, of data that stay at hand; None for others, whose tensors are new
        ones in every pass.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        at_hand = isinstance(data, list | tuple)
        # Processes of a loader's own are ahead already.
        with_workers = bool(getattr(data, "num_workers", 0))
        self.moved = Moved() if at_hand else None
        self.ahead: bool | None = False if at_hand or with_workers else None
        self._slow = False

    def batches(self) -> Iterator[Any]:
        """The batches of one pass, in order.

        Raises
        ------
        DataError
            Reading one of them raised something; its number is named.
        """
        if self.ahead is None:
            return self._observed() if self._slow else self._timed()
        return self._read_ahead() if self.ahead and _can_follow() else batches_of(self._data)

    def _timed(self) -> Iterator[Any]:
        begun, reading, count, drawn = time.perf_counter(), 0.0, 0, False
        batches = batches_of(self._data)
        while True:
            states, start = global_random_states(), time.perf_counter()
            batch = next(batches, _END)
            reading += time.perf_counter() - start
            # Samplers draw the order of all batches with the first one, which is read in its turn.
            drawn = drawn or (count > 0 and global_random_states() != states)
            if batch is _END:
                break
            count += 1
            yield batch
        whole = time.perf_counter() - begun
        self._slow = not drawn and is_slow(reading, whole, count)
        if not self._slow:
            self.ahead = False

    def _observed(self) -> Iterator[Any]:
        """A pass of its own, as observing takes time, which would count as that of reading."""
        if sys.getprofile() is not None:
            # Another profiler is at work; a later pass decides.
            yield from batches_of(self._data)
            return
        batches, calls = batches_of(self._data), []
        batch = next(batches, _END)
        while batch is not _END:
            yield batch
            with _global_generators_observed() as found:
                batch = next(batches, _END)
            calls += found
        self.ahead = not calls

    def _read_ahead(self) -> Iterator[Any]:
        begun, read = random_states(self._data), 0
        batches = batches_of(self._data)
        batch = next(batches, _END)
        # At its end, an early one too, it waits for the batch that is being read.
        with ThreadPoolExecutor(1, "spectra-reading") as pool:
            while batch is not _END:
                # A context of one's own can be entered by one thread at a time.
                context, settings = contextvars.copy_context(), _settings()
                coming = pool.submit(context.run, _next, batches, settings)
                read += 1
                yield batch
                try:
                    batch = coming.result()
                except Exception:
                    # What cannot be used from two threads, a connection to a database perhaps, is
                    # read in this one; and what is wrong otherwise is told by the same error again.
                    self.ahead = False
                    break
            else:
                return
        batches = self._read_again(read, begun)
        yield from batches

    def _read_again(self, read: int, begun: Any) -> Iterator[Any]:
        """The batches after the first ones, of a pass that began at some random states."""
        now = random_states(self._data)
        set_random_states(begun)
        batches = batches_of(self._data)
        for _ in range(read):
            next(batches, None)
        set_random_states(now)
        return batches


def _next(
    batches: Iterator[Any], settings: Callable[[], contextlib.AbstractContextManager[None]]
) -> Any:
    """The next batch, made under the settings of the thread that asks for it."""
    with settings():
        return next(batches, _END)


def _can_follow() -> bool:
    """Whether a thread can have all settings of this one that may change a batch.

    Autocast keeps a cache that threads share, and modes are objects of the caller's.
    """
    modes = [
        mode
        for mode in overrides._get_current_function_mode_stack()
        if not isinstance(mode, _device.DeviceContext)
    ]
    modes += _python_dispatch._get_current_dispatch_mode_stack()
    return not modes and not torch._C._is_any_autocast_enabled()


def _settings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The settings of PyTorch that are those of this thread alone, to be entered in another."""
    device, gradients = torch.get_default_device(), torch.is_grad_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            if device.type != "cpu":
                stack.enter_context(device)
            yield

    return entered


@contextlib.contextmanager
def _global_generators_observed() -> Iterator[list[str]]:
    """Calls that seed a global generator or set its state, which comparing states may not show.

    Data sets seed one for a sample and put it back.
    """
    generators = (torch.default_generator, *torch.cuda.default_generators, random._inst)
    observed = {id(generator) for generator in generators}
    calls: list[str] = []

    def profile(_: Any, event: str, called: Any) -> None:
        if event != "c_call" or id(getattr(called, "__self__", None)) not in observed:
            return
        if called.__name__ not in _LOOKS:
            calls.append(called.__name__)

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    # Profilers are not told of NumPy's functions.
    seed, set_state = np.random.seed, np.random.set_state
    np.random.seed, np.random.set_state = noted(seed), noted(set_state)
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        np.random.seed, np.random.set_state = seed, set_state
