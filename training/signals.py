"""SIGTERM and SIGINT end a run after the step in hand, with a checkpoint; SIGUSR1 just saves."""

import contextlib
import copy
import ctypes
import enum
import multiprocessing
import multiprocessing.sharedctypes
import signal
import threading
from collections.abc import Generator, Iterator
from functools import partial
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

_STOPPING = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE_S = 5.0


class StopWaiting(BaseException):
    """Raised by a stopping signal out of a wait for data, which might be long."""


class Wish(enum.IntFlag):
    """What is wanted of the loop before its next step."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Signals:
    """What was asked for by signals since the last `take`."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._wants_save = False
        self._is_waiting = False

    def take(self) -> Wish:
        """The wishes so far, which are then forgotten; a stop is not."""
        wishes = Wish.SAVE if self._wants_save else Wish.NOTHING
        self._wants_save = False
        return wishes | (Wish.STOP if self.stopped_by else Wish.NOTHING)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which nothing is half done: a stop ends it at once, by StopWaiting."""
        self._is_waiting = True
        try:
            if self.stopped_by is not None:
                raise StopWaiting
            yield
        finally:
            self._is_waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number not in _STOPPING:
            self._wants_save = True
            return
        if self.stopped_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C a second time: at once
        self.stopped_by = signal.Signals(number)
        if self._is_waiting:
            raise StopWaiting


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Listen while the block runs; in a thread other than the main one, hear nothing."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (*_STOPPING, signal.SIGUSR1)
    before = {number: signal.signal(number, signals._on_signal) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin_worker(worker: int) -> None:
    """Leave a data worker to its parent: a scheduler and Ctrl-C signal the whole process group.

    So that it cannot outlive a killed parent, the kernel is told to kill it then.
    """
    for number in (*_STOPPING, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Flag:
    """What torch's loader uses of an Event. Workers look at theirs all the time, and one that is
    killed while it holds an Event's lock leaves its parent to wait for it for ever."""

    def __init__(self) -> None:
        self._is_set = multiprocessing.sharedctypes.RawValue(ctypes.c_bool)

    def is_set(self) -> bool:
        return bool(self._is_set.value)

    def set(self) -> None:
        self._is_set.value = True


def worker_context() -> BaseContext:
    """What a DataLoader makes its workers with, so that the death of one cannot block it."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign, assignment]
    return context


def without_interruption(loader: DataLoader[Any]) -> Generator[Any]:
    """The loader's batches; that a worker died is told where a batch is taken, and nowhere else.

    torch's handler raises in whatever the main thread does just then: a step half done, after which
    nothing could be saved. Without it a batch cut short by the death would be waited for for ever.
    Closed early, the workers are killed: one may be waiting for a server.
    """
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    tell = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(tell):
        yield from iterator
        return
    is_waiting = died = False

    def on_death(number: int, frame: FrameType | None) -> None:
        nonlocal died
        died = True
        if is_waiting:
            tell(number, frame)

    signal.signal(signal.SIGCHLD, on_death)
    try:
        while True:
            is_waiting = True
            if died:
                tell(signal.SIGCHLD, None)
            batch = next(iterator, None)
            is_waiting = died = False
            if batch is None:
                return
            yield batch
    finally:
        is_waiting = False
        for worker in workers:
            worker.kill()
        # torch forgets its workers; it would tell of their death otherwise. Its iterator would see
        # to that in the end, but an error's traceback can hold it until after this handler is gone.
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            if (pinning := getattr(iterator, "_pin_memory_thread", None)) is not None:
                # It may be in the middle of what a killed worker wrote in part, for ever.
                pinning.join = partial(pinning.join, _PATIENCE_S)
            iterator._shutdown_workers()
        signal.signal(signal.SIGCHLD, tell)
