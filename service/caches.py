"""Vectors of texts and pictures that were seen before, by what they are made of.

A key is a digest of the content together with the model and precision that make the vector, so no
two of them ever mix. Bounded by bytes, least recently used first. What several ask for at once is
computed once: the first computes it, the others are told. A failure is told to those who wait and
then forgotten. Start at `VectorCache.ask`.

Legend: E embedding.
"""

import copy
import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from service.scheduler import Abandoned

_ENTRY_BYTES = 400
"""of an entry beside its numbers: key, objects, a place in the order (measured, Python 3.11)"""


@dataclass(frozen=True)
class Entry:
    """What the model said of a content."""

    vector: np.ndarray
    """(E,)"""
    num_tokens: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class Key:
    """`maker` is the model's fingerprint with its precision."""

    maker: str
    digest: bytes


class Turn(Enum):
    """Whose it is to compute: who gets YOURS says `tell` in the end, who gets LATER is told."""

    YOURS = 1
    LATER = 2


Outcome = Entry | Exception | Literal[Turn.YOURS]
Waiter = Callable[[Outcome], bool]
"""is told the outcome, and says whether it still waits: only then is YOURS its own to compute"""


class VectorCache:
    """Used from many threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._waiters: dict[Key, deque[Waiter]] = {}
        """of every key that is being computed"""
        self._num_bytes = 0
        self._lock = threading.Lock()

    def ask(self, key: Key, waiter: Waiter) -> Entry | Turn:
        """The entry, or whose turn it is. `waiter` is called only after LATER, in any thread."""
        if not self._max_bytes:
            return Turn.YOURS
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
            if key in self._waiters:
                self._waiters[key].append(waiter)
                return Turn.LATER
            self._waiters[key] = deque()
            return Turn.YOURS

    def tell(self, key: Key, result: Entry | Exception) -> None:
        """What came of computing it. If that was abandoned, the next who waits computes it."""
        if not self._max_bytes:
            return
        if isinstance(result, Abandoned):
            self._hand_over(key)
            return
        with self._lock:
            waiters = self._waiters.pop(key)
            if isinstance(result, Entry):
                result = self._keep(key, result)
        for waiter in waiters:
            # A copy each: an error is completed with its place in each one's request.
            waiter(result if isinstance(result, Entry) else copy.copy(result))

    def _hand_over(self, key: Key) -> None:
        """To the first who still waits; where nobody does, who asks next computes it."""
        while True:
            with self._lock:
                if not self._waiters[key]:
                    del self._waiters[key]
                    return
                successor = self._waiters[key].popleft()
            if successor(Turn.YOURS):
                return

    def _keep(self, key: Key, entry: Entry) -> Entry:
        """A row of its own, which nobody can change and which keeps no batch in memory."""
        vector = entry.vector.copy()
        vector.setflags(write=False)
        entry = Entry(vector, entry.num_tokens, entry.truncated)
        self._entries[key] = entry
        self._num_bytes += _size(entry)
        while self._num_bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._num_bytes -= _size(oldest)
        return entry

    @property
    def num_bytes(self) -> int:
        """Memory in use, about."""
        return self._num_bytes

    def __contains__(self, key: Key) -> bool:
        with self._lock:
            return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class Caches:
    """Those of one service, shared by its models."""

    def __init__(self, text_bytes: int, image_bytes: int) -> None:
        self.texts = VectorCache(text_bytes)
        self.images = VectorCache(image_bytes)


def digest(content: str | bytes) -> bytes:
    """Of a text, or of an encoded picture."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()


def _size(entry: Entry) -> int:
    return entry.vector.nbytes + _ENTRY_BYTES
