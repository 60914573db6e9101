"""Jobs: any number of items that are stored while nobody waits, or while somebody follows."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from clipserve.client.batches import Errors, Progress, named
from clipserve.client.calls import Calls, Item, encode_item, error_of
from clipserve.client.transport import address
from clipserve.errors import RequestRefused, ServiceError, ServiceFailed

_ENDED = ("done", "failed", "cancelled")
_FAILED_TOLD = 1000
"""items that the service names at most"""


class JobCalls(Calls):
    """Work that the service does by itself."""

    async def start_job(
        self, collection: str, items: Iterable[Item], *, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Store any number of items without waiting for it; `follow_job` does, `job` says how far
        it is.

        Items are given as to `upsert`. They are on the service's disk when this returns; `progress`
        is told how many are. A broken connection does not send them twice: the job says what it
        has.
        """
        # Not idempotent, but an empty job that nobody knows of does nothing and is forgotten.
        job = await self._read("POST", "/v1/jobs", {"collection": collection, "start": False})
        try:
            send = self._appender(job["id"])
            await self._one_by_one.run(items, encode_item, send, progress=progress)
            return await self._begin(job["id"])
        except BaseException as error:
            await self._withdraw(job["id"], error)
            raise

    async def follow_job(
        self,
        id: str,
        *,
        errors: Errors | None = None,
        progress: Progress | None = None,
        every_s: float = 1.0,
    ) -> dict[str, Any]:
        """Wait until a job is done, asking for it every so often; returns it.

        Raises ServiceFailed if it fails, RequestRefused if it is cancelled. Of its items that could
        not be stored, `errors` gets the first 1000, by their places.
        """
        while True:
            job = await self.job(id, failed=0)
            if progress is not None:
                progress(job["done"], job["total"])
            if job["state"] in _ENDED:
                break
            await self._transport.pause(every_s)
        if job["state"] == "failed":
            raise ServiceFailed(f"job {id} failed: {job['error']}", code="job_failed")
        if job["state"] == "cancelled":
            done = f"after {job['done']} of {job['total']} items"
            raise RequestRefused(f"job {id} was cancelled {done}", code="job_cancelled")
        job = await self.job(id, failed=_FAILED_TOLD)
        _take_errors(job, errors)
        return job

    async def job(self, id: str, *, failed: int = 100) -> dict[str, Any]:
        """How far a job is: `state`, `done` of `total`, and the first items that `failed`."""
        return await self._read("GET", f"{address('jobs', id)}?failed={failed}")

    async def jobs(self) -> list[dict[str, Any]]:
        """Every job that is known."""
        return await self._list("/v1/jobs")

    async def cancel_job(self, id: str) -> dict[str, Any]:
        """Stop a job; what it stored stays. One that has ended is forgotten."""
        return await self._read("DELETE", address("jobs", id), idempotent=False)

    def _appender(self, id: str) -> Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]:
        total = 0

        async def look() -> dict[str, Any] | None:
            job = await self.job(id, failed=0)
            return job if job["total"] > total else None

        async def send(encoded: Sequence[Any]) -> list[Any]:
            nonlocal total
            await self._call("POST", address("jobs", id) + ":append", lines=encoded, look=look)
            total += len(encoded)
            return [True] * len(encoded)

        return send

    async def _begin(self, id: str) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            job = await self.job(id, failed=0)
            return job if job["state"] != "open" else None

        begun: dict[str, Any] = await self._call("POST", address("jobs", id) + ":start", look=look)
        return begun

    async def _withdraw(self, id: str, error: BaseException) -> None:
        """The job shall not be; that it cannot be withdrawn does not hide why."""
        try:
            await self._read("DELETE", address("jobs", id))
        except ServiceError as other:
            error.add_note(f"the job {id} is left: {other}")


def _take_errors(job: dict[str, Any], errors: Errors | None) -> None:
    for one in job["failed"]:
        cause = error_of(one)
        assert cause is not None
        error = named(cause, one["index"])
        if errors is None:
            raise error
        errors[one["index"]] = error
