"""A source of captioned pictures -> a collection, unit by unit; what is done is not done again.

A unit (units.py) is committed in one transaction, items, vectors, thumbnails and the record that it
is finished, so a killed run goes on where it stopped, and repeated it leaves what a run that nobody
killed would have left, to the last bit: batches are cut inside a unit and depend on nothing else.
Pictures are decoded in threads, the model works in another, and the main one reads and commits.
Start at `embed_corpus`.

    finished unit       passed over, its shards are not even read; what was deleted stays away
    id already there    left as it is, unless `overwrite`
    id twice in a run   the first counts
    bad picture         reported; tried again by the next run if it may be better then
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipserve.decoding import open_decoded
from clipserve.embed import batched, embed_ids, embed_pixels
from clipserve.errors import ImageError, IndexStoreError, SampleError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, make_thumbnail
from clipserve.sources import BadRecord, Record, SourceOptions, Url
from clipserve.sources.fetch import Fetcher, FetchLimits
from index.collection import Collection, Item, Unit, check_item
from index.units import SourceUnit, open_units

if TYPE_CHECKING:
    from clipserve.model import Model

BAD_LISTED = 1000
"""bad records that a report holds; the others are only counted"""
BAD_BEFORE = "bad_before"
"""kind of what was bad in a unit that an earlier run finished; its reason was reported then"""

_MAX_THREADS = 16
_BATCHES_AHEAD = 3
_MAY_PASS = ("read_error", "changed")  # of a sample in a shard: another run may find it well
_DEFAULT_OPTIONS = SourceOptions()


@dataclass
class EmbedReport:
    """What a run did."""

    added: int = 0
    skipped: int = 0
    """records whose items are there, or were and may have been deleted since"""
    bad: list[BadRecord] = field(default_factory=list)
    """the first BAD_LISTED of them"""
    bad_by_kind: Counter[str] = field(default_factory=Counter)
    """how many, all of them counted"""
    texts_cut: int = 0
    """captions embedded in part: the model takes no more tokens"""
    seconds: float = 0.0

    @property
    def num_bad(self) -> int:
        return self.bad_by_kind.total()


def embed_corpus(
    model: "Model",
    source: str | Path,
    collection_path: Path,
    *,
    options: SourceOptions = _DEFAULT_OPTIONS,
    batch_size: int = 64,
    overwrite: bool = False,
    with_text: bool = False,
    dtype: str | None = None,
    unit_size: int | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    progress: Callable[[int, int | None], None] | None = None,
) -> EmbedReport:
    """Embed every picture of `source` into the collection, which is made if missing.

    An item's id is its record's key. `with_text` embeds each record's first caption too, for the
    items that are embedded now: those that are there keep what they have, unless `overwrite`.
    `dtype` is how vectors are stored, float32 or float16; None is the collection's own, float32 if
    it is made now. `unit_size` is the most records of a unit, and so of what a kill costs.
    `progress(done, total)` is called after every batch and every unit passed over with the records
    dealt with; the total is None where it takes long to tell.
    Bad records are reported, not fatal. IndexStoreError if the collection is another model's, or
    the model was never saved; DataError if the source as a whole cannot be read.
    """
    for name, value in {"batch_size": batch_size, "unit_size": unit_size}.items():
        if value is not None and value < 1:
            raise IndexStoreError(f"{name} {value} must be at least 1")
    if model.info.fingerprint is None:
        raise IndexStoreError("the model has no fingerprint yet; save it and load it from there")
    started = time.monotonic()
    settings = {
        "transform": model.transform.to_open_clip(),
        "limits": asdict(limits),
        "fields": ["image", "text"] if with_text else ["image"],
    }
    with (
        open_units(source, options, settings, unit_size) as units,
        Collection.open_or_create(
            collection_path,
            fingerprint=model.info.fingerprint,
            model_name=model.info.name,
            embed_dim=model.embed_dim,
            dtype=dtype,
        ) as collection,
        _Workers(model, limits, with_text) as workers,
    ):
        total = units.count() if progress is not None else None
        notify = (lambda done: progress(done, total)) if progress is not None else None
        run = _Run(workers, collection, batch_size, overwrite, notify)
        for bad in units.bad:
            run.report_bad(bad)
        for unit in units.units:
            run.take(unit)
        run.finish()
    run.report.seconds = time.monotonic() - started
    return run.report


@dataclass(frozen=True)
class _Decoded:
    item: Item
    text: str
    """the caption that is embedded with it"""
    pixels: np.ndarray
    """(3, H, W) uint8, the model's input"""
    thumbnail: bytes


@dataclass
class _Embedded:
    """Rows of a unit, aligned: what is left of decoded pictures behind the model."""

    items: list[Item] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    """(n, E) each"""
    text_vectors: list[np.ndarray] = field(default_factory=list)
    """(n, E) each; empty if texts are not embedded"""
    bad: list[tuple[Record, str, str]] = field(default_factory=list)
    """with kind and reason"""
    texts_cut: int = 0


_Decoding = list[tuple[Record, "Future[_Decoded]"]]


class _Workers:
    """The threads: several decode, one runs the model on one batch after another."""

    def __init__(self, model: "Model", limits: ImageLimits, with_text: bool) -> None:
        self.model = model
        self._limits, self._with_text = limits, with_text
        fetching = FetchLimits()
        self._fetcher = Fetcher(limits.max_bytes, fetching)
        self._decode_pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "decode")
        self._fetch_pool = ThreadPoolExecutor(fetching.threads, "fetch")
        self._model_thread = ThreadPoolExecutor(1, "model")

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._fetch_pool, self._decode_pool, self._model_thread):
            pool.shutdown(cancel_futures=True)
        self._fetcher.close()

    def decode(self, record: Record, item: Item) -> "Future[_Decoded]":
        pool = self._fetch_pool if isinstance(record.image, Url) else self._decode_pool
        return pool.submit(self._decode, record, item)

    def embed(self, decoding: _Decoding) -> "Future[_Embedded]":
        """One batch, once its pictures are there; those that turn out bad are left out."""
        return self._model_thread.submit(self._embed, decoding)

    def _decode(self, record: Record, item: Item) -> _Decoded:
        image = record.image
        data = self._fetcher.fetch(image) if isinstance(image, Url) else image
        decoded = open_decoded(data, self.model.transform, self._limits)
        pixels = self.model.transform.resize(decoded)
        text = next(iter(record.captions), "")
        return _Decoded(item, text, pixels, make_thumbnail(decoded.picture))

    def _embed(self, decoding: _Decoding) -> _Embedded:
        rows = _Embedded()
        decoded: list[_Decoded] = []
        for record, future in decoding:
            try:
                decoded.append(future.result())
            except ImageError as error:
                rows.bad.append((record, "bad_image", str(error)))
            except SampleError as error:
                rows.bad.append((record, error.kind, str(error)))
        if decoded:
            rows.items = [one.item for one in decoded]
            rows.thumbnails = [one.thumbnail for one in decoded]
            rows.vectors = [embed_pixels(self.model, [one.pixels for one in decoded])]
            if self._with_text:
                tokens = self.model.tokenizer([one.text for one in decoded])
                rows.texts_cut = sum(tokens.truncated)
                ids = tokens.cut() if self.model.can_cut_text else tokens.ids
                rows.text_vectors = [embed_ids(self.model, ids)]
        return rows


class _OpenUnit:
    """A unit under way: what its commit will hold."""

    def __init__(self, unit: SourceUnit) -> None:
        self.unit = unit
        self.keys: set[str] = set()
        """of the records that are being embedded, or were found bad"""
        self.rows = _Embedded()
        self.num_there = self.num_bad = 0
        self.may_pass = False
        """whether another run may find one of the bad ones well: then it is not finished"""

    def add(self, rows: _Embedded) -> None:
        self.rows.items += rows.items
        self.rows.thumbnails += rows.thumbnails
        self.rows.vectors += rows.vectors
        self.rows.text_vectors += rows.text_vectors


@dataclass(frozen=True)
class _Batch:
    owner: _OpenUnit
    num_done: int
    """records of it that were dealt with when it was begun"""
    embedded: "Future[_Embedded]"


class _Run:
    """Takes units in order; batches and commits stand in one line, so that commits keep it."""

    def __init__(
        self,
        workers: _Workers,
        collection: Collection,
        batch_size: int,
        overwrite: bool,
        notify: Callable[[int], None] | None,
    ) -> None:
        self.report = EmbedReport()
        self._workers, self._collection = workers, collection
        self._batch_size, self._overwrite = batch_size, overwrite
        self._notify = notify
        self._done = 0
        self._finished = collection.units()
        self._first_row: int | None = None
        """row number of the first item that this run stored: those from there on are its own"""
        self._line: deque[_Batch | _OpenUnit] = deque()
        """an open unit stands for its commit, behind its batches"""
        self._num_waiting = 0
        """batches in that line"""

    def report_bad(self, bad: BadRecord) -> None:
        self.report.bad_by_kind[bad.kind] += 1
        if len(self.report.bad) < BAD_LISTED:
            self.report.bad.append(bad)

    def take(self, unit: SourceUnit) -> None:
        """Pass over a finished unit; of another begin all batches."""
        finished = self._finished.get(unit.name)
        if finished is not None and finished.digest == unit.digest and not self._overwrite:
            self._pass_over(unit, finished)
            return
        opened = _OpenUnit(unit)
        for group in batched(unit.records(), self._batch_size):
            self._line.append(self._begin(opened, group))
            self._num_waiting += 1
            self._advance(_BATCHES_AHEAD)
        self._line.append(opened)

    def finish(self) -> None:
        """Wait for all that was begun; when it returns, everything is durable."""
        self._advance(0)

    def _pass_over(self, unit: SourceUnit, finished: Unit) -> None:
        self.report.skipped += finished.count
        for bad in unit.bad:
            self.report_bad(bad)
        if hidden := finished.bad - len(unit.bad):
            self.report.bad_by_kind[BAD_BEFORE] += hidden
        self._tell(finished.count + finished.bad)

    def _begin(self, opened: _OpenUnit, group: list[Record | BadRecord]) -> _Batch:
        keys = [record.key for record in group if isinstance(record, Record)]
        # A unit that is not committed yet may hold one of these keys: whether it is there then, and
        # so counts, must not depend on how far that unit has come by now.
        if any(not other.keys.isdisjoint(keys) for other in self._uncommitted()):
            self._advance(0)
        there = self._collection.rowids_of(keys)
        decoding: _Decoding = []
        for record in group:
            if isinstance(record, BadRecord):
                opened.num_bad += 1
                opened.may_pass |= record.kind in _MAY_PASS
                self.report_bad(record)
            elif record.key in opened.keys:
                self._refuse(opened, record, "duplicate_key", "its key was used a moment before")
            elif record.key in there and self._is_own(there[record.key]):
                opened.num_there += 1
                reason = "its key was used before, by another record of the source"
                self.report_bad(BadRecord(record.key, record.origin, "duplicate_key", reason))
            elif record.key in there and not self._overwrite:
                opened.num_there += 1
                self.report.skipped += 1
            else:
                opened.keys.add(record.key)
                self._decode(opened, record, decoding)
        return _Batch(opened, len(group), self._workers.embed(decoding))

    def _uncommitted(self) -> list[_OpenUnit]:
        return [entry for entry in self._line if isinstance(entry, _OpenUnit)]

    def _is_own(self, rowid: int) -> bool:
        return self._first_row is not None and rowid >= self._first_row

    def _decode(self, opened: _OpenUnit, record: Record, decoding: _Decoding) -> None:
        caption = " | ".join(record.captions)
        item = Item(record.key, caption, record.origin, record.metadata)
        try:
            check_item(item)
        except IndexStoreError as error:
            self._refuse(opened, record, "bad_item", str(error))
            return
        decoding.append((record, self._workers.decode(record, item)))

    def _refuse(self, opened: _OpenUnit, record: Record, kind: str, reason: str) -> None:
        opened.num_bad += 1
        self.report_bad(BadRecord(record.key, record.origin, kind, reason))

    def _advance(self, most: int) -> None:
        """Take the line's oldest until no more than `most` batches are left in it."""
        while self._line and (self._num_waiting > most or isinstance(self._line[0], _OpenUnit)):
            entry = self._line.popleft()
            if isinstance(entry, _Batch):
                self._num_waiting -= 1
                self._collect(entry)
            else:
                self._commit(entry)

    def _collect(self, batch: _Batch) -> None:
        opened, rows = batch.owner, batch.embedded.result()
        for record, kind, reason in rows.bad:
            self._refuse(opened, record, kind, reason)
            opened.may_pass |= not isinstance(record.image, bytes)
        opened.add(rows)
        self.report.added += len(rows.items)
        self.report.texts_cut += rows.texts_cut
        self._tell(batch.num_done)

    def _commit(self, opened: _OpenUnit) -> None:
        rows, unit = opened.rows, opened.unit
        count = opened.num_there + len(rows.items)
        record = Unit(unit.name, unit.digest, count, opened.num_bad)
        is_new = not opened.may_pass and record != self._finished.get(unit.name)
        if rows.items or is_new:
            self._collection.upsert(
                rows.items,
                np.concatenate(rows.vectors) if rows.vectors else None,
                rows.thumbnails,
                text_vectors=np.concatenate(rows.text_vectors) if rows.text_vectors else None,
                unit=record if is_new else None,
            )
        if rows.items and self._first_row is None:
            found = self._collection.rowids_of([rows.items[0].id])
            self._first_row = min(found.values(), default=None)

    def _tell(self, records: int) -> None:
        self._done += records
        if self._notify is not None:
            self._notify(self._done)
