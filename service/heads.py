"""Class heads that are kept: building one costs a text encoding per label and template.

Requests that want the same head at the same time share one build, which stops when the last of
them is gone. Kept heads are dropped least recently used first, by their bytes.
"""

import asyncio
import hashlib
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import orjson

from clipserve.prompts import ClassHead


@dataclass(frozen=True)
class Head:
    """A classifier, and what was cut to make it."""

    classifier: ClassHead
    truncated: tuple[int, ...] = ()
    """places of labels that did not fit into the model's context, in at least one template"""


Build = Callable[[], Awaitable[Head]]


class Counter(Protocol):
    """Who counts how often a head was there, or is being built, and how often not."""

    def cache_hit(self, kind: Literal["head"]) -> None: ...

    def cache_miss(self, kind: Literal["head"]) -> None: ...


@dataclass(eq=False)
class _Building:
    task: "asyncio.Future[Head]"
    waiting: int = 0


class HeadCache:
    """An LRU of class heads; used from one event loop."""

    def __init__(self, max_bytes: int, counter: Counter) -> None:
        self._max_bytes = max_bytes
        self._counter = counter
        self._heads: OrderedDict[Hashable, Head] = OrderedDict()
        self._building: dict[Hashable, _Building] = {}
        self._num_bytes = 0

    async def get(self, key: Hashable, build: Build) -> Head:
        """The head under `key`, built if it is not here. A build that fails is not kept."""
        if key in self._heads:
            self._counter.cache_hit("head")
            self._heads.move_to_end(key)
            return self._heads[key]
        building = self._building.get(key)
        if building is not None:
            self._counter.cache_hit("head")
        else:
            self._counter.cache_miss("head")
            building = _Building(asyncio.ensure_future(build()))
            self._building[key] = building
        building.waiting += 1
        try:
            head = await asyncio.shield(building.task)
        finally:
            building.waiting -= 1
            if not building.waiting:
                building.task.cancel()
            if self._building.get(key) is building and (
                building.task.done() or not building.waiting
            ):
                del self._building[key]
        self._keep(key, head)
        return head

    def _keep(self, key: Hashable, head: Head) -> None:
        if key in self._heads or _size(head) > self._max_bytes:
            return
        self._heads[key] = head
        self._num_bytes += _size(head)
        while self._num_bytes > self._max_bytes:
            _, oldest = self._heads.popitem(last=False)
            self._num_bytes -= _size(oldest)

    def __len__(self) -> int:
        return len(self._heads)


def digest(labels: Sequence[str], templates: Sequence[str]) -> bytes:
    """What stands for them in a key, which is kept as long as the head is."""
    return hashlib.sha256(orjson.dumps([labels, templates])).digest()


def _size(head: Head) -> int:
    kept = head.classifier
    return kept.weights.nbytes + sum(map(sys.getsizeof, kept.labels))
