"""Open files for random reads: few at a time, safe to share between threads and over forks.

No lock anywhere: one held by a thread at the moment of a fork would stay locked in the child.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_MAX_GAP_BYTES = 2**14

_V = TypeVar("_V")


class Recent(Generic[_V]):
    """The few values made last; one that is pushed out lives on while somebody uses it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[int, _V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: int, make: Callable[[], _V]) -> _V:
        value = self._values.get(key)
        if value is None:
            value = make()
            with contextlib.suppress(KeyError):  # another thread was first to empty it
                while len(self._values) >= self._limit:
                    self._values.popitem(last=False)
            self._values[key] = value
        return value

    def drop(self, key: int) -> None:
        self._values.pop(key, None)

    def drop_all(self, is_stale: Callable[[_V], bool]) -> None:
        for key in list(self._values):  # a copy, as other threads may add and drop meanwhile
            value = self._values.get(key)
            if value is not None and is_stale(value):
                self.drop(key)


class OpenFile:
    """A descriptor that is closed when nobody uses it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def is_removed(self) -> bool:
        """Whether it has no name any more: its space is free once nobody has it open."""
        return os.fstat(self.descriptor).st_nlink == 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)  # kept: at the interpreter's exit `os` may be gone already


def read_spans(descriptor: int, spans: Sequence[tuple[int, int]]) -> Sequence[bytes]:
    filled = [(offset, size) for offset, size in spans if size] or [(0, 0)]
    start = min(offset for offset, _ in filled)
    end = max(offset + size for offset, size in filled)
    if end - start > sum(size for _, size in filled) + _MAX_GAP_BYTES:
        return [os.pread(descriptor, size, offset) if size else b"" for offset, size in spans]
    data = os.pread(descriptor, end - start, start)
    return [data[offset - start : offset - start + size] if size else b"" for offset, size in spans]
