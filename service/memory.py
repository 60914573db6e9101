"""Memory that threads share, so that a few large pictures at once are not too much."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

_WHOLE = 64 * 2**20


def give_back_pictures() -> None:
    """Have Pillow take a large picture's memory in one piece. Of smaller pieces than 32 MB malloc
    keeps what it is given back, 350 MB after a few pictures."""
    Image.core.set_block_size(_WHOLE)  # type: ignore[attr-defined]


class Budget:
    """So many bytes at once, by turns; who needs more than there is has them alone."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self._size)
        with self._turn, self._changed:  # who is behind waits for the turn, however little it needs
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify()
