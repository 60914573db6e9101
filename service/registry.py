"""What is served: models by name, collections by name, each collection bound to its model.

Filled before the service starts (`load_model`, then `find_collection`), read by the routes, changed
by `reload`, `create_collection` and `drop_collection` from the event loop. A collection whose model
is not loaded is not served, but listed in `unavailable`. It owns the thread pools, the caches and
the metrics.

There are three pools, so that what is quick waits for nothing slow: `pool` reads and writes large
bodies, `decoders` decode pictures, and a third one, behind `in_store`, searches and writes.
"""

import asyncio
import contextvars
import logging
import re
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from clipserve.embed import limit_threads
from clipserve.errors import ClipserveError, ConfigError
from clipserve.model import Model
from index.collection import DATABASE, Collection
from index.search import Searcher
from service.caches import Caches
from service.errors import (
    CollectionUnavailable,
    Forbidden,
    NotFound,
    NotReady,
    Overloaded,
    RequestError,
)
from service.fetch import Fetcher
from service.memory import give_back_pictures
from service.pipeline import Pipeline
from service.pool import Pool
from service.reload import Reloader, ReloadResult, load_checked
from service.served import ServedCollection as ServedCollection
from service.served import ServedModel as ServedModel
from service.settings import Settings
from service.telemetry import Telemetry
from service.threads import Threads
from service.unavailable import ModelNotServed, Unavailable

logger = logging.getLogger(__name__)
T = TypeVar("T")

DROPPED = ".dropped-"
"""what a collection's folder is called from its drop to its end"""

_BODY_THREADS = 2
_COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Registry:
    """All that one service serves. Close it after use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.fetcher: Fetcher | None = None
        self.models: dict[str, ServedModel] = {}
        self.collections: dict[str, ServedCollection] = {}
        self.unavailable: dict[str, Unavailable] = {}
        """collections that are not served: of another model, or damaged"""
        self.pool = Threads(_BODY_THREADS, "bodies")
        self.decoders = Pool(settings.decode_threads, "decode", settings.max_batch_s)
        self._store = Threads(settings.search_threads, "search")
        self._creating = asyncio.Lock()
        self._drops: set[asyncio.Task[None]] = set()
        self._watchers: list[Callable[[str, str | None], None]] = []
        self._caches = Caches(settings.text_cache_bytes, settings.image_cache_bytes)
        self._reloader = Reloader(self)
        limit_threads()
        give_back_pictures()

    def add_model(self, model: Model, path: Path | None = None) -> ServedModel:
        """Serve a saved model under its own name; a second of that name gets `@fingerprint`.

        `path` is where it can be loaded from again. ConfigError for a model that was never saved,
        or is served already.
        """
        fingerprint = model.info.fingerprint
        if fingerprint is None:
            raise ConfigError("a model without a fingerprint cannot be served; save it first")
        if self.model_of(fingerprint) is not None:
            raise ConfigError(
                f"model {model.info.name!r} with fingerprint {fingerprint[:12]} is given twice;"
                " name it once"
            )
        name = model.info.name
        if name in self.models:
            name = f"{name}@{fingerprint[:12]}"
        self.models[name] = self.prepare(model, name, path)
        # By name: after a reload it is another model's queue.
        self.telemetry.watch_queue(name, lambda: self.models[name].pipeline.batcher.open_items)
        return self.models[name]

    def load_model(self, path: Path) -> ServedModel:
        """Load, serve and warm up the model of a directory. CheckpointError, and `add_model`'s."""
        served = self.add_model(load_checked(path, self.settings.device, self.settings.dtype), path)
        served.pipeline.warm_up()
        return served

    def prepare(self, model: Model, name: str, path: Path | None) -> ServedModel:
        """A model with a queue of its own, not served yet."""
        observer = self.telemetry.observe_model(name)
        pipeline = Pipeline(model, self.settings, self.decoders, observer, name, self._caches)
        return ServedModel(model, name, pipeline, self.settings, path)

    async def reload(self, name: str, path: Path | None = None) -> ReloadResult:
        """Load the model of that name anew, from `path` or from where it was; no request fails.

        Its collections follow if the fingerprint is the same; else they stay with the old model,
        which stays loaded for them, and are stale. Raises NotFound, CheckpointError, ConfigError
        and ModelFailed, and then everything is as it was.
        """
        return await self._reloader.reload(name, path)

    def add_collection(self, path: Path) -> ServedCollection:
        """Open a collection for search; its model must have been added.

        ModelNotServed if it is not, IndexStoreError if the collection cannot be read; ConfigError
        if another collection has its name.
        """
        name = path.absolute().name
        if name in self.collections or name in self.unavailable:
            raise ConfigError(f"two collections are called {name!r}; rename a directory")
        with Collection.open(path, read_only=True) as collection:
            model = self.model_of(collection.fingerprint)
            if model is None:
                served = [f"{m.name} ({m.fingerprint[:12]})" for m in self.models.values()]
                raise ModelNotServed(collection, served)
        self.collections[name] = self._open(path, model)
        return self.collections[name]

    def find_collection(self, path: Path, *, is_named: bool = False) -> None:
        """As `add_collection`, but what cannot be served is listed as unavailable.

        What the command line names is an error as before: two that do not go together. Unless
        another checkpoint of its model is served, which the same command comes to when a link such
        as `best` has moved on.
        """
        try:
            self.add_collection(path)
        except ConfigError:
            raise
        except ModelNotServed as error:
            if is_named and not self._serves_checkpoint_of(error.found.model_name):
                raise
            self._set_aside(error.found, error)
        except Exception as error:  # whatever is wrong with it, the others are served
            if is_named:
                raise
            self._set_aside(Unavailable(path), error)

    async def create_collection(self, name: str, model_name: str | None = None) -> ServedCollection:
        """A new, empty collection below `collections_root`.

        Forbidden without that setting or in a service that changes nothing, RequestError for a name
        that is taken or could leave the folder, NotFound for an unknown model.
        """
        root = self._writable_root()
        if not _COLLECTION_NAME.fullmatch(name):
            raise RequestError(
                "a collection's name is 1 to 100 of the characters A-Z a-z 0-9 . _ - and begins"
                " with a letter or digit",
                param="name",
                code="invalid_name",
            )
        return await asyncio.shield(self._create(root / name, self.model(model_name)))

    async def drop_collection(self, name: str) -> None:
        """Remove a collection below `collections_root` from the service and from disk.

        Searches and writes under way are waited for; who comes later meets CollectionClosed. What
        cannot be dropped is served again.
        Forbidden as for `create_collection`, and for a collection that lies elsewhere; NotFound.
        """
        root = self._writable_root()
        lost = None if name in self.collections else self.unavailable.get(name)
        path = self.collection(name).collection.path if lost is None else lost.path
        if path.resolve().parent != root.resolve():
            raise Forbidden("this collection is not below CLIPSERVE_COLLECTIONS_ROOT and stays")
        if lost is None:
            drop = asyncio.create_task(self._drop(self.collections.pop(name), path))
        else:
            drop = asyncio.create_task(self._drop_unavailable(self.unavailable.pop(name)))
        self._drops.add(drop)
        drop.add_done_callback(self._drops.discard)
        await asyncio.shield(drop)

    async def survives(self, name: str, identity: str) -> bool:
        """Whether this collection is served, once a drop of it that is under way has ended."""
        while name not in self.collections and self._drops:
            await asyncio.wait(set(self._drops), return_when=asyncio.FIRST_COMPLETED)
        served = self.collections.get(name)
        return served is not None and served.is_open and served.collection.identity == identity

    async def serve_again(self, model: ServedModel) -> list[str]:
        """Open the collections that only lacked this model; returns their names."""
        names = []
        for lost in list(self.unavailable.values()):
            if lost.fingerprint == model.fingerprint and await self._serve_again(lost, model):
                names.append(lost.name)
        return names

    def watch_collections(self, notify: Callable[[str, str | None], None]) -> None:
        """Have it called, in the event loop, with the name and identity of what was made, dropped,
        or is served again; of what could never be opened the identity is not known."""
        self._watchers.append(notify)

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

    def model_of(self, fingerprint: str) -> ServedModel | None:
        """The model that made vectors of this fingerprint; None if it is not served."""
        served = list(self.models.values())
        return next((model for model in served if model.fingerprint == fingerprint), None)

    def all_models(self) -> list[ServedModel]:
        """Those that have a name, and older ones that collections are still searched with."""
        named = list(self.models.values())
        bound = [served.model for served in list(self.collections.values())]
        return list({id(served): served for served in named + bound}.values())

    def check_room(self) -> None:
        """Overloaded if no model would admit an item."""
        refusals: list[Overloaded] = []
        for served in list(self.models.values()):
            try:
                served.pipeline.batcher.check_room()
            except Overloaded as refusal:
                refusals.append(refusal)
            else:
                return
        if refusals:
            raise refusals[0]

    def collection(self, name: str | None) -> ServedCollection:
        """By name, or the only one. NotFound names none: they may say what they hold.
        CollectionUnavailable says why."""
        if name is None and len(self.collections) + len(self.unavailable) == 1:
            name = next(iter([*self.collections, *self.unavailable]))
        if name in self.unavailable:
            raise CollectionUnavailable(
                f"the collection is not served: {self.unavailable[name].reason}"
            )
        if name not in self.collections:
            raise NotFound(
                f"{'name a collection' if name is None else 'no such collection'}; GET"
                " /v1/collections lists them",
                param="collection",
                code="collection_not_found",
            )
        return self.collections[name]

    async def in_store(
        self, served: ServedCollection, function: Callable[..., T], *arguments: object
    ) -> T:
        """Run a search or a write of the collection in its own pool, off the event loop, with the
        request's notes. CollectionClosed from when it is dropped."""
        run = contextvars.copy_context().run
        future = served.admit(lambda: self._store.submit(run, function, *arguments))
        return await asyncio.wrap_future(future)

    async def searcher_of(self, served: ServedCollection, field: str) -> Searcher:
        """Over the vectors of "image" or "text". While one is opened, which reads all of them,
        other searches go on. CollectionClosed as for `in_store`."""
        future = served.searcher_of(field, self._store)
        if future.done():
            return future.result()
        return await asyncio.shield(asyncio.wrap_future(future))  # others wait for it too

    async def check_threads(self) -> None:
        """NotReady if all threads for bodies, or all for searches and writes, hang."""
        for what, threads in (("bodies", self.pool), ("searches and writes", self._store)):
            try:
                async with asyncio.timeout(self.settings.ready_timeout_s):
                    await threads.begin_next()
            except TimeoutError:
                logger.warning("not ready: no thread for %s gets free", what)
                raise NotReady(f"no thread for {what} gets free") from None

    def close(self) -> None:
        """Stop every thread, then close the collections."""
        self.pool.shutdown(cancel_futures=True)
        self.decoders.close()
        self._store.shutdown(cancel_futures=True)
        for served in self.all_models():
            served.pipeline.close()
        for collection in self.collections.values():
            collection.close()

    def _writable_root(self) -> Path:
        if self.settings.read_only:
            raise Forbidden("this service does not change collections; unset CLIPSERVE_READ_ONLY")
        if self.settings.collections_root is None:
            raise Forbidden(
                "this service makes and drops no collections; set CLIPSERVE_COLLECTIONS_ROOT to a"
                " folder for them"
            )
        return self.settings.collections_root

    async def _create(self, path: Path, model: ServedModel) -> ServedCollection:
        async with self._creating:
            if path.name in {*self.collections, *self.unavailable} or path.exists():
                raise _taken()
            loop = asyncio.get_running_loop()
            served = await loop.run_in_executor(self._store, self._make, path, model)
            self._bind(served)
            self._serve(served)
            return served

    def _make(self, path: Path, model: ServedModel) -> ServedCollection:
        try:
            path.mkdir()
        except FileExistsError:  # by another process, a moment ago
            raise _taken() from None
        try:
            Collection.create(
                path,
                fingerprint=model.fingerprint,
                model_name=model.model.info.name,  # without what a second of it is served under
                embed_dim=model.model.embed_dim,
            ).close()
            return self._open(path, model)
        except BaseException:  # the folder is ours alone
            shutil.rmtree(path, ignore_errors=True)
            raise

    def _open(self, path: Path, model: ServedModel) -> ServedCollection:
        searcher = Searcher(path, fingerprint=model.fingerprint)
        return ServedCollection(searcher, model, self.settings)

    def _serve(self, served: ServedCollection) -> None:
        self.collections[served.name] = served
        self._notify(served.name, served.collection.identity)

    def _notify(self, name: str, identity: str | None) -> None:
        for notify in self._watchers:
            notify(name, identity)

    def _serves_checkpoint_of(self, model_name: str | None) -> bool:
        return any(served.model.info.name == model_name for served in self.models.values())

    def _set_aside(self, lost: Unavailable, error: Exception) -> None:
        self.unavailable[lost.name] = lost
        unexpected = None if isinstance(error, ClipserveError | OSError) else error
        logger.error("%s is not served: %s", lost.path, error, exc_info=unexpected)

    async def _serve_again(self, lost: Unavailable, model: ServedModel) -> bool:
        loop = asyncio.get_running_loop()
        try:
            served = await loop.run_in_executor(self._store, self._open, lost.path, model)
        except Exception as error:  # it stays as it was
            logger.error("%s is still not served: %s", lost.path, error)
            return False
        if self.unavailable.get(lost.name) is not lost:  # dropped meanwhile
            await asyncio.to_thread(served.close)
            return False
        del self.unavailable[lost.name]
        self._serve(served)
        return True

    def _bind(self, served: ServedCollection) -> None:
        """To the model that has the name now: a reload may have come while it was made."""
        current = self.models[served.model.name]
        if current.fingerprint == served.model.fingerprint:
            served.model = current
        else:
            served.stale = True

    async def _drop(self, served: ServedCollection, path: Path) -> None:
        running = served.admit_no_more()
        try:
            await asyncio.to_thread(self._close_idle, served, running)
            await asyncio.to_thread(self._erase, path)
        except Exception:  # whatever it is: told to the client, who finds the collection as it was
            again = await asyncio.to_thread(self._open_again, served, path)
            self._bind(again)
            self._serve(again)
            raise
        self._notify(served.name, served.collection.identity)

    async def _drop_unavailable(self, lost: Unavailable) -> None:
        try:
            await asyncio.to_thread(self._erase, lost.path)
        except BaseException:
            self.unavailable[lost.name] = lost
            raise
        self._notify(lost.name, lost.identity)

    def _open_again(self, served: ServedCollection, path: Path) -> ServedCollection:
        """What could not be dropped; closed, if need be, so that it has its name and can be dropped
        once more."""
        try:
            return self._open(path, served.model)
        except Exception as error:
            logger.error("collection %s can neither be dropped nor served: %s", served.name, error)
            return served

    @staticmethod
    def _close_idle(served: ServedCollection, running: list[Future[Any]]) -> None:
        wait(running)
        served.close()

    @staticmethod
    def _erase(path: Path) -> None:
        aside = path.with_name(f"{DROPPED}{uuid.uuid4().hex}")
        path.rename(aside)  # the name is free at once
        try:
            (aside / DATABASE).unlink()  # without it the rest is no collection, whatever happens
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _taken() -> RequestError:
    return RequestError(
        "there is a collection of that name, or something else in its place; take another",
        param="name",
        code="collection_exists",
    )
