"""OpenTelemetry spans, a request's and a batch's, where the SDK is installed and OTEL_* asks.

The SDK reads those variables itself: where to send, under what name. Start at `start_tracing`.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)


class Tracing:
    """Spans of one service, made by an OpenTelemetry tracer provider."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("clipserve")
        self._propagate = importlib.import_module("opentelemetry.propagate")
        self._kind = importlib.import_module("opentelemetry.trace").SpanKind.SERVER

    @contextlib.contextmanager
    def request(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> Iterator[Any]:
        """The span of a request, a child of the caller's if it sent a `traceparent`."""
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        context = self._propagate.extract(sent)
        with self._tracer.start_as_current_span(method, context=context, kind=self._kind) as span:
            yield span

    def batch(self, model: str, kind: str, size: int, begun_s: float, seconds: float) -> None:
        """A span of its own, for a batch holds items of many requests."""
        start = int(begun_s * 1e9)
        attributes = {"clipserve.model": model, "clipserve.kind": kind, "clipserve.size": size}
        span = self._tracer.start_span("batch", start_time=start, attributes=attributes)
        span.end(end_time=start + int(seconds * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def start_tracing() -> Tracing | None:
    """Spans to the collector that OTEL_* names; None, and a warning, without the packages."""
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        logger.warning(
            "OTEL_* is set, and OpenTelemetry is not installed, so nothing is traced; install"
            " opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http"
        )
        return None
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return Tracing(provider)
