"""What waits for one model, and which of it makes the next batch.

Bookkeeping alone: no threads, no clock, nothing locked (the caller holds a lock). Kinds never mix
in a batch. Urgent items go first, interactive ones before bulk; among equals requests take turns,
an item each, so that a long request does not hold up the short ones behind it. A part of a request
whose other items of that kind are being decoded right now is held for a moment before it begins a
batch: eight pictures sent together would be a batch of one and one of seven. Start at
`Schedule.next_batch`.
"""

import itertools
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import NotReady
from service.notes import notes

Kind = Literal["image", "text", "match", "call"]
KINDS: tuple[Kind, ...] = ("image", "text", "match", "call")
Priority = Literal["urgent", "interactive", "bulk"]
_PRIORITIES: tuple[Priority, ...] = ("urgent", "interactive", "bulk")

HOLD_S = 0.05
"""so long an item waits for the rest of its request: small pictures are decoded by then, and large
ones are decoded while the model computes"""
_BULK_EVERY = 8
"""while both wait, so many interactive batches run for one of bulk; and after so many of bulk
without an interactive one, bulk batches need not be small any more"""
_BULK_SHARE = 4
"""a bulk batch that an interactive item may have to wait for is this much smaller"""


class Abandoned(NotReady):
    """Nobody waits for this item any more."""


class Job:
    """The items of one request. Each is settled once, with its answer or an error."""

    def __init__(self, size: int, free_slot: Callable[[], None]) -> None:
        self.results: list[Any] = [None] * size
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # so that a waiter cannot cancel it
        self._unsettled = size
        self._free_slot = free_slot
        self._lock = threading.Lock()
        self._watchers: dict[int, Callable[[Any], None]] = {}
        self._preparing: dict[Kind, set[int]] = {kind: set() for kind in KINDS}
        self.notes = notes()
        self.notes.items += size
        if not size:
            self.done.set_result(None)

    def settle(self, index: int, result: Any) -> None:
        """Later results for an item that is settled are dropped."""
        with self._lock:
            if self.results[index] is not None:
                return
            self.results[index] = result
            self._unsettled -= 1
            last = self._unsettled == 0
            watcher = self._watchers.pop(index, None)
        self.prepared(index)
        self._free_slot()
        if watcher is not None:
            watcher(result)
        if last:
            self.done.set_result(None)

    def when_settled(self, index: int, call: Callable[[Any], None]) -> None:
        """Have it called once with the item's result; at once if there is one."""
        with self._lock:
            result = self.results[index]
            if result is None:
                self._watchers[index] = call
                return
        call(result)

    def is_settled(self, index: int) -> bool:
        return self.results[index] is not None

    def prepare(self, kind: Kind, indices: Iterable[int]) -> None:
        """These are being decoded or tokenised, until they are `prepared` or settled."""
        with self._lock:
            self._preparing[kind].update(i for i in indices if self.results[i] is None)

    def prepared(self, index: int) -> None:
        """It is in the queue, or is waited for elsewhere."""
        with self._lock:
            for indices in self._preparing.values():
                indices.discard(index)

    def is_preparing(self, kind: Kind) -> bool:
        return bool(self._preparing[kind])


@dataclass(frozen=True, eq=False)
class Item:
    """One prepared picture, text, pair or call."""

    job: Job
    index: int
    kind: Kind
    data: Any
    priority: Priority
    arrived_s: float

    def settle(self, result: Any) -> None:
        self.job.settle(self.index, result)


class Schedule:
    """The items that wait. `max_batch` is the largest batch of each kind."""

    def __init__(self, max_batch: Mapping[Kind, int]) -> None:
        self._max_batch = max_batch
        self._turns = itertools.count()
        self._lanes = {(p, kind): _Lane(kind, self._turns) for p in _PRIORITIES for kind in KINDS}
        self._passed_over = 0
        """interactive batches since one of bulk, while bulk waited"""
        self._undisturbed = _BULK_EVERY
        """bulk batches since an interactive one"""

    def add(self, item: Item) -> None:
        self._lanes[item.priority, item.kind].add(item)

    def drop(self, job: Job) -> None:
        """Take out what is left of a job."""
        for lane in self._lanes.values():
            lane.drop(job)

    def count_until(self, job: Job, kind: Kind, priority: Priority, size: int) -> int:
        """How many of these items run before the last of `size` more of a job has, that included,
        if nothing comes between."""
        return self._lanes[priority, kind].count_until(job, size)

    def clear(self) -> list[Item]:
        """Take out everything."""
        return [item for lane in self._lanes.values() for item in lane.take_all()]

    def __bool__(self) -> bool:
        return any(self._lanes.values())

    def ready_s(self) -> float:
        """When a batch may begin, by the clock of `arrived_s`: -inf for at once, inf if nothing
        waits."""
        return min(self._ready_s(*place) for place in self._lanes)

    def next_batch(self, now_s: float = math.inf) -> list[Item]:
        """Take out a batch: of the most pressing priority that is ready by then, the kind that
        waited longest. Something must wait; if none of it is ready any more, all of it is."""
        waiting = [place for place, lane in self._lanes.items() if lane]
        ready = [place for place in waiting if self._ready_s(*place) <= now_s] or waiting
        priority = self._next_priority({priority for priority, _ in ready})
        kinds = [kind for one, kind in ready if one == priority]
        kind = min(kinds, key=lambda kind: self._lanes[priority, kind].first_turn)
        batch = self._lanes[priority, kind].take(self._size(priority, kind))
        if priority == "urgent":  # a canary alone would waste a run
            rest = self._max_batch[kind] - len(batch)
            batch += self._lanes["interactive", kind].take(rest)
        return batch

    def _ready_s(self, priority: Priority, kind: Kind) -> float:
        return self._lanes[priority, kind].ready_s(self._size(priority, kind))

    def _next_priority(self, ready: Set[Priority]) -> Priority:
        if "urgent" in ready:
            return "urgent"
        if "bulk" not in ready or ("interactive" in ready and self._passed_over < _BULK_EVERY):
            self._passed_over += "bulk" in ready
            self._undisturbed = 0
            return "interactive"
        self._passed_over = 0
        self._undisturbed += 1
        return "bulk"

    def _size(self, priority: Priority, kind: Kind) -> int:
        largest = self._max_batch[kind]
        if priority == "bulk" and self._undisturbed <= _BULK_EVERY:
            return max(1, largest // _BULK_SHARE)
        return largest


class _Lane:
    """Items of one kind and priority, by job. Who was served goes to the end of the line."""

    def __init__(self, kind: Kind, turns: Iterator[int]) -> None:
        self._kind: Kind = kind
        self._turns = turns
        self._jobs: OrderedDict[Job, tuple[int, deque[Item]]] = OrderedDict()

    def add(self, item: Item) -> None:
        if item.job not in self._jobs:
            self._jobs[item.job] = (next(self._turns), deque())
        self._jobs[item.job][1].append(item)

    def drop(self, job: Job) -> None:
        self._jobs.pop(job, None)

    def count_until(self, job: Job, size: int) -> int:
        own = size + (len(self._jobs[job][1]) if job in self._jobs else 0)
        others = (len(items) for other, (_, items) in self._jobs.items() if other is not job)
        return own + sum(min(own, count) for count in others)

    def take(self, size: int) -> list[Item]:
        taken: list[Item] = []
        while self._jobs and len(taken) < size:
            job, (_, items) = self._jobs.popitem(last=False)
            taken.append(items.popleft())
            if items:
                self._jobs[job] = (next(self._turns), items)
        return taken

    def ready_s(self, size: int) -> float:
        """When the first request here is whole, fills a batch, or has been held long enough."""
        count, first_s = 0, math.inf
        for job, (_, items) in self._jobs.items():
            count += len(items)
            if count >= size or not job.is_preparing(self._kind):
                return -math.inf
            first_s = min(first_s, items[0].arrived_s + HOLD_S)
        return first_s

    def take_all(self) -> list[Item]:
        items = [item for _, own in self._jobs.values() for item in own]
        self._jobs.clear()
        return items

    @property
    def first_turn(self) -> int:
        """When the one that waits longest came, or was served last."""
        return next(iter(self._jobs.values()))[0]

    def __bool__(self) -> bool:
        return bool(self._jobs)
