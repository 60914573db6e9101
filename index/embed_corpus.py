"""A source of captioned pictures -> a collection; what is done already is not done again.

Decoding runs in threads while the model works on the pictures before. Every batch is durable
before the next one is begun, so a killed run goes on where it stopped. Start at `embed_corpus`.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipserve.embed import batched, embed_pixels
from clipserve.errors import ImageError, IndexStoreError, SampleError
from clipserve.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    ImageTransform,
    make_thumbnail,
    open_image,
)
from clipserve.sources import BadRecord, Record, SourceOptions, Url, count_records, read_source
from clipserve.sources.fetch import Fetcher
from index.collection import Collection, Item, check_item

if TYPE_CHECKING:
    from clipserve.model import Model

_MAX_THREADS = 8
_BATCHES_AHEAD = 2
_DEFAULT_OPTIONS = SourceOptions()


@dataclass(frozen=True)
class EmbedReport:
    """What a run did."""

    added: int
    skipped: int
    """items that were in the collection already"""
    bad: list[BadRecord]
    seconds: float


@dataclass(frozen=True)
class _Decoded:
    item: Item
    pixels: np.ndarray
    """(3, H, W) uint8, the model's input"""
    thumbnail: bytes


def embed_corpus(
    model: "Model",
    source: str | Path,
    collection_path: Path,
    *,
    options: SourceOptions = _DEFAULT_OPTIONS,
    batch_size: int = 64,
    overwrite: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int | None], None] | None = None,
) -> EmbedReport:
    """Embed every picture of `source` into the collection, which is made if missing.

    An item's id is its record's key; ids that are there already are skipped, or embedded again if
    `overwrite`. Bad records are reported, not fatal. `progress(done, total)` is called after every
    batch with the records dealt with; the total is None where it takes long to tell.
    IndexStoreError if the collection is another model's, or the model was never saved.
    """
    if model.info.fingerprint is None:
        raise IndexStoreError("the model has no fingerprint yet; save it and load it from there")
    if batch_size < 1:
        raise IndexStoreError(f"batch_size {batch_size} must be at least 1")
    started = time.monotonic()
    records = read_source(source, options)  # before a collection is made for nothing
    collection = Collection.open_or_create(
        collection_path,
        fingerprint=model.info.fingerprint,
        model_name=model.info.name,
        embed_dim=model.embed_dim,
    )
    total = count_records(source, options) if progress is not None else None
    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "decode")
    fetcher = Fetcher(limits.max_bytes)
    added = skipped = 0
    bad: list[BadRecord] = []
    try:
        decoder = _Decoder(pool, fetcher, collection, model.transform, limits, overwrite)
        for batch in decoder.batches(batched(records, batch_size)):
            added += _store(model, collection, batch.decoded())
            skipped += batch.skipped
            bad += batch.bad
            if progress is not None:
                progress(added + skipped + len(bad), total)
    finally:
        pool.shutdown(cancel_futures=True)
        fetcher.close()
        collection.close()
    return EmbedReport(added, skipped, bad, time.monotonic() - started)


class _Batch:
    """Records on their way: being decoded, in the collection already, or not usable."""

    def __init__(self) -> None:
        self.skipped = 0
        self.bad: list[BadRecord] = []
        self.decoding: list[tuple[Record, Future[_Decoded]]] = []

    def refuse(self, record: Record, kind: str, error: Exception | str) -> None:
        self.bad.append(BadRecord(record.key, record.origin, kind, str(error)))

    def decoded(self) -> list[_Decoded]:
        """Wait for the pictures; those that turn out bad are refused."""
        done = []
        for record, future in self.decoding:
            try:
                done.append(future.result())
            except ImageError as error:
                self.refuse(record, "bad_image", error)
            except SampleError as error:
                self.refuse(record, error.kind, error)
        return done


class _Decoder:
    """Turns records into batches, a few batches ahead of their use."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        fetcher: Fetcher,
        collection: Collection,
        transform: ImageTransform,
        limits: ImageLimits,
        overwrite: bool,
    ) -> None:
        self._pool = pool
        self._fetcher = fetcher
        self._collection = collection
        self._transform = transform
        self._limits = limits
        self._overwrite = overwrite
        self._ahead: deque[_Batch] = deque()

    def batches(self, groups: Iterable[list[Record | BadRecord]]) -> Iterator[_Batch]:
        """One batch for each group, in order."""
        for group in groups:
            self._ahead.append(self._begin(group))
            if len(self._ahead) > _BATCHES_AHEAD:
                yield self._ahead.popleft()
        while self._ahead:
            yield self._ahead.popleft()

    def _begin(self, group: list[Record | BadRecord]) -> _Batch:
        batch = _Batch()
        keys = [record.key for record in group]
        present = set() if self._overwrite else self._collection.contains(keys)
        under_way = {record.key for other in self._ahead for record, _ in other.decoding}
        for record in group:
            if isinstance(record, BadRecord):
                batch.bad.append(record)
            elif record.key in present:
                batch.skipped += 1
            elif record.key in under_way:
                batch.refuse(record, "duplicate_key", "its key was used a moment before")
            else:
                under_way.add(record.key)
                self._submit(batch, record)
        return batch

    def _submit(self, batch: _Batch, record: Record) -> None:
        caption = " | ".join(record.captions)
        item = Item(record.key, caption, record.origin, record.metadata)
        try:
            check_item(item)
        except IndexStoreError as error:
            batch.refuse(record, "bad_item", error)
            return
        batch.decoding.append((record, self._pool.submit(self._decode, item, record.image)))

    def _decode(self, item: Item, image: Path | bytes | Url) -> _Decoded:
        data = self._fetcher.fetch(image) if isinstance(image, Url) else image
        picture = open_image(data, self._limits)
        return _Decoded(item, self._transform.resize(picture), make_thumbnail(picture))


def _store(model: "Model", collection: Collection, batch: list[_Decoded]) -> int:
    if batch:
        vectors = embed_pixels(model, [decoded.pixels for decoded in batch])
        items = [decoded.item for decoded in batch]
        collection.upsert(items, vectors, [decoded.thumbnail for decoded in batch])
    return len(batch)
