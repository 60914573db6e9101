"""Class heads that are kept: building one costs a text encoding per label and template.

Requests that want the same head at the same time share one build, which stops when the last of
them is gone. Kept heads are dropped least recently used first, by their number of labels.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass

from clipserve.prompts import ClassHead

Build = Callable[[], Awaitable[ClassHead]]


@dataclass(eq=False)
class _Building:
    task: "asyncio.Future[ClassHead]"
    waiting: int = 0


class HeadCache:
    """An LRU of class heads; used from one event loop."""

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._heads: OrderedDict[Hashable, ClassHead] = OrderedDict()
        self._building: dict[Hashable, _Building] = {}
        self._num_labels = 0

    async def get(self, key: Hashable, build: Build) -> ClassHead:
        """The head under `key`, built if it is not here. A build that fails is not kept."""
        if key in self._heads:
            self._heads.move_to_end(key)
            return self._heads[key]
        building = self._building.get(key)
        if building is None:
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

    def _keep(self, key: Hashable, head: ClassHead) -> None:
        if key in self._heads or len(head.labels) > self._max_labels:
            return
        self._heads[key] = head
        self._num_labels += len(head.labels)
        while self._num_labels > self._max_labels:
            _, oldest = self._heads.popitem(last=False)
            self._num_labels -= len(oldest.labels)

    def __len__(self) -> int:
        return len(self._heads)
