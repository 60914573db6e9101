"""The service, put together: `create_app` for an ASGI server or a test, `serve` for the command.

`create_app` takes a registry that is filled already; who made it closes it.
"""

import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from clipserve import __version__
from clipserve.checkpoint import load
from clipserve.errors import ConfigError
from index.collection import DATABASE
from service.errors import install_handlers
from service.limits import RequestLimits
from service.registry import Registry
from service.routes import classify, collections, embeddings, health, models, page, search
from service.schemas import body_schemas
from service.settings import Settings
from service.telemetry import CountRequests

logger = logging.getLogger(__name__)

_ROUTES = (embeddings, classify, search, collections, models, health, page)


def create_app(settings: Settings, registry: Registry) -> FastAPI:
    """The ASGI application over what the registry serves."""
    app = FastAPI(
        title="clipserve",
        version=__version__,
        description="Embeddings, zero-shot classification and search with one image-text model.",
        redoc_url=None,
    )
    app.state.registry = registry
    app.state.readiness = health.Readiness(registry)
    for module in _ROUTES:
        app.include_router(module.router)
    install_handlers(app)
    app.add_middleware(RequestLimits, settings=settings)
    app.add_middleware(CountRequests, telemetry=registry.telemetry)  # outermost: counts all
    _document(app)
    return app


def serve(
    model_paths: Sequence[Path], collection_paths: Sequence[Path], settings: Settings
) -> None:
    """Load everything, then answer until SIGTERM or SIGINT.

    ConfigError if the port is taken (known before a model is loaded), CheckpointError and
    IndexStoreError for what cannot be served.
    """
    if not model_paths:
        raise ConfigError("no model is given; name at least one model directory")
    with _bind(settings.host, settings.port) as listener:
        registry = Registry(settings)
        try:
            for path in model_paths:
                registry.add_model(load(path)).pipeline.warm_up()
            for path in [*collection_paths, *_find_collections(settings, collection_paths)]:
                registry.add_collection(path)
            _run(_Server(settings, registry), listener)
        finally:
            registry.close()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Until a signal; uvicorn raises it again when all is done, which shall end in code 0."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn, which says where it listens when everything is ready."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        config = uvicorn.Config(
            create_app(settings, registry),
            log_config=None,  # the command line sets logging up
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=round(settings.shutdown_timeout_s) or 1,
        )
        super().__init__(config)
        self._registry = registry

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            logger.info(
                "ready at %s with models: %s; collections: %s",
                address,
                ", ".join(
                    f"{m.name} ({m.fingerprint[:12]})" for m in self._registry.models.values()
                ),
                ", ".join(self._registry.collections) or "none",
            )


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError says why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named, or asyncio sets no TCP_NODELAY and every answer takes 40 ms more.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r} cannot be listened on: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or give"
            " another --port"
        ) from None
    return listener


def _find_collections(settings: Settings, named: Sequence[Path]) -> list[Path]:
    """The collections below `collections_root` that are not named already."""
    root = settings.collections_root
    if root is None:
        return []
    if not root.is_dir():
        raise ConfigError(f"collections_root {root} is not a directory")
    known = {path.resolve() for path in named}
    found = sorted(file.parent for file in root.glob(f"*/{DATABASE}"))
    return [path for path in found if path.resolve() not in known]


def _document(app: FastAPI) -> None:
    """Add the bodies that routes read themselves to /openapi.json."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(body_schemas())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
