"""Bulk work: items that are embedded and stored while nobody waits, one job a collection at a time.

What a client sends is on disk before it is answered (`spool.py`), and what a process leaves undone
the next one does (`bulk.py`). A job whose collection or disk fails waits for that to pass. Start at
`Jobs`.
"""

import asyncio
import contextlib
import contextvars
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from clipserve.errors import CollectionClosed, ConfigError, IndexStoreError
from index.collection import directory_lock
from service.bulk import ENDED, About, Job, work_through
from service.errors import (
    Forbidden,
    NotFound,
    NotReady,
    Overloaded,
    RequestError,
    error_fields,
    is_disk_full,
)
from service.registry import Registry
from service.spool import LineWriter, Spool

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FREE_BYTES = 2**30
"""that a job must leave on its disk"""
_PIECE_BYTES = 2**20
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
"""before a job whose disk or collection failed is tried again, at first and after many times"""
_FORSAKEN_S = 24 * 3600
"""after which a job that nobody adds to, nor starts, may be forgotten"""


class Jobs:
    """All jobs of one service, by id. Used from one event loop. ConfigError at first if their
    folder cannot be used. `now` is the clock, in seconds."""

    def __init__(self, registry: Registry, now: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._now = now
        self._root = registry.settings.jobs_dir
        if self._root is not None:
            _check_folder(self._root)
        self._jobs: dict[str, Job] = {}
        self._runners: dict[str, asyncio.Task[None]] = {}
        self._pool = ThreadPoolExecutor(2, "jobs")
        self._lock = contextlib.ExitStack()
        self._refusal = "this service takes no jobs; set CLIPSERVE_JOBS_DIR"

    async def start(self) -> None:
        """Find what an earlier process left; `resume` goes on with it."""
        self._loop = asyncio.get_running_loop()
        if self._root is None:
            return
        try:
            self._lock.enter_context(directory_lock(self._root, ".lock", wait=False))
        except (OSError, IndexStoreError) as error:
            logger.error("no jobs are taken: %s", error)
            self._root = None
            self._refusal = "the folder of jobs is another process's"
            return
        for job in await self._in_pool(_load, self._root):
            job.touched = self._now()
            self._jobs[job.id] = job
        self._registry.watch_collections(self._notice)

    def resume(self) -> None:
        """The collections are served now. From any thread."""
        self._loop.call_soon_threadsafe(self._wake_all)

    async def close(self) -> None:
        """Stop where the work is; the next process goes on from there."""
        running = [job.task for job in self._jobs.values() if job.task is not None]
        tasks = [*self._runners.values(), *running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.shutdown()
        self._lock.close()

    def all(self) -> list[Job]:
        """In the order of their making."""
        return list(self._jobs.values())

    def get(self, id: str) -> Job:
        if id not in self._jobs:
            raise NotFound("no such job", param="id", code="job_not_found")
        return self._jobs[id]

    async def create(self, collection: str | None) -> Job:
        """A job without items, which waits until it is begun."""
        root = self._check_enabled()
        served = self._registry.collection(collection)
        served.check_writable()
        self._make_room()
        identity = served.collection.identity
        id = f"job-{secrets.token_hex(12)}"
        now = self._now()
        job = Job(id, served.name, identity, now, Spool(root / id), touched=now)
        self._jobs[id] = job
        try:
            await self._in_pool(job.spool.create, job.about())
        except OSError as error:
            del self._jobs[id]
            raise _not_stored(error) from None
        return job

    async def append(self, job: Job, chunks: AsyncIterator[bytes]) -> int:
        """Add lines of NDJSON; they are on disk when this returns. Returns how many.

        All of them, or none if the body breaks off.
        """
        async with job.adding:
            _check_open(job)
            try:
                writer = await self._in_pool(job.spool.add)
                try:
                    await self._write(writer, chunks, job.spool.folder)
                except BaseException:
                    await self._in_pool(writer.discard)
                    raise
            except OSError as error:
                raise _not_stored(error) from None
            job.total += writer.count
            job.touched = self._now()
            return writer.count

    async def begin(self, job: Job) -> None:
        """Work on it when the jobs of its collection before it are done."""
        async with job.adding:
            _check_open(job)
            if not job.total:
                raise RequestError("the job has no items; append some first", code="no_items")
            await self._save(job, state="queued")
            job.state = "queued"
        self._wake(job.collection)

    async def cancel(self, job: Job) -> None:
        """Stop it; what is stored already stays. One that has ended is forgotten, one that ends
        meanwhile is not."""
        had_ended = job.state in ENDED
        async with job.adding:
            if had_ended:
                if job.task is not None:  # which is about to note the end
                    await asyncio.wait({job.task})
                self._jobs.pop(job.id, None)
                await self._in_pool(job.spool.remove)
            elif job.state not in ENDED:
                job.state = "cancelled"
                if job.task is not None:
                    job.task.cancel()
                    await asyncio.wait({job.task})
                job.error = None  # what it waited for
                await self._end(job)

    async def discard(self, job: Job) -> None:
        """As if it had never been sent."""
        self._jobs.pop(job.id, None)
        await self._in_pool(job.spool.remove)

    def _check_enabled(self) -> Path:
        if self._root is None:
            raise Forbidden(self._refusal)
        return self._root

    def _make_room(self) -> None:
        """Forget the oldest job that has ended, or else the oldest that nobody started in a day;
        Overloaded if there is none."""
        limit = self._registry.settings.max_jobs
        jobs = self._jobs.values()
        unneeded = [job for job in jobs if job.state in ENDED]
        unneeded += [job for job in jobs if self._is_forsaken(job)]
        while len(self._jobs) >= limit:
            if not unneeded:
                raise Overloaded(f"{limit} jobs are waiting; come back later, or cancel some", 60)
            oldest = unneeded.pop(0)
            del self._jobs[oldest.id]
            self._pool.submit(oldest.spool.remove)

    def _is_forsaken(self, job: Job) -> bool:
        is_waiting = job.state == "open" and not job.adding.locked()
        return is_waiting and self._now() - job.touched >= _FORSAKEN_S

    def _notice(self, name: str, identity: str | None) -> None:
        """Go on with the jobs of a collection that is served now; end those of one that is not."""
        served = self._registry.collections.get(name)
        current = None if served is None else served.collection.identity
        if served is not None and current == identity:
            self._wake(name)
            return
        for job in self._jobs.values():
            known = job.collection == name and job.identity != current
            is_its = known if identity is None else job.identity == identity
            if is_its and job.state in ("open", "queued"):
                job.task = asyncio.create_task(self._abandon(job), context=contextvars.Context())

    async def _abandon(self, job: Job) -> None:
        async with job.adding:
            if job.state in ("open", "queued"):
                job.state, job.error = "failed", "the collection was dropped"
                with contextlib.suppress(NotReady):
                    await self._end(job)

    def _wake_all(self) -> None:
        for collection in {job.collection for job in self._jobs.values()}:
            self._wake(collection)

    def _wake(self, collection: str) -> None:
        """Have somebody work on the jobs of a collection."""
        runner = self._runners.get(collection)
        if runner is None or runner.done():
            # In a context of its own: the request that began the job ends before it.
            self._runners[collection] = asyncio.create_task(
                self._run_all(collection), context=contextvars.Context()
            )

    async def _run_all(self, collection: str) -> None:
        while job := self._next(collection):
            if collection not in self._registry.collections:
                job.error = "the collection is not served; the job waits for it"
                return
            job.state, job.error = "running", None
            job.task = asyncio.create_task(self._run(job))
            await asyncio.wait({job.task})

    async def _run(self, job: Job) -> None:
        try:
            await self._persevere(job)
            job.state, job.error = "done", None
        except Exception as error:  # whatever it is, the next job has its turn
            if await self._comes_back(job, error):
                job.state, job.task = "queued", None
                return
            job.state, job.error = "failed", error_fields(error)["message"]
        with contextlib.suppress(NotReady):  # logged; the next process will come to the same end
            await self._end(job)

    async def _persevere(self, job: Job) -> None:
        """Work through it, for as long as its disk or collection fails again and again: what was
        acknowledged is not given up for what may pass. It can be cancelled meanwhile."""
        pause_s = _PAUSE_S
        while True:
            reached = job.done
            try:
                return await work_through(job, self._registry, self._pool)
            except CollectionClosed:
                raise
            except (IndexStoreError, OSError) as error:
                job.error = _waits_for(error)
                pause_s = _PAUSE_S if job.done > reached else pause_s
                logger.error("%s is tried again in %g s: %s", job.id, pause_s, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _comes_back(self, job: Job, error: Exception) -> bool:
        """Whether its collection was about to be dropped, and is served after all."""
        if not isinstance(error, CollectionClosed | NotFound):
            return False
        return await self._registry.survives(job.collection, job.identity)

    def _next(self, collection: str) -> Job | None:
        jobs = self._jobs.values()
        return next((j for j in jobs if j.collection == collection and j.state == "queued"), None)

    async def _write(self, writer: LineWriter, chunks: AsyncIterator[bytes], folder: Path) -> None:
        async for chunk in chunks:
            for start in range(0, len(chunk), _PIECE_BYTES):
                _check_disk(folder)
                await self._in_pool(writer.write, chunk[start : start + _PIECE_BYTES])
        await self._in_pool(writer.finish)

    async def _end(self, job: Job) -> None:
        await self._save(job)
        await self._in_pool(job.spool.drop_lines)
        job.task = None

    async def _save(self, job: Job, **changes: Any) -> None:
        try:
            await self._in_pool(job.spool.save, job.about() | changes)
        except OSError as error:
            raise _not_stored(error) from None

    async def _in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, *arguments)


def _check_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"jobs_dir {root} cannot be written to: {error.strerror}; name a folder that can be"
        ) from None


def _load(root: Path) -> list[Job]:
    """The jobs of a folder, in the order of their making; what never became one is removed, what is
    damaged or another version's is set aside."""
    jobs = []
    for folder in root.glob("job-*"):
        try:
            job = _load_job(Spool(folder))
        except OSError as error:  # which may pass
            logger.error("%s cannot be read, and stays as it is: %s", folder, error)
        except (ValueError, RecursionError) as error:
            logger.error("%s is no job of this version; it is set aside: %s", folder, _line(error))
            with contextlib.suppress(OSError):
                folder.rename(root / f"damaged-{folder.name}")
        else:
            jobs += [job] if job is not None else []
    return sorted(jobs, key=lambda job: job.created)


def _load_job(spool: Spool) -> Job | None:
    about = spool.about()
    if about is None:
        spool.remove()
        return None
    job = Job(**About.model_validate(about).model_dump(), spool=spool)
    if job.id != spool.folder.name:
        raise ValueError(f"its id is {job.id!r}")
    if job.state not in ENDED:
        job.total = spool.count()
    job.failed = spool.failures()
    return job


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_open(job: Job) -> None:
    if job.state != "open":
        raise RequestError(
            "the job was started, or has ended; make another one", code="job_not_open"
        )


def _check_disk(folder: Path) -> None:
    if shutil.disk_usage(folder).free < _FREE_BYTES:
        raise NotReady("the disk for jobs is nearly full; come back later", code="disk_full")


def _waits_for(error: Exception) -> str:
    if is_disk_full(error):
        return "the service's disk is full; the job goes on when there is room"
    return (
        "the collection, or the job's own folder, could not be read or written; the server's log"
        " says why, and the job is tried again"
    )


def _not_stored(error: OSError) -> NotReady:
    logger.error("a job was not stored: %s", error)
    code = "disk_full" if is_disk_full(error) else None
    return NotReady("the job could not be stored; the server's log says why", code=code)
