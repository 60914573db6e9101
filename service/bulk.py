"""A job, and working through it: lines -> vectors -> the collection, two batches in memory at most.

The place that is reached is noted in the collection, in the same write as the items before it, so
that after a crash no item is stored twice or passed over. Start at `work_through`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat

from index.collection import Unit
from service.bodies import parse_line
from service.errors import (
    ModelFailed,
    NotFound,
    NotReady,
    Overloaded,
    RequestError,
    error_fields,
)
from service.notes import start
from service.registry import Registry, ServedCollection
from service.schemas import UpsertItem
from service.spool import FAILED_KEPT, Batch, Position, Spool
from service.upserts import Prepared, prepare, store

State = Literal["open", "queued", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")

_BATCH_ITEMS = 64
_AHEAD = 2
"""batches in memory: one is embedded while the one before is stored"""
_FETCHED_BYTES = 64 * 2**20
"""of pictures behind URLs, that a batch holds unless one is larger"""
_LINE_BYTES = 4 * 2**20
"""of an item beside its picture"""
_ATTEMPTS = 3
"""for a batch that the model failed at, which may have been another request's fault"""


class About(BaseModel, strict=True, extra="forbid"):
    """What is kept of a job on disk, as `Job` has it."""

    id: str
    collection: str
    identity: str
    created: FiniteFloat
    total: int
    done: int
    done_before: int
    num_failed: int
    seconds: FiniteFloat
    error: str | None
    state: State


@dataclass(eq=False)
class Job:
    """One job, as far as it is known."""

    id: str
    collection: str
    identity: str
    """of the collection, so that another one of that name is not filled"""
    created: float
    spool: Spool
    state: State = "open"
    total: int = 0
    done: int = 0
    num_failed: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    """of work, in this process"""
    error: str | None = None
    done_before: int = 0
    """when the work of this process began"""
    task: "asyncio.Task[None] | None" = None
    adding: asyncio.Lock = field(default_factory=asyncio.Lock)
    touched: float = 0.0
    """when items were added last, or this process found it"""

    def about(self) -> dict[str, Any]:
        """What is kept of it on disk."""
        state = "queued" if self.state == "running" else self.state
        return {name: getattr(self, name) for name in About.model_fields} | {"state": state}

    def describe(self) -> dict[str, Any]:
        """What a client is told."""
        done_now = self.done - self.done_before
        speed = done_now / self.seconds if self.seconds else 0.0
        left = self.total - self.done
        return {
            "id": self.id,
            "object": "job",
            "state": self.state,
            "collection": self.collection,
            "created": int(self.created),
            "total": self.total,
            "done": self.done,
            "num_failed": self.num_failed,
            "failed": self.failed,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "items_per_second": round(speed, 2),
            "eta_s": round(left / speed, 1) if speed and self.state == "running" else None,
        }


async def work_through(job: Job, registry: Registry, pool: Executor) -> None:
    """Store what is not stored yet. Raises what makes the rest of it impossible.

    `pool` reads and writes files, and parses their lines, where no request waits for it.
    """
    served = registry.collection(job.collection)
    served.check_writable()
    if served.collection.identity != job.identity:
        raise NotFound("the collection was dropped and made anew since the job was sent")
    loop = asyncio.get_running_loop()
    position = await registry.in_store(served, _resume, job, served)
    size = min(_BATCH_ITEMS, max(1, registry.settings.max_queue_items // 2))
    batches = job.spool.batches(position, size)
    ahead: deque[tuple[Batch, asyncio.Task[list[Prepared | Exception]]]] = deque()
    started = time.monotonic()
    try:
        while True:
            while len(ahead) < _AHEAD:
                batch = await loop.run_in_executor(pool, next, batches, None)
                if batch is None:
                    break
                ahead.append((batch, asyncio.create_task(_prepare(batch, served, registry, pool))))
            if not ahead:
                return
            prepared = await ahead[0][1]
            batch, _ = ahead.popleft()
            await registry.in_store(served, _commit, job, served, batch, prepared)
            job.error = None  # of an attempt before this one
            job.seconds = time.monotonic() - started
    finally:
        for _, task in ahead:
            task.cancel()


async def _prepare(
    batch: Batch, served: ServedCollection, registry: Registry, pool: Executor
) -> list[Prepared | Exception]:
    loop = asyncio.get_running_loop()
    max_bytes = registry.settings.max_image_bytes * 4 // 3 + _LINE_BYTES
    parsed = await loop.run_in_executor(pool, _parse, batch.lines, max_bytes)
    items = [one for one in parsed if isinstance(one, UpsertItem)]
    for _ in range(_ATTEMPTS):
        found = await _patiently(items, served, registry)
        if not any(isinstance(one, ModelFailed) for one in found):
            break
    answers = iter(found)
    return [one if isinstance(one, Exception) else next(answers) for one in parsed]


async def _patiently(
    items: list[UpsertItem], served: ServedCollection, registry: Registry
) -> list[Prepared | Exception]:
    """Come back when told to, as the requests of others go before a job's; in halves, if the
    pictures behind the URLs are too many bytes."""
    while True:
        start("").hold = _Fetched(len(items)).add
        try:
            return await prepare(items, ["item"] * len(items), served, registry, priority="bulk")
        except (Overloaded, NotReady) as error:
            await asyncio.sleep(float(error.headers.get("Retry-After", 1)))
        except _TooManyBytes:
            break  # and with it the error, which holds on to what was fetched
    half = len(items) // 2
    first = await _patiently(items[:half], served, registry)
    return first + await _patiently(items[half:], served, registry)


class _TooManyBytes(Exception):
    """What is fetched for some items; never for a single one."""


class _Fetched:
    """Counts what is fetched for so many items, beside the bytes of all requests: a job outlives
    its own."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items
        self._size = 0

    def add(self, size: int) -> None:
        self._size += size
        if self._size > _FETCHED_BYTES and self._num_items > 1:
            raise _TooManyBytes


def _resume(job: Job, served: ServedCollection) -> Position:
    """Where the collection says that the job is."""
    unit = served.collection.units().get(_unit_name(job))
    if unit is None:
        position = Position()
    else:
        position = Position.parse(unit.digest)
        job.num_failed = unit.bad
    job.done = job.done_before = position.done
    # What was noted of a batch that was not stored in the end comes again.
    job.failed = [one for one in job.failed if one["index"] < position.done]
    return position


def _commit(
    job: Job, served: ServedCollection, batch: Batch, prepared: Sequence[Prepared | Exception]
) -> None:
    """Store a batch and, with it, that it is stored; of items with one id the last one stays."""
    pairs = list(enumerate(prepared, batch.index))
    failed = [_failure(index, one) for index, one in pairs if isinstance(one, Exception)]
    if failed and len(job.failed) < FAILED_KEPT:
        job.failed = (job.failed + failed)[:FAILED_KEPT]
        job.spool.set_failures(job.failed)
    last = {one.item.id: one for one in prepared if isinstance(one, Prepared)}
    num_failed = job.num_failed + len(failed)
    unit = Unit(_unit_name(job), str(batch.end), batch.end.done, num_failed)
    store(served.collection, list(last.values()), unit)
    job.done, job.num_failed = batch.end.done, num_failed


def _parse(lines: list[bytes], max_bytes: int) -> list[UpsertItem | Exception]:
    return [_parse_line(line, max_bytes) for line in lines]


def _parse_line(line: bytes, max_bytes: int) -> UpsertItem | Exception:
    try:
        return parse_line(UpsertItem, line, max_bytes)
    except RequestError as error:
        return error


def _failure(index: int, error: Exception) -> dict[str, Any]:
    return {"index": index, "error": error_fields(error)}


def _unit_name(job: Job) -> str:
    return f"service/{job.id}"
