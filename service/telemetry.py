"""Prometheus metrics, in a registry of their own per service, and the middleware that counts.

Routes are labelled by their template, never by the requested path: the number of series is bounded.
"""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.batching import Kind

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Telemetry:
    """All metrics of one service."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "clipserve_requests", "Requests", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "clipserve_request_seconds",
            "Time to answer a request",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._queue = Gauge(
            "clipserve_queue_items",
            "Pictures and texts admitted and not answered",
            ["model"],
            registry=self._registry,
        )
        self._restarts = Counter(
            "clipserve_model_restarts",
            "Deaths of a model's thread",
            ["model"],
            registry=self._registry,
        )
        self._batches = {
            name: Histogram(
                f"clipserve_{name}",
                text,
                ["model", "kind"],
                buckets=buckets,
                registry=self._registry,
            )
            for name, text, buckets in (
                ("batch_size", "Items the model took at once", _SIZES),
                ("batch_seconds", "Time the model took for a batch", _SECONDS),
                ("queue_seconds", "Wait of a batch's oldest prepared item", _SECONDS),
            )
        }

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_model(self, name: str) -> "ModelObserver":
        """What the batcher of a model reports to."""
        return ModelObserver(self, name)

    def watch_queue(self, name: str, depth: Callable[[], float]) -> None:
        self._queue.labels(name).set_function(depth)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class ModelObserver:
    """The metrics of one model; a `batching.Observer`."""

    def __init__(self, telemetry: Telemetry, name: str) -> None:
        self._telemetry = telemetry
        self._name = name

    def batch(self, kind: Kind, size: int, seconds: float, waited_s: float) -> None:
        values = {"batch_size": size, "batch_seconds": seconds, "queue_seconds": waited_s}
        for name, value in values.items():
            self._telemetry._batches[name].labels(self._name, kind).observe(value)

    def restart(self) -> None:
        self._telemetry._restarts.labels(self._name).inc()


class CountRequests:
    """Counts and times every request, whatever becomes of it; 499 when the client left first."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499
        started = time.perf_counter()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - started
            self._telemetry.request(_route(scope), _method(scope), status, seconds)


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "none"))


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")
    return scope["method"] if scope["method"] in known else "OTHER"
