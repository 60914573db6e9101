"""/v1/jobs: many items stored without waiting for it. `service/jobs.py` does the work."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from starlette.responses import Response

from service.auth import require
from service.bodies import content_type, read_json
from service.errors import UnsupportedBody
from service.jobs import Jobs
from service.replies import reply
from service.routes.state import ServedJobs, ServedRegistry
from service.schemas import JobRequest, UpsertItem, request_docs

NDJSON = "application/x-ndjson"


@contextlib.asynccontextmanager
async def _work(app: FastAPI) -> AsyncIterator[None]:
    """Jobs are worked on for as long as the app runs, once there are models to do it with."""
    jobs: Jobs = app.state.jobs
    await jobs.start()
    if app.state.registry.models:
        jobs.resume()
    try:
        yield
    finally:
        await jobs.close()


router = APIRouter(tags=["jobs"], lifespan=_work)
_WRITE = [Depends(require("write"))]


@router.post(
    "/v1/jobs",
    status_code=202,
    dependencies=_WRITE,
    openapi_extra=request_docs(JobRequest, also=(NDJSON,)),
)
async def create(
    request: Request,
    jobs: ServedJobs,
    registry: ServedRegistry,
    collection: str | None = None,
    start: bool = True,
) -> Response:
    """Take items in, and answer when they are on disk, not when they are stored.

    As JSON, or as NDJSON with an item a line and `collection` and `start` in the query; with
    `start=false` further requests may append to the job. An item that cannot be stored is named in
    the job's `failed`; of items with one id the last one stays.
    """
    if content_type(request) == NDJSON:
        chunks: AsyncIterator[bytes] = request.stream()
    else:
        body = await read_json(request, JobRequest)
        collection, start = body.collection or collection, body.start and start
        loop = asyncio.get_running_loop()
        chunks = _once(await loop.run_in_executor(registry.pool, _write_lines, body.items))
    job = await jobs.create(collection)
    try:
        await jobs.append(job, chunks)
        if start:
            await jobs.begin(job)
    except BaseException:
        await jobs.discard(job)
        raise
    return reply(job.describe(), status=202)


@router.post(
    "/v1/jobs/{id}:append",
    dependencies=_WRITE,
    openapi_extra={"requestBody": {"required": True, "content": {NDJSON: {"schema": {}}}}},
)
async def append(id: str, request: Request, jobs: ServedJobs) -> Response:
    """Add lines of NDJSON to a job that was not started; they are on disk when this answers."""
    if content_type(request) != NDJSON:
        raise UnsupportedBody(f"send lines of JSON, with the header Content-Type: {NDJSON}")
    job = jobs.get(id)
    appended = await jobs.append(job, request.stream())
    return reply({**job.describe(), "appended": appended})


@router.post("/v1/jobs/{id}:start", status_code=202, dependencies=_WRITE)
async def start(id: str, jobs: ServedJobs) -> Response:
    """Work on the job when the jobs of its collection before it are done."""
    job = jobs.get(id)
    await jobs.begin(job)
    return reply(job.describe(), status=202)


@router.get("/v1/jobs")
async def all_jobs(jobs: ServedJobs) -> Response:
    """Every job that is known, without the items that failed."""
    data = [{**job.describe(), "failed": []} for job in jobs.all()]
    return reply({"object": "list", "data": data})


@router.get("/v1/jobs/{id}")
async def job(
    id: str, jobs: ServedJobs, failed: Annotated[int, Query(ge=0, le=1000)] = 100
) -> Response:
    """How far a job is, and the first `failed` items that could not be stored."""
    described = jobs.get(id).describe()
    return reply({**described, "failed": described["failed"][:failed]})


@router.delete("/v1/jobs/{id}", dependencies=_WRITE)
async def cancel(id: str, jobs: ServedJobs) -> Response:
    """Stop a job; what it stored stays. A job that has ended is forgotten."""
    job = jobs.get(id)
    await jobs.cancel(job)
    return reply(job.describe())


def _write_lines(items: Sequence[UpsertItem]) -> bytes:
    # By json, which keeps a NaN for the job to refuse, where pydantic would write null.
    return "\n".join(json.dumps(item.model_dump(exclude_unset=True)) for item in items).encode()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
