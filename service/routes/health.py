"""/health and /metrics, for probes and scrapers.

Live means that the process answers, whatever its models do. Ready means that a text and a picture
went the way of all others, through every model, and came back in time, and that the threads for
bodies and collections get on; not while models load, nor on the way out.
"""

import asyncio
import base64
import logging
import time
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from service.drain import Lifecycle
from service.errors import NotReady, RequestError
from service.inputs import Input, Picture, Text
from service.registry import Registry, ServedModel
from service.replies import reply
from service.routes.state import ServedRegistry

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"])

_FRESH_S = 1.0
_CANARY = base64.b64decode(  # a PNG of one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


class Readiness:
    """The last canary's word; however many probes ask, one canary a second runs."""

    def __init__(self, registry: Registry, lifecycle: Lifecycle) -> None:
        self._registry = registry
        self._lifecycle = lifecycle
        self._lock = asyncio.Lock()
        self._checked_s = -_FRESH_S
        self._error: NotReady | None = None

    async def check(self) -> None:
        """NotReady while models load, on the way out, and if a model does not answer or threads
        hang."""
        self._lifecycle.check()
        async with self._lock:
            if time.monotonic() - self._checked_s >= _FRESH_S:
                self._error = await self._run()
                self._checked_s = time.monotonic()
        self._lifecycle.check()
        if self._error is not None:
            raise NotReady(str(self._error))

    async def _run(self) -> NotReady | None:
        if not self._registry.models:
            return NotReady("no model is served")
        for served in self._registry.all_models():
            try:
                async with asyncio.timeout(self._registry.settings.ready_timeout_s):
                    await _canary(served)
            except (RequestError, TimeoutError) as error:
                logger.warning("%s is not ready: %s", served.name, str(error) or "timed out")
                return NotReady(f"model {served.name!r} does not answer")
        try:
            await self._registry.check_threads()
        except NotReady as error:
            return error
        return None


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request, registry: ServedRegistry) -> Response:
    """The process answers, and serves these models; strangers are not told which."""
    content: dict[str, Any] = {"status": "ok", "unix": time.time()}
    if request.app.state.has_keys:
        return reply(content)
    models = [
        {"name": served.name, "fingerprint": served.fingerprint}
        for served in list(registry.models.values())  # which a thread fills while they load
    ]
    return reply({**content, "models": models})


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> Response:
    """The process answers."""
    return reply({"status": "live"})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """503 unless every model answers a canary, and other threads get on, in time."""
    readiness: Readiness = request.app.state.readiness
    await readiness.check()
    return reply({"status": "ready"})


@router.get("/metrics")
async def metrics(registry: ServedRegistry) -> Response:
    """Prometheus' text format."""
    return Response(registry.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


async def _canary(served: ServedModel) -> None:
    inputs: list[Input] = [Text("a canary"), Picture(_CANARY)]
    answer = await served.pipeline.embed(inputs, priority="urgent")
    answer.rows()
