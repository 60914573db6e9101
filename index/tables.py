"""Items as rows of Parquet files, and back. Start at `ItemTable`, to write at `item_schema`.

    id, caption, source, metadata     what an item is; metadata as the text of a JSON object
    image_path                        the id again, under clip-retrieval's name for it
    anything else                     leaves of the metadata, such as "size.width": for readers that
                                      want columns, or all there is of it where nobody else wrote it

What is written here names the model of its vectors; what names another model is refused.

Legend: n rows of a block, m of them with a vector, E embedding.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipserve.errors import IndexStoreError, SampleError
from clipserve.sources.rows import to_metadata
from index.collection import Collection, Item
from index.items import check_id

logger = logging.getLogger(__name__)

_ID_COLUMNS = ("id", "image_path", "key")
_OWN_COLUMNS = ("id", "image_path", "caption", "source", "metadata")
_PANDAS_INDEX = "__index_level_0__"
_FINGERPRINT, _MODEL = b"clipserve.fingerprint", b"clipserve.model"
_MAX_COLUMNS = 1000
_MAX_SHOWN = 30


class ItemTable:
    """The items in a Parquet file; it is open only while its rows are read: there may be thousands.

    IndexStoreError if the file is no Parquet, is of another model, or has no column of ids.
    """

    def __init__(
        self, path: Path, collection: Collection, id_column: str | None, apart: Sequence[str] = ()
    ) -> None:
        """apart: columns that are no metadata."""
        self.path = path
        self._embed_dim = collection.embed_dim
        with self._errors(), pq.ParquetFile(path) as file:
            self.num_rows: int = file.metadata.num_rows
            schema = file.schema_arrow
        self.columns: list[str] = list(schema.names)
        self._check_names()
        self._check_model(collection, schema.metadata or {})
        known = (id_column,) if id_column else _ID_COLUMNS
        self._id = next((name for name in known if name in self.columns), "")
        if not self._id:
            raise IndexStoreError(
                f"{path} has no column of ids ({', '.join(known)}); it has:"
                f" {', '.join(self.columns[:_MAX_SHOWN])}; name one as the id column"
            )
        self._source = "source" if "source" in self.columns else "image_path"
        self._apart = [name for name in apart if name in self.columns]
        others = {*self.columns} - {*_OWN_COLUMNS, _PANDAS_INDEX, self._id, *apart}
        self._leaves = [] if "metadata" in self.columns else sorted(others)

    def ids(self, size: int) -> Iterator[list[str]]:
        """The ids alone, at most `size` at a time."""
        for batch in self._batches(size, [self._id]):
            yield [self._to_id(value) for value in batch.column(0).to_pylist()]

    def blocks(self, size: int) -> Iterator[tuple[list[Item], pa.RecordBatch]]:
        """At most `size` items at a time, and the columns that are no metadata."""
        wanted = {self._id, "caption", self._source, "metadata", *self._leaves}
        columns = [name for name in self.columns if name in wanted]
        for batch in self._batches(size, [*columns, *self._apart]):
            rows = self._to_rows(batch.select(columns))
            yield [self._to_item(row) for row in rows], batch

    def vectors(self, rows: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Column `name` of a block: vectors (n, E), zeros for a null, and which are there (n,)."""
        column = rows.column(name)
        there = np.asarray(column.is_valid())
        try:
            lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
            values = column.flatten()  # of those that are there
            flat = values.to_numpy(zero_copy_only=False)
        except (pa.ArrowException, NotImplementedError):
            raise self._not_vectors(name, f"it is of type {column.type}") from None
        if values.null_count or flat.dtype.kind not in "fiu" or (lengths != self._embed_dim).any():
            raise self._not_vectors(name, f"it has others, type {column.type}")
        vectors = np.zeros((len(column), self._embed_dim), np.float32)
        vectors[there] = flat.reshape(-1, self._embed_dim)
        return vectors, there

    def _not_vectors(self, name: str, reason: str) -> IndexStoreError:
        return IndexStoreError(
            f"{self.path}: column {name!r} must hold lists of {self._embed_dim} numbers; {reason}"
        )

    def _batches(self, size: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._errors(), pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(size, columns=columns)

    def _to_rows(self, batch: pa.RecordBatch) -> list[dict[str, Any]]:
        try:
            return list(batch.to_pylist())
        except (ValueError, OverflowError) as error:  # a name twice in a struct, a date of year 0
            reason = str(error).strip().split("\n")[0]
            raise IndexStoreError(f"{self.path} cannot be read: {reason}") from None

    def _to_item(self, row: Mapping[str, Any]) -> Item:
        id = self._to_id(row[self._id])
        caption, source = (row.get(name) for name in ("caption", self._source))
        try:
            metadata = self._to_metadata(row)
        except (ValueError, RecursionError, SampleError) as error:
            raise IndexStoreError(f"{self.path}: metadata of item {id!r}: {error}") from None
        return Item(id, _to_text(caption), _to_text(source), metadata)

    def _to_metadata(self, row: Mapping[str, Any]) -> dict[str, Any]:
        stored = row.get("metadata")
        if isinstance(stored, Mapping):
            return to_metadata(stored)
        if not isinstance(stored, str):
            return to_metadata({name: row[name] for name in self._leaves})
        metadata = json.loads(stored)
        if not isinstance(metadata, dict):
            raise ValueError("not a JSON object")
        return metadata

    def _to_id(self, value: object) -> str:
        id = str(value) if isinstance(value, str | int) else ""
        try:
            check_id(id)
        except IndexStoreError as error:
            raise IndexStoreError(f"{self.path}, column {self._id!r}: {error}") from None
        return id

    def _check_names(self) -> None:
        name, count = max(Counter(self.columns).items(), key=lambda one: one[1], default=("", 0))
        if count > 1:
            raise IndexStoreError(
                f"{self.path} has {count} columns {name!r}; give each a name of its own"
            )

    def _check_model(self, collection: Collection, about: Mapping[bytes, bytes]) -> None:
        found = about.get(_FINGERPRINT, collection.fingerprint.encode()).decode(errors="replace")
        if found != collection.fingerprint:
            raise IndexStoreError(
                f"{self.path} holds vectors of model {about.get(_MODEL, b'').decode()!r} with"
                f" fingerprint {found[:12]}; collection {collection.name!r} takes those of"
                f" {collection.model_name!r} with {collection.fingerprint[:12]} alone"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise IndexStoreError(f"{self.path} cannot be read as Parquet: {reason}") from None


def check_distinct(tables: Sequence[ItemTable], size: int) -> None:
    """IndexStoreError, naming it, for an id that is there twice. Reads the ids alone."""
    digests = [np.zeros(0, np.uint64)]
    for table in tables:
        for ids in table.ids(size):
            digests.append(np.fromiter(map(_digest, ids), np.uint64, len(ids)))
    distinct, counts = np.unique(np.concatenate(digests), return_counts=True)
    suspects = set(distinct[counts > 1].tolist())
    seen: dict[str, Path] = {}  # 64 bits may be equal by chance: only equal ids count
    for table in tables if suspects else ():
        for ids in table.ids(size):
            for id in (id for id in ids if _digest(id) in suspects):
                if id in seen:
                    raise IndexStoreError(
                        f"id {id!r} is in {seen[id]} and again in {table.path}; keep one of them,"
                        " or name another column as the id column"
                    )
                seen[id] = table.path


def item_schema(collection: Collection, others: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    """The columns of `item_columns` and others, and which model the vectors are of."""
    made_by = {_FINGERPRINT: collection.fingerprint, _MODEL: collection.model_name}
    own = [(name, pa.string()) for name in ("id", "caption", "source", "metadata")]
    return pa.schema([*own, *others], made_by)


def item_columns(items: Sequence[Item]) -> list[pa.Array]:
    """id, caption, source, metadata."""
    texts = [json.dumps(item.metadata, ensure_ascii=False) for item in items]
    columns = ([getattr(item, name) for item in items] for name in ("id", "caption", "source"))
    return [pa.array(column, pa.string()) for column in (*columns, texts)]


def to_lists(vectors: np.ndarray, there: np.ndarray) -> pa.Array:
    """A column of lists (n,): vectors (m, E) in the m rows that are there (n,), nulls elsewhere."""
    full = np.zeros((len(there), vectors.shape[1]), np.float32)
    full[there] = vectors
    values = pa.array(full.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=pa.array(~there))


class Leaves:
    """The leaves of the metadata as columns, of types that one pass over all of it finds."""

    def __init__(self, collection: Collection) -> None:
        kinds: dict[str, set[type]] = {}
        num_hidden = 0
        for _, texts in collection.metadata_blocks():
            for name, value in (leaf for text in texts for leaf in _leaves(json.loads(text))):
                if name in _OWN_COLUMNS:
                    continue
                if name in kinds or len(kinds) < _MAX_COLUMNS:
                    kinds.setdefault(name, set()).add(_kind(value))
                else:
                    num_hidden += 1
        if num_hidden:
            logger.warning(
                "the metadata has over %d keys; the others are no columns, but in `metadata`",
                _MAX_COLUMNS,
            )
        self.types = [(name, _to_arrow(kinds[name])) for name in sorted(kinds)]

    def columns(self, items: Sequence[Item]) -> list[pa.Array]:
        rows = [dict(_leaves(item.metadata)) for item in items]
        return [
            pa.array([_convert(row.get(name), type) for row in rows], type)
            for name, type in self.types
        ]


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def _kind(value: object) -> type:
    """object for a number that 64 bits cannot hold."""
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return object if is_large else type(value)


def _to_arrow(kinds: set[type]) -> pa.DataType:
    if kinds in ({bool}, {int}):
        return pa.bool_() if bool in kinds else pa.int64()
    return pa.float64() if kinds <= {int, float} else pa.string()


def _convert(value: Any, type: pa.DataType) -> Any:
    """Values of several types in one column become text: JSON, but for what is text already."""
    if value is None or type in (pa.bool_(), pa.int64()):
        return value
    if type == pa.float64():
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _to_text(value: object) -> str:
    return "" if value is None else str(value)


def _digest(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big")
