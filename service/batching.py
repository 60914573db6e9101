"""One model's queue: the items of all requests meet here and leave in batches.

A batch is formed at the moment the model is free, of everything that arrived while the last one
ran: nothing sleeps or polls, and what is waited for is only, a moment, the rest of a request that
is being decoded right now. What waits is prepared already, on the device if that is a GPU, so
forming a batch takes no time that the device could use. Start at `Batcher.admit`. Life
of an item: admitted (it has a slot), prepared elsewhere, `put` into the queue, run, settled with an
answer or an error (the slot is free). A request that cannot be answered by its deadline is
refused when its items come to the queue: only then is it known which of them the model must see.

What is next is `scheduler.py`'s to say, running it `worker.py`'s. Here are the slots, and the
supervisor: a model's thread that died is replaced at once, one that hangs is left behind.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from service.errors import ModelFailed, NotReady, Overloaded
from service.scheduler import KINDS, Abandoned, Item, Priority, Schedule
from service.scheduler import Job as Job
from service.scheduler import Kind as Kind
from service.worker import Encode as Encode
from service.worker import Worker

logger = logging.getLogger(__name__)

Cached = Kind | Literal["head"]

_MAX_RESTART_DELAY_S = 5.0
_MAX_DOUBLINGS = 10
_MAX_RETRY_AFTER_S = 600
_CLOSE_PATIENCE_S = 10.0
_CLOSING = "the service is shutting down"
_CLEARLY = 1.5
"""a request is refused when the work before its answer takes so many times the time it has left"""


class Observer(Protocol):
    """Who is told what a model does."""

    def batch(self, kind: Kind, size: int, seconds: float, waited_s: float) -> None:
        """A batch was run; its oldest item waited so long."""

    def padding(self, fraction: float) -> None:
        """Of the tokens of a batch of texts, so many stand for nothing."""

    def stage(self, name: str, kind: Kind, seconds: float) -> None:
        """Work beside the model took so long: "decode" of an image, "tokenize" of texts."""

    def cache_hit(self, kind: Cached) -> None:
        """A vector, or a class head, was there, or on its way for another request."""

    def cache_miss(self, kind: Cached) -> None:
        """It has to be computed."""

    def restart(self) -> None:
        """The model's thread died, or was left behind, and is replaced."""


class TooLate(Overloaded, Abandoned):
    """An item would not be answered by its request's deadline; another request that waits for the
    same vector is left to compute it."""


class _Pace:
    """Seconds an item takes: a moving average of which the last fifty items are most."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_known = False

    def note(self, size: int, seconds: float) -> None:
        own = seconds / size
        kept = 0.98**size if self._is_known else 0.0
        self.seconds = kept * self.seconds + (1 - kept) * own
        self._is_known = True


class Batcher:
    """The queue of one model and the threads that empty it.

    `encode[kind]` takes the prepared items of a batch and gives their answers. `threads`: on a GPU
    a second one forms and launches the next batch while the first waits for its own. A call that
    takes longer than `max_call_s` by the clock is given up.
    """

    def __init__(
        self,
        encode: Mapping[Kind, Encode],
        *,
        max_batch: Mapping[Kind, int],
        max_items: int,
        observer: Observer,
        name: str = "model",
        threads: int = 1,
        max_call_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encode = encode
        self._schedule = Schedule(max_batch)
        self._max_batch = max_batch
        self._max_items = max_items
        self._observer = observer
        self._name = name
        self._num_threads = threads
        self._max_call_s = max_call_s
        self._clock = clock
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._watch = threading.Condition(self._lock)
        self._workers: list[Worker] = []
        self._supervisor: threading.Thread | None = None
        self._is_watching = False
        self._open_items = 0
        self._pace = _Pace()
        # Of batches that are at least half full, as those of a long queue are: small ones are
        # slower by the item, and would have requests refused that can be answered in time.
        self._full_pace = {kind: _Pace() for kind in KINDS}
        self._losses = 0
        self._not_before_s = -math.inf
        self._closing = False

    def close(self) -> None:
        """Finish the running batch, refuse the rest, and wait for the threads."""
        self.shut()
        with self._lock:
            workers, supervisor = list(self._workers), self._supervisor
        for worker in workers:
            worker.join(_CLOSE_PATIENCE_S)
        if supervisor is not None:
            supervisor.join(_CLOSE_PATIENCE_S)

    def shut(self) -> None:
        """As `close`, but wait for nothing."""
        with self._lock:
            self._closing = True
            waiting = self._schedule.clear()
            self._arrived.notify_all()
            self._watch.notify_all()
        for item in waiting:
            item.settle(NotReady(_CLOSING))

    def admit(self, size: int, *, priority: Priority = "interactive") -> Job:
        """Slots for `size` items, all or none. Raises Overloaded, but never for urgent ones."""
        with self._lock:
            if self._closing:
                raise NotReady(_CLOSING)
            self._start()
            if priority != "urgent":
                self.check_room(size)
            self._open_items += size
        return Job(size, self._free_slot)

    def check_room(self, size: int = 1) -> None:
        """Overloaded if so many items would not be admitted now."""
        with self._lock:
            if self._open_items + size > self._max_items:
                raise Overloaded(
                    f"{self._open_items} items are waiting for the model and at most"
                    f" {self._max_items} may; come back later or send fewer",
                    self._retry_after_s(),
                )

    def put(
        self,
        job: Job,
        kind: Kind,
        prepared: Iterable[tuple[int, Any]],
        priority: Priority = "interactive",
    ) -> None:
        """Queue items of a job, each with its place in it; the job ends with Overloaded if they
        would clearly be too late."""
        refused = []
        with self._lock:
            now = self._clock()
            items = [
                Item(job, index, kind, data, priority, now)
                for index, data in prepared
                if not job.is_settled(index)
            ]
            late_s = self._late_s(job, kind, priority, len(items))
            for item in items:
                job.prepared(item.index)
                if self._closing:
                    refused.append(item)
                elif late_s is None:
                    self._schedule.add(item)
            self._arrived.notify()
        for item in refused:
            item.settle(NotReady(_CLOSING))
        if late_s is not None:
            self._drop(job, _too_late(late_s))

    def leave_out(self, job: Job, index: int) -> None:
        """An item that was being prepared will not be put: its answer comes from elsewhere."""
        job.prepared(index)
        with self._lock:
            self._arrived.notify()

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job any more: its items leave the queue, its slots are free."""
        if not job.done.done():
            self._drop(job, Abandoned("the request was abandoned"))

    def inspect(self) -> None:
        """Replace a thread that died or hangs. The supervisor does it in time; this does it now."""
        for worker in self._take_lost():
            for item in worker.held:
                item.settle(ModelFailed("the model's thread was lost while it held this item"))
        self._fill()

    @property
    def open_items(self) -> int:
        """Items admitted and not settled: being prepared, queued or running."""
        return self._open_items

    def _drop(self, job: Job, error: Exception) -> None:
        # Swept out twice: a settled item lets an idle thread begin, and until all are settled more
        # may be put.
        with self._lock:
            self._schedule.drop(job)
        for index in range(len(job.results)):
            job.settle(index, error)
        with self._lock:
            self._schedule.drop(job)

    def _start(self) -> None:
        if self._supervisor is None:
            self._fill()
            self._supervisor = threading.Thread(
                target=self._supervise, name=f"supervise-{self._name}", daemon=True
            )
            self._supervisor.start()

    def _fill(self) -> None:
        """Start the threads that are missing, unless it is too early."""
        with self._lock:
            while len(self._workers) < self._num_threads and not self._closing:
                if self._clock() < self._not_before_s:
                    return
                worker = Worker(
                    self._name, self._encode, self._take, self._ran, self._ended, self._clock
                )
                self._workers.append(worker)
                worker.start()

    def _supervise(self) -> None:
        while True:
            self.inspect()
            with self._lock:
                if self._closing:
                    return
                if not self._lost():
                    patience = self._patience_s()
                    self._is_watching = patience is not None
                    self._watch.wait(patience)
                    self._is_watching = False

    def _patience_s(self) -> float | None:
        """Until there may be something to do; None while nothing runs and none is missing."""
        times = [
            worker.called_s + self._max_call_s
            for worker in self._workers
            if worker.called_s is not None
        ]
        if len(self._workers) < self._num_threads:
            times.append(self._not_before_s)
        return max(0.0, min(times) - self._clock()) if times else None

    def _lost(self) -> list[Worker]:
        now = self._clock()
        return [
            worker
            for worker in self._workers
            if worker.has_ended
            or (worker.called_s is not None and now - worker.called_s >= self._max_call_s)
        ]

    def _take_lost(self) -> list[Worker]:
        """Strike them off. The first is replaced at once, later ones with growing delay."""
        with self._lock:
            lost = [] if self._closing else self._lost()
            for worker in lost:
                self._workers.remove(worker)
                delay = 0.05 * 2 ** min(self._losses, _MAX_DOUBLINGS) if self._losses else 0.0
                self._not_before_s = self._clock() + min(delay, _MAX_RESTART_DELAY_S)
                self._losses += 1
                what = "hangs and is left behind" if not worker.has_ended else "died"
                logger.error("%s: the model's thread %s; starting another", self._name, what)
                self._observer.restart()
        return lost

    def _take(self, worker: Worker) -> list[Item] | None:
        """Wait for a batch; None if this worker is to end."""
        with self._lock:
            while worker in self._workers and not self._closing and (left_s := self._hold_s()) > 0:
                self._arrived.wait(None if left_s == math.inf else left_s)
            if self._closing or worker not in self._workers:
                self._arrived.notify()  # it may have been meant for another
                return None
            batch = self._schedule.next_batch(self._clock())
            worker.hold(batch)
            if self._schedule:
                self._arrived.notify()
            if not self._is_watching:
                self._watch.notify()
            return batch

    def _hold_s(self) -> float:
        """So long no batch may begin; inf: not before something arrives."""
        return self._schedule.ready_s() - self._clock()

    def _ran(self, worker: Worker, items: list[Item], results: list[Any], seconds: float) -> None:
        with self._lock:
            if worker not in self._workers:
                return
            if not all(isinstance(result, Exception) for result in results):
                self._losses = 0
            if items[0].kind != "call":  # it may be anything, and is no picture or text
                self._note_pace(items[0].kind, len(items), seconds)
        started = self._clock() - seconds
        waited = started - min(item.arrived_s for item in items)
        for job, arrived_s in {item.job: item.arrived_s for item in items}.items():
            job.notes.ran(max(0.0, started - arrived_s), seconds)
        self._observer.batch(items[0].kind, len(items), seconds, max(0.0, waited))

    def _ended(self, worker: Worker) -> None:
        with self._lock:
            self._watch.notify()

    def _note_pace(self, kind: Kind, size: int, seconds: float) -> None:
        self._pace.note(size, seconds)
        if 2 * size >= self._max_batch[kind]:
            self._full_pace[kind].note(size, seconds)

    def _late_s(self, job: Job, kind: Kind, priority: Priority, size: int) -> float | None:
        """By how much the last of `size` more items would be too late, if that is clear.

        Only what surely goes first is counted: of the same kind and priority, at the pace of full
        batches.
        """
        left_s = job.notes.deadline_s - self._clock()
        pace_s = self._full_pace[kind].seconds
        if left_s == math.inf or not pace_s or priority == "urgent":
            return None
        count = self._schedule.count_until(job, kind, priority, size)
        needed_s = count * pace_s / self._num_threads
        return needed_s - left_s if needed_s > _CLEARLY * left_s else None

    def _free_slot(self) -> None:
        with self._lock:
            self._open_items -= 1
            if self._schedule:  # what waited for this item to be prepared waits no longer
                self._arrived.notify()

    def _retry_after_s(self) -> int:
        """When all that is waiting now will have been answered, at the pace seen so far."""
        return _whole_s(self._open_items * self._pace.seconds / self._num_threads)


def _too_late(seconds: float) -> TooLate:
    return TooLate(
        "with what is waiting for the model the answer would come after X-Request-Timeout; come"
        " back later, or allow more time",
        _whole_s(seconds),
        code="deadline",
    )


def _whole_s(seconds: float) -> int:
    """For Retry-After."""
    return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds)))
