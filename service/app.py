"""The service, put together: `create_app` for an ASGI server or a test, `serve` for the command.

`create_app` takes a registry that is filled already; who made it closes it.
"""

import gc
import logging
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from clipserve import __version__
from clipserve.checkpoint import read_description
from clipserve.embed import resolve_device, resolve_dtype
from clipserve.errors import ConfigError
from index.collection import DATABASE
from service.auth import Authenticate, Browsers, check_exposure
from service.compat import ROUTERS
from service.drain import Gate, Lifecycle
from service.errors import install_handlers
from service.fetch import Fetcher
from service.jobs import Jobs
from service.keys import Keys
from service.label_sets import load_label_sets
from service.limits import Load, RequestLimits
from service.logs import ObserveRequests
from service.rate import RateLimit
from service.registry import DROPPED, Registry
from service.routes import (
    classify,
    collections,
    docs,
    embeddings,
    health,
    items,
    jobs,
    match,
    models,
    page,
    search,
)
from service.schemas import body_schemas
from service.server import Server, listen
from service.settings import Settings, wants_tracing
from service.tracing import Tracing, start_tracing

logger = logging.getLogger(__name__)

_ROUTES = (
    embeddings,
    classify,
    match,
    search,
    collections,
    items,
    jobs,
    models,
    health,
    page,
    docs,
)


def create_app(
    settings: Settings, registry: Registry, lifecycle: Lifecycle | None = None
) -> FastAPI:
    """The ASGI application over what the registry serves."""
    app = FastAPI(
        title="clipserve",
        version=__version__,
        description="Embeddings, zero-shot classification and search with one image-text model.",
        openapi_url=None,  # docs.py has our own, and a page without scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # items/.. of a collection is collection/ to many a client
    )
    lifecycle = lifecycle or Lifecycle()
    registry.fetcher = Fetcher(settings) if settings.allow_fetch else None
    app.state.registry = registry
    app.state.has_keys = settings.api_keys_file is not None
    app.state.label_sets = load_label_sets(settings.label_sets, settings.max_labels)
    app.state.jobs = Jobs(registry)
    app.state.readiness = health.Readiness(registry, lifecycle)
    for router in (*(module.router for module in _ROUTES), *ROUTERS):
        app.include_router(router)
    install_handlers(app)
    _add_middleware(app, settings, registry, lifecycle)
    _document(app)
    return app


def serve(
    model_paths: Sequence[Path], collection_paths: Sequence[Path], settings: Settings
) -> None:
    """Listen, load everything, answer until SIGTERM or SIGINT.

    ConfigError if the port is taken, others could come in without a key, or the device is not here,
    CheckpointError if a path is no model directory: known before anything is loaded.
    CheckpointError, ConfigError and IndexStoreError for what cannot be served.
    """
    if not model_paths:
        raise ConfigError("no model is given; name at least one model directory")
    check_exposure(settings)
    resolve_dtype(settings.dtype, resolve_device(settings.device))
    with listen(settings.host, settings.port) as listener:
        for path in model_paths:
            read_description(path)
        registry = Registry(settings)
        tracing = start_tracing() if wants_tracing() else None
        registry.telemetry.tracing = tracing
        lifecycle = Lifecycle("loading")

        app = create_app(settings, registry, lifecycle)
        server = Server(
            app,
            settings,
            lifecycle,
            load=lambda: _fill(registry, model_paths, collection_paths),
            say_ready=lambda: _say_ready(app, registry, listener),
            close=lambda: _close(registry, tracing),
        )
        server.run_until_signal(listener)
        if server.failure is not None:
            raise server.failure


def _add_middleware(
    app: FastAPI, settings: Settings, registry: Registry, lifecycle: Lifecycle
) -> None:
    """What a request passes before any route, here from the inside out."""
    keys = None if settings.api_keys_file is None else Keys(settings.api_keys_file)
    held = Load(settings)
    registry.telemetry.watch_load(lambda: held.requests, lambda: held.bytes)
    app.add_middleware(RequestLimits, settings=settings, load=held, check_room=registry.check_room)
    app.add_middleware(
        Authenticate,
        keys=keys,
        rate=RateLimit(settings.rate_limit_per_minute),
        browsers=Browsers(settings),
    )
    app.add_middleware(Gate, lifecycle=lifecycle)
    if settings.cors_origins:  # a browser's question beforehand comes without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(ObserveRequests, telemetry=registry.telemetry)


def _fill(registry: Registry, models: Sequence[Path], collections: Sequence[Path]) -> None:
    gc.freeze()  # what was imported is no garbage; without this each full collection looks it over
    for path in models:
        registry.load_model(path)
    for path in collections:
        registry.find_collection(path, is_named=True)
    for path in _find_collections(registry.settings, collections):
        registry.find_collection(path)


def _close(registry: Registry, tracing: Tracing | None) -> None:
    try:
        registry.close()
        if registry.fetcher is not None:
            registry.fetcher.close()
    finally:
        if tracing is not None:
            tracing.close()


def _say_ready(app: FastAPI, registry: Registry, listener: socket.socket) -> None:
    app.state.jobs.resume()
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info(
        "ready at %s with models: %s; collections: %s%s",
        address,
        ", ".join(f"{m.name} ({m.fingerprint[:12]})" for m in registry.models.values()),
        ", ".join(registry.collections) or "none",
        "; unavailable: " + ", ".join(registry.unavailable) if registry.unavailable else "",
    )


def _find_collections(settings: Settings, named: Sequence[Path]) -> list[Path]:
    """The collections below `collections_root` that are not named already."""
    root = settings.collections_root
    if root is None:
        return []
    if not root.is_dir():
        raise ConfigError(f"collections_root {root} is not a directory")
    for left in [] if settings.read_only else root.glob(f"{DROPPED}*"):  # a drop was cut short
        shutil.rmtree(left, ignore_errors=True)
    known = {path.resolve() for path in named}
    found = sorted(file.parent for file in root.glob(f"*/{DATABASE}"))
    return [path for path in found if path.resolve() not in known and path.name[0] != "."]


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
