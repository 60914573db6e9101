"""Threads that work for requests, and that can be asked whether they get on.

What hangs in them, on a volume that does not answer say, is not replaced as a hung decoder is
(`pool.py`): a write that comes to an end later must not meet a closed collection. The service is
not ready then. Start at `Threads.begin_next`.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """A pool that tells when it begins something."""

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size, name)
        self._lock = threading.Lock()
        self._wakers: set[Callable[[], object]] = set()
        self._has_canary = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return super().submit(self._run, partial(fn, *args, **kwargs))

    async def begin_next(self) -> None:
        """Wait until a thread begins anything that waits, or would if there were anything: so a
        pool that has much to do is told from one that hangs."""
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(begun.set)

        with self._lock:
            self._wakers.add(wake)
            has_canary, self._has_canary = self._has_canary, True
        try:
            if not has_canary:  # one is enough, however often it is asked of threads that hang
                super().submit(self._wake, by_canary=True)
            await begun.wait()
        finally:
            with self._lock:
                self._wakers.discard(wake)

    def _run(self, function: Callable[[], T]) -> T:
        self._wake()
        return function()

    def _wake(self, *, by_canary: bool = False) -> None:
        with self._lock:  # or who asks just now might wait for a canary that was here already
            if by_canary:
                self._has_canary = False
            for wake in self._wakers:
                wake()
            self._wakers.clear()
