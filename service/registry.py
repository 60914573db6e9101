"""What is served: models by name, collections by name, each collection bound to its model.

Filled before the service starts (`add_model`, then `add_collection`), read by the routes. A
collection whose model is not loaded is refused. It owns the thread pools and the metrics.

Legend: C classes, M templates, E embedding.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.model import Model
from clipserve.prompts import ClassHead, fill, head_from_prompts, load_templates
from index.collection import Collection
from index.database import is_writable
from index.maintain import Maintainer
from index.search import Searcher
from service.errors import Forbidden, NotFound, RequestError
from service.heads import HeadCache
from service.inputs import Text
from service.pipeline import Pipeline
from service.settings import Settings
from service.telemetry import Telemetry

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ServedModel:
    """A model, its queue, and the heads made from it."""

    def __init__(
        self, model: Model, name: str, pipeline: Pipeline, heads: HeadCache, settings: Settings
    ) -> None:
        assert model.info.fingerprint is not None
        self.model = model
        self.name = name
        self.fingerprint = model.info.fingerprint
        self.pipeline = pipeline
        self._heads = heads
        self._settings = settings

    async def head(self, labels: tuple[str, ...], templates: str | tuple[str, ...]) -> ClassHead:
        """The classifier over checked labels and templates, as `model.zero_shot` makes it."""
        sets = tuple(load_templates(templates)) if isinstance(templates, str) else templates
        count, limit = len(labels) * len(sets), self._settings.max_prompts
        if count > limit:
            raise RequestError(
                f"{len(labels)} labels in {len(sets)} templates are {count} texts; at most {limit}"
                " are allowed in one request",
                param="labels",
                code="too_many_items",
            )
        key = (self.fingerprint, labels, sets)
        return await self._heads.get(key, lambda: self._build_head(labels, sets))

    async def _build_head(self, labels: tuple[str, ...], sets: tuple[str, ...]) -> ClassHead:
        """Through the queue, in pieces, so that other requests get their turn in between."""
        prompts = [Text(fill(template, label)) for label in labels for template in sets]
        parts = []
        for start in range(0, len(prompts), self._settings.max_text_batch):
            piece = prompts[start : start + self._settings.max_text_batch]
            parts.append((await self.pipeline.embed(piece)).rows())
        return head_from_prompts(self.model, labels, np.concatenate(parts))


class ServedCollection:
    """An open collection and the model that made its vectors."""

    def __init__(self, searcher: Searcher, model: ServedModel, settings: Settings) -> None:
        self.searcher = searcher
        self.collection: Collection = searcher.collection
        self.name = searcher.collection.name
        self.model = model
        self._read_only = settings.read_only
        self._running = contextlib.ExitStack()
        if settings.rebuild_indexes and is_writable(searcher.collection.path):
            self._running.enter_context(Maintainer(searcher))

    def check_writable(self) -> None:
        """Forbidden if the settings allow no changes."""
        if self._read_only:
            raise Forbidden("this service does not change collections; unset CLIPSERVE_READ_ONLY")

    def close(self) -> None:
        """Nobody may be searching any more."""
        self._running.close()
        self.searcher.close()


class Registry:
    """All that one service serves. Close it after use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.models: dict[str, ServedModel] = {}
        self.collections: dict[str, ServedCollection] = {}
        self.pool = ThreadPoolExecutor(settings.decode_threads, "decode")
        self._store = ThreadPoolExecutor(settings.search_threads, "search")
        self._heads = HeadCache(settings.max_cached_labels)

    def add_model(self, model: Model) -> ServedModel:
        """Serve a saved model under its own name; a second of that name gets `@fingerprint`.

        ConfigError for a model that was never saved, or is served already.
        """
        fingerprint = model.info.fingerprint
        if fingerprint is None:
            raise ConfigError("a model without a fingerprint cannot be served; save it first")
        if self._model_of(fingerprint) is not None:
            raise ConfigError(
                f"model {model.info.name!r} with fingerprint {fingerprint[:12]} is given twice;"
                " name it once"
            )
        name = model.info.name
        if name in self.models:
            name = f"{name}@{fingerprint[:12]}"
        observer = self.telemetry.observe_model(name)
        pipeline = Pipeline(model, self.settings, self.pool, observer, name)
        self.telemetry.watch_queue(name, lambda: pipeline.batcher.open_items)
        served = ServedModel(model, name, pipeline, self._heads, self.settings)
        self.models[name] = served
        return served

    def add_collection(self, path: Path) -> ServedCollection:
        """Open a collection for search; its model must have been added.

        IndexStoreError if that model is not served, or the collection cannot be read; ConfigError
        if another collection has its name.
        """
        with Collection.open(path, read_only=True) as collection:
            name, fingerprint = collection.name, collection.fingerprint
            model = self._model_of(fingerprint)
            if model is None:
                served = ", ".join(f"{m.name} ({m.fingerprint[:12]})" for m in self.models.values())
                raise IndexStoreError(
                    f"collection {name!r} was made by model {collection.model_name!r} with"
                    f" fingerprint {fingerprint[:12]}, which is not served; served:"
                    f" {served or 'none'}; serve that model too, or embed the collection anew:"
                    " clipserve embed MODEL SOURCE --collection NEW_DIR"
                )
        if name in self.collections:
            raise ConfigError(f"two collections are called {name!r}; rename a directory")
        searcher = Searcher(path, fingerprint=fingerprint)
        self.collections[name] = ServedCollection(searcher, model, self.settings)
        return self.collections[name]

    def model(self, name: str | None) -> ServedModel:
        """By name, or the first one. NotFound lists the known."""
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models) or "none"
            raise NotFound(
                f"no such model; served here: {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    def collection(self, name: str | None) -> ServedCollection:
        """By name, or the only one. NotFound lists the known."""
        if name is None and len(self.collections) == 1:
            return next(iter(self.collections.values()))
        if name not in self.collections:
            known = ", ".join(self.collections) or "none"
            raise NotFound(
                f"{'name a collection' if name is None else 'no such collection'}; served here:"
                f" {known}",
                param="collection",
                code="collection_not_found",
            )
        return self.collections[name]

    async def in_store(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a search or a write in its own pool, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._store, function, *arguments)

    def close(self) -> None:
        """Stop every thread, then close the collections."""
        self.pool.shutdown(cancel_futures=True)
        self._store.shutdown(cancel_futures=True)
        for served in self.models.values():
            served.pipeline.close()
        for collection in self.collections.values():
            collection.close()

    def _model_of(self, fingerprint: str) -> ServedModel | None:
        served: Sequence[ServedModel] = list(self.models.values())
        return next((model for model in served if model.fingerprint == fingerprint), None)
