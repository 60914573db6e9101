"""One thread owns the model; the items of all requests meet here and leave in batches.

A batch is formed at the moment the model is free, so it holds everything that arrived while the
last one ran: nothing sleeps, polls or waits for more. Pictures and texts go apart; whichever has
waited longest goes first. Start at `Batcher.admit`. Life of an item: admitted (it has a slot),
prepared elsewhere, `put` into the queue, run, settled with a row or an error (the slot is free).

Legend: N items of a batch, E embedding.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from service.errors import ModelFailed, NotReady, Overloaded

logger = logging.getLogger(__name__)

Kind = Literal["image", "text"]
KINDS: tuple[Kind, Kind] = ("image", "text")
Encode = Callable[[Sequence[Any]], np.ndarray]
_MAX_RESTART_DELAY_S = 5.0


class Observer(Protocol):
    """Who is told of every batch."""

    def batch(self, kind: Kind, size: int, seconds: float, waited_s: float) -> None: ...

    def restart(self) -> None: ...


class Job:
    """The items of one request. Each is settled once, with a row (E,) or an error."""

    def __init__(self, size: int, free_slot: Callable[[], None]) -> None:
        self.results: list[np.ndarray | Exception | None] = [None] * size
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()  # so that a waiter cannot cancel it
        self._unsettled = size
        self._free_slot = free_slot
        self._lock = threading.Lock()
        if not size:
            self.done.set_result(None)

    def settle(self, index: int, result: np.ndarray | Exception) -> None:
        """Later results for an item that is settled are dropped."""
        with self._lock:
            if self.results[index] is not None:
                return
            self.results[index] = result
            self._unsettled -= 1
            last = self._unsettled == 0
        self._free_slot()
        if last:
            self.done.set_result(None)

    def is_settled(self, index: int) -> bool:
        return self.results[index] is not None


@dataclass(frozen=True, eq=False)
class _Item:
    job: Job
    index: int
    data: Any
    arrival: int
    """order over all kinds"""
    arrived_s: float

    def settle(self, result: np.ndarray | Exception) -> None:
        self.job.settle(self.index, result)


class Batcher:
    """The queue of one model and the thread that empties it.

    `encode[kind]` takes the prepared items of a batch and gives their vectors (N, E).
    """

    def __init__(
        self,
        encode: Mapping[Kind, Encode],
        *,
        max_batch: Mapping[Kind, int],
        max_items: int,
        observer: Observer,
        name: str = "model",
    ) -> None:
        self._encode = encode
        self._max_batch = max_batch
        self._max_items = max_items
        self._observer = observer
        self._name = name
        self._queues: dict[Kind, deque[_Item]] = {kind: deque() for kind in KINDS}
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._open_items = 0
        self._seconds_per_item = 0.05  # moving average, for Retry-After
        self._running: list[_Item] = []
        self._closing = False
        self._supervisor: threading.Thread | None = None

    def close(self) -> None:
        """Finish the running batch, refuse the rest, and join the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._supervisor is not None:
            self._supervisor.join(timeout=10)
        self._fail_queued()

    def admit(self, size: int, *, urgent: bool = False) -> Job:
        """Slots for `size` items, all or none. Raises Overloaded; `urgent` needs no free slots."""
        with self._changed:
            if self._closing:
                raise NotReady("the service is shutting down")
            self._start()
            if not urgent and self._open_items + size > self._max_items:
                raise Overloaded(
                    f"{self._open_items} items are waiting for the model and at most"
                    f" {self._max_items} may; come back later or send fewer",
                    self._retry_after_s(),
                )
            self._open_items += size
        return Job(size, self._free_slot)

    def put(self, job: Job, index: int, kind: Kind, data: Any, *, urgent: bool = False) -> None:
        """Queue a prepared item; an `urgent` one goes to the front."""
        with self._changed:
            if not self._closing and not job.is_settled(index):
                arrival = -1 if urgent else next(self._arrivals)
                item = _Item(job, index, data, arrival, time.monotonic())
                queue = self._queues[kind]
                queue.appendleft(item) if urgent else queue.append(item)
                self._changed.notify_all()
                return
        job.settle(index, NotReady("the service is shutting down"))

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job any more: its items leave the queue, its slots are free."""
        if job.done.done():
            return
        # Settled first: a `put` after that leaves them alone, one before it is swept out here.
        for index in range(len(job.results)):
            job.settle(index, NotReady("the request was abandoned"))
        with self._changed:
            for kind, queue in self._queues.items():
                self._queues[kind] = deque(item for item in queue if item.job is not job)

    @property
    def open_items(self) -> int:
        """Items admitted and not settled: being prepared, queued or running."""
        return self._open_items

    def _start(self) -> None:
        if self._supervisor is None:
            self._supervisor = threading.Thread(
                target=self._supervise, name=f"supervise-{self._name}", daemon=True
            )
            self._supervisor.start()

    def _free_slot(self) -> None:
        with self._changed:
            self._open_items -= 1

    def _retry_after_s(self) -> int:
        return max(1, min(60, round(self._open_items * self._seconds_per_item)))

    def _supervise(self) -> None:
        """Run the model's thread; when it dies, fail what it held and start another."""
        for deaths in itertools.count(1):
            worker = threading.Thread(target=self._work, name=self._name, daemon=True)
            worker.start()
            worker.join()
            for item in self._running:
                item.settle(ModelFailed("the model's thread died while it held this item"))
            self._running = []
            with self._changed:
                if self._closing:
                    return
                logger.error("%s: the model's thread died; starting another", self._name)
                self._observer.restart()
                delay = min(0.05 * 2**deaths, _MAX_RESTART_DELAY_S)
                self._changed.wait_for(lambda: self._closing, timeout=delay)

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._running = batch[1]
                self._run(*batch)
                self._running = []
        except BaseException:  # whatever it is, the supervisor takes over; the log says what
            logger.critical("%s: the model's thread stops", self._name, exc_info=True)

    def _next_batch(self) -> tuple[Kind, list[_Item]] | None:
        """Wait for items; None when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or any(self._queues.values()))
            if self._closing:
                return None
            waiting = [kind for kind in KINDS if self._queues[kind]]
            kind = min(waiting, key=lambda kind: self._queues[kind][0].arrival)
            queue = self._queues[kind]
            size = min(len(queue), self._max_batch[kind])
            return kind, [queue.popleft() for _ in range(size)]

    def _run(self, kind: Kind, items: list[_Item]) -> None:
        started = time.monotonic()
        waited = started - min(item.arrived_s for item in items)
        try:
            rows = self._encode[kind]([item.data for item in items])
        except Exception as error:
            logger.exception("%s: a batch of %d %ss failed", self._name, len(items), kind)
            results: list[np.ndarray | Exception] = [_failed(error) for _ in items]
        else:
            results = _checked(rows, len(items))
        seconds = time.monotonic() - started
        self._seconds_per_item += 0.1 * (seconds / len(items) - self._seconds_per_item)
        self._observer.batch(kind, len(items), seconds, waited)
        for item, result in zip(items, results, strict=True):
            item.settle(result)

    def _fail_queued(self) -> None:
        with self._changed:
            items = [item for queue in self._queues.values() for item in queue]
            for queue in self._queues.values():
                queue.clear()
        for item in items:
            item.settle(NotReady("the service is shutting down"))


def _failed(error: Exception) -> ModelFailed:
    return ModelFailed(f"the model failed on this batch ({type(error).__name__}); try again")


def _checked(rows: np.ndarray, size: int) -> list[np.ndarray | Exception]:
    """The rows (N, E), or an error in place of each that is not a finite vector."""
    if rows.ndim != 2 or len(rows) != size:
        return [ModelFailed("the model gave the wrong number of vectors")] * size
    finite = np.isfinite(rows).all(axis=1)
    return [
        row if good else ModelFailed("the model gave a vector that is not finite")
        for row, good in zip(rows, finite, strict=True)
    ]
