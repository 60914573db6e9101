"""Prometheus metrics, in a registry of their own per service.

Labels are names of ours: routes by their template, models, kinds, stages, error codes, never what a
client sent, so the number of series is bounded. Models report through `ModelObserver`.
"""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.batching import Cached, Kind
from service.tracing import Tracing

_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_COUNTERS = {
    "requests": ("Requests", ("route", "method", "status")),
    "rejected": ("Requests answered with an error, by its code", ("reason",)),
    "model_restarts": ("Deaths of a model's thread", ("model",)),
    "cache_hits": ("Vectors and class heads that were there, or on their way", ("model", "kind")),
    "cache_misses": ("Vectors and class heads that had to be computed", ("model", "kind")),
}
_HISTOGRAMS = {
    "request_seconds": ("Time to answer a request", ("route",), _SECONDS),
    "batch_size": ("Items the model took at once", ("model", "kind"), _SIZES),
    "batch_seconds": ("Time the model took for a batch", ("model", "kind"), _SECONDS),
    "queue_seconds": ("Wait of a batch's oldest prepared item", ("model", "kind"), _SECONDS),
    "stage_seconds": ("Time of a step before the queue", ("model", "kind", "stage"), _SECONDS),
    "padding_share": ("Share of a batch of texts that is padding", ("model",), _SHARES),
}
_GAUGES = {
    "queue_items": ("Pictures and texts admitted and not answered", ("model",)),
    "inflight_requests": ("Requests being served", ()),
    "inflight_bytes": ("Bytes that requests being served hold", ()),
}


class Telemetry:
    """All metrics of one service, and its tracing if there is any."""

    def __init__(self) -> None:
        self.tracing: Tracing | None = None
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"clipserve_{name}", text, labels, registry=self._registry)
            for name, (text, labels) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(
                f"clipserve_{name}", text, labels, buckets=buckets, registry=self._registry
            )
            for name, (text, labels, buckets) in _HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(f"clipserve_{name}", text, labels, registry=self._registry)
            for name, (text, labels) in _GAUGES.items()
        }

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self.count("requests", route, method, str(status))
        self.observe("request_seconds", seconds, route)

    def rejected(self, reason: str) -> None:
        self.count("rejected", reason)

    def count(self, name: str, *labels: str) -> None:
        """Add one to one of `_COUNTERS`."""
        self._counters[name].labels(*labels).inc()

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add to one of `_HISTOGRAMS`."""
        self._histograms[name].labels(*labels).observe(value)

    def observe_model(self, name: str) -> "ModelObserver":
        """What the batcher and the pipeline of a model report to."""
        return ModelObserver(self, name)

    def watch_queue(self, name: str, depth: Callable[[], float]) -> None:
        self._gauges["queue_items"].labels(name).set_function(depth)

    def watch_load(self, requests: Callable[[], float], size: Callable[[], float]) -> None:
        """What is being served, asked for whenever somebody scrapes."""
        self._gauges["inflight_requests"].set_function(requests)
        self._gauges["inflight_bytes"].set_function(size)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class ModelObserver:
    """The metrics of one model; a `batching.Observer`."""

    def __init__(self, telemetry: Telemetry, name: str) -> None:
        self._telemetry = telemetry
        self._name = name

    def batch(self, kind: Kind, size: int, seconds: float, waited_s: float) -> None:
        """A batch that just ended; `waited_s`: its oldest item, from prepared to begun."""
        values = {"batch_size": size, "batch_seconds": seconds, "queue_seconds": waited_s}
        for name, value in values.items():
            self._telemetry.observe(name, value, self._name, kind)
        if self._telemetry.tracing is not None:
            self._telemetry.tracing.batch(self._name, kind, size, time.time() - seconds, seconds)

    def padding(self, fraction: float) -> None:
        self._telemetry.observe("padding_share", fraction, self._name)

    def stage(self, name: str, kind: Kind, seconds: float) -> None:
        self._telemetry.observe("stage_seconds", seconds, self._name, kind, name)

    def cache_hit(self, kind: Cached) -> None:
        self._telemetry.count("cache_hits", self._name, kind)

    def cache_miss(self, kind: Cached) -> None:
        self._telemetry.count("cache_misses", self._name, kind)

    def restart(self) -> None:
        self._telemetry.count("model_restarts", self._name)
