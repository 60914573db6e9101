"""A new checkpoint in the place of a model that serves, without a failed request.

The new model is loaded and warmed up beside the old one, and takes its name in one step on the
event loop. Requests that hold the old one finish on it; its thread ends when the last of them, and
the last collection that needs it, is gone. Start at `Reloader.reload`.
"""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from clipserve.checkpoint import load, pin, verify
from clipserve.embed import INT8, precision
from clipserve.errors import ConfigError
from clipserve.model import Model
from service.served import ServedCollection, ServedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReloadResult:
    """What a reload changed."""

    old_fingerprint: str
    new_fingerprint: str
    collections_kept: list[str]
    """made by the model that now has the name; some may have been unavailable without it"""
    collections_stale: list[str]
    """still searched with the old model, which stays loaded for them"""


class Shelf(Protocol):
    """What a reload needs of the registry."""

    models: dict[str, ServedModel]
    collections: dict[str, ServedCollection]

    def model(self, name: str | None) -> ServedModel: ...

    def model_of(self, fingerprint: str) -> ServedModel | None: ...

    def prepare(self, model: Model, name: str, path: Path | None) -> ServedModel: ...

    async def serve_again(self, model: ServedModel) -> list[str]: ...


class Reloader:
    """Reloads models of one registry, one at a time: two at once would need the memory of both."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._lock = asyncio.Lock()

    async def reload(self, name: str, path: Path | None) -> ReloadResult:
        """See `Registry.reload`. Once begun it ends, whoever stops waiting for it."""
        await self._lock.acquire()
        # It holds the lock: a cancelled request cannot stop the thread, which goes on loading.
        task = asyncio.create_task(self._load_and_swap(name, path))
        task.add_done_callback(lambda _: self._lock.release())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def _load_and_swap(self, name: str, path: Path | None) -> ReloadResult:
        old = self._shelf.model(name)
        place = path or old.path
        if place is None:
            raise ConfigError(f"model {name!r} was not loaded from a directory; say which to load")
        new = await asyncio.to_thread(self._load, old, place)
        result = self._swap(old, new)
        if path is not None:
            logger.warning(
                "model %r is that of %s until the service is restarted, which loads the model it"
                " was started with; collections of this one would then be unavailable",
                name,
                path,
            )
        again = await self._shelf.serve_again(new)
        return replace(result, collections_kept=[*result.collections_kept, *again])

    def _load(self, old: ServedModel, path: Path) -> ServedModel:
        """On the old one's device and in its dtype; if this fails, what was made of the new one is
        dropped."""
        model = load_checked(path, str(old.model.device), _dtype_asked(old.model))
        other = self._shelf.model_of(model.info.fingerprint or "")
        if other is not None and other is not old:
            raise ConfigError(f"{path} is served already, as {other.name!r}")
        served = self._shelf.prepare(model, old.name, path)
        served.pipeline.warm_up()
        return served

    def _swap(self, old: ServedModel, new: ServedModel) -> ReloadResult:
        """Without an await, so that no request sees half of it."""
        self._shelf.models[old.name] = new
        kept, stale = [], []
        for name, collection in _collections_named(self._shelf.collections, new.name).items():
            if collection.model.fingerprint == new.fingerprint:
                collection.model, collection.stale = new, False
                kept.append(name)
            else:
                collection.stale = True
                stale.append(name)
        logger.info(
            "model %r: %s replaces %s; collections that stay with their old model: %s",
            new.name,
            new.fingerprint[:12],
            old.fingerprint[:12],
            ", ".join(stale) or "none",
        )
        return ReloadResult(old.fingerprint, new.fingerprint, kept, stale)


def load_checked(path: Path, device: str = "auto", dtype: str = "auto") -> Model:
    """`checkpoint.load`, while another thread compares every byte with its checksum, a second for
    half a gigabyte. CheckpointError says what the checksums say before anything else. Of a link
    that moves meanwhile, both read what it led to at first."""
    path = pin(path)
    with ThreadPoolExecutor(1, "verify") as pool:
        checked = pool.submit(verify, path)
        try:
            return load(path, device, dtype, verify=False)
        finally:
            checked.result()


def _dtype_asked(model: Model) -> str:
    """What it was loaded with: "auto" if it was measured, for another checkpoint is another
    measurement. Where "auto" measures nothing it comes to the same dtype again."""
    name = precision(model)
    return "auto" if name != INT8 and model.fp32_cosine is not None else name


def _log_failure(task: "asyncio.Task[ReloadResult]") -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("a reload that nobody waited for any more failed: %s", error)


def _collections_named(
    collections: Mapping[str, ServedCollection], model_name: str
) -> dict[str, ServedCollection]:
    """Those of any model that has, or had, this name."""
    return {n: served for n, served in collections.items() if served.model.name == model_name}
