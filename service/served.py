"""A model or a collection as it is served. Start at `ServedModel`.

Legend: C classes, M templates, E embedding.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clipserve.checkpoint import MANIFEST
from clipserve.config import RerankScore
from clipserve.embed import describe_precision
from clipserve.errors import ClipserveError, CollectionClosed, ImageError
from clipserve.model import Model
from clipserve.prompts import fill, head_from_prompts, load_templates
from index.collection import Collection
from index.database import is_writable
from index.maintain import Maintainer
from index.rerank import candidates, reorder, warn_unread
from index.search import Hit, Searcher
from service.errors import Forbidden, RequestError
from service.heads import Head, HeadCache, digest
from service.inputs import Input, Picture, Text
from service.notes import without_deadline
from service.pipeline import Matched, Pipeline
from service.settings import Settings

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NAME_BYTES = 128
"""of a label as it usually is"""


class ServedModel:
    """A model, its queue, and the heads made from it. Who holds it, or its pipeline, may use it to
    the end: its thread ends when nobody does any more."""

    def __init__(
        self,
        model: Model,
        name: str,
        pipeline: Pipeline,
        settings: Settings,
        path: Path | None = None,
    ) -> None:
        assert model.info.fingerprint is not None
        self.model = model
        self.name = name
        self.fingerprint = model.info.fingerprint
        self.pipeline = pipeline
        self.path = path
        """where it was loaded from, and is loaded from again"""
        self.created = _written(path)
        """Unix time of the checkpoint, or of loading what was never on disk"""
        label_bytes = 4 * model.embed_dim + _NAME_BYTES
        self._heads = HeadCache(settings.max_cached_labels * label_bytes, pipeline.observer)
        self._settings = settings
        self._logit_scale = model.logit_scale.item()  # once: on a GPU it waits for the batch

    @property
    def precision(self) -> str:
        """What it computes in, and what was measured to choose it."""
        return describe_precision(self.model)

    async def head(self, labels: tuple[str, ...], templates: str | tuple[str, ...]) -> Head:
        """The classifier over checked labels and templates, as `model.zero_shot` makes it."""
        sets = tuple(load_templates(templates)) if isinstance(templates, str) else templates
        count, limit = len(labels) * len(sets), self._settings.max_prompts
        if count > limit:
            raise RequestError(
                f"{len(labels)} labels in {len(sets)} templates are {count} texts; at most {limit}"
                " are allowed in one request: take fewer templates, or raise CLIPSERVE_MAX_PROMPTS",
                param="labels",
                code="too_many_items",
            )
        return await self._heads.get(digest(labels, sets), lambda: self._build_head(labels, sets))

    async def match(self, images: Sequence[Input], texts: Sequence[Input]) -> Matched:
        """How likely image i and text i belong together, read jointly."""
        self.check_fusion()
        pairs = [
            (image, text)
            for image, text in zip(images, texts, strict=True)
            if isinstance(image, Picture) and isinstance(text, Text)
        ]
        if len(pairs) < len(images):
            raise RequestError("a pair is a picture and a text, in this order", param="images")
        return await self.pipeline.match(pairs)

    async def rerank(
        self,
        texts: Sequence[str],
        hits: Sequence[Sequence[Hit]],
        pictures: Mapping[str, bytes],
        *,
        k_test: int = 16,
        score: RerankScore = "matching+contrastive",
    ) -> list[list[Hit]]:
        """As `index.rerank.rerank`, from small pictures by id, through the queue: other requests
        come between, and what nobody waits for any more is not read."""
        self.check_fusion()
        found = candidates(hits, k_test)
        keys = [(row, id) for id in pictures for row in found.get(id, ())]
        kept = {id: Picture(jpeg) for id, jpeg in pictures.items()}
        pairs = [(kept[id], Text(texts[row])) for row, id in keys]
        matched = await self.pipeline.match(pairs)
        logits = {}
        for (row, id), one in zip(keys, matched.logits, strict=True):
            if isinstance(one, ImageError):
                warn_unread(id, one)
            elif isinstance(one, Exception):
                raise one
            else:
                logits[row, id] = one
        scale = self._logit_scale
        return reorder(hits, logits, k_test=k_test, score=score, logit_scale=scale)

    def check_fusion(self) -> None:
        """RequestError for a model that does not read texts and pictures together."""
        if not self.model.has_fusion:
            raise RequestError(
                "this model compares vectors and has no matching head; use an ALBEF",
                param="model",
                code="no_matching",
            )

    def check_dimensions(self, wanted: int | None, param: str) -> None:
        """RequestError unless it is the model's own number, or none is given."""
        embed_dim = self.model.embed_dim
        if wanted not in (None, embed_dim):
            raise RequestError(
                f"this model makes vectors of {embed_dim} dimensions and cannot shorten them; leave"
                f" {param} out, or give {embed_dim}",
                param=param,
            )

    async def _build_head(self, labels: tuple[str, ...], sets: tuple[str, ...]) -> Head:
        """Through the queue, in pieces, so that other requests get their turn in between."""
        prompts = [Text(fill(template, label)) for label in labels for template in sets]
        parts, truncated = [], []
        with without_deadline():
            for start in range(0, len(prompts), self._settings.max_text_batch):
                piece = prompts[start : start + self._settings.max_text_batch]
                answer = await self.pipeline.embed(piece)
                parts.append(answer.rows())
                truncated += answer.truncated
        is_cut = np.array(truncated).reshape(len(labels), -1).any(axis=1)  # (C,)
        classifier = head_from_prompts(self.model, labels, np.concatenate(parts))
        return Head(classifier, tuple(np.flatnonzero(is_cut).tolist()))


class ServedCollection:
    """An open collection and the model that made its vectors."""

    def __init__(self, searcher: Searcher, model: ServedModel, settings: Settings) -> None:
        self.searcher = searcher
        self.collection: Collection = searcher.collection
        self.name = searcher.collection.name
        self.model = model
        self.stale = False
        """whether its model is no longer served under its own name, a reload having replaced it"""
        self.is_closed = False
        self._is_leaving = False
        self._in_store: set[Future[Any]] = set()
        self._read_only = settings.read_only
        self._running = contextlib.ExitStack()
        self._running.callback(searcher.close)
        self._searchers: dict[str, Future[Searcher]] = {searcher.field: Future()}
        self._searchers[searcher.field].set_result(searcher)
        self._lock = threading.Lock()
        self._rebuilding: threading.Thread | None = None
        if settings.rebuild_indexes and is_writable(searcher.collection.path):
            self._running.enter_context(Maintainer(searcher))

    @property
    def is_open(self) -> bool:
        """Neither closed nor about to be."""
        return not (self.is_closed or self._is_leaving)

    def check_writable(self) -> None:
        """Forbidden if the settings allow no changes."""
        if self._read_only:
            raise Forbidden("this service does not change collections; unset CLIPSERVE_READ_ONLY")

    def admit(self, begin: Callable[[], Future[T]]) -> Future[T]:
        """A search or a write, which is begun only if the collection stays. From the event loop, as
        `admit_no_more`."""
        if self._is_leaving:
            raise CollectionClosed(f"collection {self.name!r} is being dropped")
        future = begin()
        self._in_store.add(future)
        future.add_done_callback(self._in_store.discard)
        return future

    def admit_no_more(self) -> "list[Future[Any]]":
        """What is still running, to be waited for before `close`."""
        self._is_leaving = True
        return list(self._in_store)

    def searcher_of(self, field: str, pool: Executor) -> Future[Searcher]:
        """Over the vectors of "image" or "text"; opened at its first use, which reads them, by one
        thread of the pool, whoever else waits for it. From the event loop, as `admit`."""
        future = self._searchers.get(field)
        if future is None or self._is_leaving or _has_failed(future):
            future = self.admit(lambda: pool.submit(self._open_searcher, field))
            self._searchers[field] = future
        return future

    @property
    def is_rebuilding(self) -> bool:
        return self._rebuilding is not None and self._rebuilding.is_alive()

    def start_rebuild(self) -> None:
        """Build the index anew, in a thread of its own, unless one is at it. Nobody waits for that,
        `close` neither: what is built for a closed collection is not taken."""
        if not self.is_rebuilding:
            name = f"rebuild {self.name}"
            self._rebuilding = threading.Thread(target=self._rebuild, name=name, daemon=True)
            self._rebuilding.start()

    def close(self) -> None:
        """Nobody may be searching any more."""
        with self._lock:
            self.is_closed = True
        self._running.close()

    def _open_searcher(self, field: str) -> Searcher:
        made = Searcher(self.collection.path, fingerprint=self.model.fingerprint, field=field)
        with self._lock:
            if not self.is_closed:
                self._running.callback(made.close)
                return made
        made.close()
        raise CollectionClosed(f"collection {self.name!r} is closed")

    def _rebuild(self) -> None:
        try:
            Maintainer(self.searcher).rebuild()
        except Exception as error:  # whatever it is, searches go on
            if self.is_closed:
                logger.info("the index of %s is not built anew: it was dropped", self.name)
                return
            is_ours = isinstance(error, ClipserveError)
            logger.error(
                "the index of %s was not built anew, the old one stays: %s",
                self.name,
                error,
                exc_info=None if is_ours else error,
            )


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _written(path: Path | None) -> int:
    return int(time.time() if path is None else (path / MANIFEST).stat().st_mtime)
