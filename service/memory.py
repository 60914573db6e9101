"""Memory that threads share, so that a few large pictures at once are not too much."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

_WHOLE = 64 * 2**20
_LITTLE = 64  # of all there is, a part of less than one in so many


def give_back_pictures() -> None:
    """Have Pillow take a large picture's memory in one piece. Of smaller pieces than 32 MB malloc
    keeps what it is given back, 350 MB after a few pictures."""
    Image.core.set_block_size(_WHOLE)  # type: ignore[attr-defined]


class Budget:
    """So many bytes at once, by turns; who needs more than there is has them alone.

    Little is had at once, whoever waits.
    """

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._held: dict[threading.Thread, int] = {}
        self._waiting: set[threading.Thread] = set()
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        if size < self._size // _LITTLE:
            yield
            return
        thread, size = threading.current_thread(), min(size, self._size)
        self._waiting.add(thread)
        with self._turn, self._changed:  # who is behind waits for the turn
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
            self._held[thread] = size
            self._waiting.discard(thread)
        try:
            yield
        finally:
            self.take_back(thread)

    def is_waiting(self, thread: threading.Thread) -> bool:
        return thread in self._waiting

    def take_back(self, thread: threading.Thread) -> None:
        """What the thread holds, if anything: it is done, or hangs and is waited for no more."""
        with self._changed:
            self._left += self._held.pop(thread, 0)
            self._changed.notify()
