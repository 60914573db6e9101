"""Threads that decode pictures, or tokenise texts, on their way to a model's queue.

What waits for them has the order of that queue (`scheduler.py`): interactive before bulk, requests
by turns. A thread that hangs is left behind and replaced, as a model's is, but not for ever: when
too many hang nothing is done any more, and the service is not ready. Start at `Pool.submit`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import ModelFailed, NotReady
from service.memory import Budget
from service.scheduler import KINDS, Item, Job, Priority, Schedule

logger = logging.getLogger(__name__)

_CLOSE_PATIENCE_S = 10.0
_CLOSING = "the service is shutting down"
_MOST_THREADS = 4
"""as many times `size`, those left behind counted in: each may take a processor for ever"""
_MEMORY = 2**30


@dataclass(frozen=True)
class _Task:
    """What an item of the schedule holds here."""

    call: Callable[[], None]
    indices: Sequence[int]


@dataclass(eq=False)
class _Worker:
    """What a thread is at, and since when."""

    held: Item | None = None
    began_s: float = 0.0


class Pool:
    """`size` threads, which begin with the first task. One that is longer than `max_task_s` at a
    task hangs; that is looked for as often. `memory` is what large tasks hold while they run."""

    def __init__(
        self,
        size: int,
        name: str,
        max_task_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._size = size
        self._name = name
        self._max_task_s = max_task_s
        self._clock = clock
        self._schedule = Schedule(dict.fromkeys(KINDS, 1))
        self._arrived = threading.Condition()
        self._workers: dict[_Worker, threading.Thread] = {}
        self._left_behind: list[threading.Thread] = []
        self.memory = Budget(_MEMORY)
        self._supervisor: threading.Thread | None = None
        self._over = threading.Event()

    def submit(
        self,
        job: Job,
        indices: Sequence[int],
        call: Callable[[], None],
        priority: Priority = "interactive",
    ) -> None:
        """Call the function in its turn. These items of the job are settled with whatever it
        raises, or with that its thread was lost, or they would wait for ever. What is for a job
        that is over is not kept."""
        item = Item(job, 0, "call", _Task(call, indices), priority, self._clock())
        with self._arrived:
            if job.done.done():
                return
            if not self._over.is_set():
                self._schedule.add(item)
                self._start()
                self._arrived.notify()
                return
        _fail(item, NotReady(_CLOSING))

    def drop(self, job: Job) -> None:
        """Forget the tasks of a job that is over, and with them the pictures that they hold."""
        with self._arrived:
            self._schedule.drop(job)

    def inspect(self) -> None:
        """Replace threads that hang or died. The supervisor does it in time; this does it now."""
        with self._arrived:
            lost = {worker: worker.held for worker in self._workers if self._is_lost(worker)}
            for worker in lost:
                thread = self._workers.pop(worker)
                self._left_behind.append(thread)
                self.memory.take_back(thread)
                logger.error("%s: a thread hangs or died and is left behind", self._name)
            self._left_behind = [thread for thread in self._left_behind if thread.is_alive()]
            if not self._over.is_set():
                self._fill()
        for held in lost.values():
            if held is not None:
                _fail(held, ModelFailed("a thread was lost while it read this item"))

    def close(self) -> None:
        """Finish what runs, refuse the rest, and wait for the threads."""
        self.shut()
        for thread in list(self._workers.values()):
            thread.join(_CLOSE_PATIENCE_S)

    def shut(self) -> None:
        """As `close`, but wait for nothing."""
        with self._arrived:
            self._over.set()
            waiting = self._schedule.clear()
            self._arrived.notify_all()
        for item in waiting:
            _fail(item, NotReady(_CLOSING))

    def _start(self) -> None:
        if self._supervisor is None:
            self._fill()
            self._supervisor = threading.Thread(
                target=self._supervise, name=f"supervise-{self._name}", daemon=True
            )
            self._supervisor.start()

    def _is_lost(self, worker: _Worker) -> bool:
        thread = self._workers[worker]
        if not thread.is_alive():
            return True
        if self.memory.is_waiting(thread):  # it has not begun
            worker.began_s = self._clock()
        return worker.held is not None and self._clock() - worker.began_s >= self._max_task_s

    def _fill(self) -> None:
        most = _MOST_THREADS * self._size - len(self._left_behind)
        while len(self._workers) < min(self._size, most):
            worker = _Worker()
            self._workers[worker] = threading.Thread(
                target=self._work, args=(worker,), name=self._name, daemon=True
            )
            self._workers[worker].start()

    def _supervise(self) -> None:
        while not self._over.wait(self._max_task_s):
            self.inspect()

    def _work(self, worker: _Worker) -> None:
        while (item := self._take(worker)) is not None:
            _run(item)
            del item  # who waits for the next one holds on to nothing of the last

    def _take(self, worker: _Worker) -> Item | None:
        """Wait for the next item; None if this thread is to end."""
        with self._arrived:
            worker.held = None
            self._arrived.wait_for(lambda: self._must_end(worker) or bool(self._schedule))
            if self._must_end(worker):
                return None
            (item,) = self._schedule.next_batch()
            worker.held, worker.began_s = item, self._clock()
            return item

    def _must_end(self, worker: _Worker) -> bool:
        return self._over.is_set() or worker not in self._workers


def _run(item: Item) -> None:
    try:
        item.data.call()
    except Exception as error:
        _fail(item, error)
    except BaseException as error:  # such as a panic in Rust; the thread lives on
        logger.critical("a picture or text could not be read", exc_info=True)
        _fail(item, ModelFailed(f"this item could not be read ({type(error).__name__})"))


def _fail(item: Item, error: Exception) -> None:
    for index in item.data.indices:
        item.job.settle(index, error)
