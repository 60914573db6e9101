"""Import and export: .npy + Parquet as clip-retrieval writes them, Parquet alone, FAISS files.

    img_emb/img_emb_0000.npy             rows of vectors; text_emb/text_emb_0000.npy likewise
    metadata/metadata_0000.parquet       the items of the same rows (tables.py says which columns)

Start at the `export_` and `import_` functions. An export is the collection at one moment, written
aside and renamed when it is complete. An import compares all files before it writes anything: where
a part is missing or short, every later picture would get the vector of another without a word
(rom1504/clip-retrieval#304). Then it upserts block by block: ids that are there are replaced, and
an import that was cut short can be repeated. FAISS's own reader does not distrust what it reads:
import only files that you or somebody you trust made.

Legend: N rows, E embedding.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import faiss as untyped_faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy

from clipserve.errors import IndexStoreError
from clipserve.files import new_directory, new_file, sync
from index import cache
from index.bulk import ROWS_PER_WRITE, Progress, RowWriter, check_shape
from index.collection import BLOCK_ROWS, FIELDS, Collection, Item
from index.npy_parts import METADATA, find_parts, new_part, open_npy
from index.tables import (
    ItemTable,
    Leaves,
    check_distinct,
    item_columns,
    item_schema,
    to_lists,
)

faiss: Any = untyped_faiss  # its stubs lack half of what is used here

ROWS_PER_PART = 1_000_000
"""as clip-retrieval cuts them"""
VECTOR_COLUMNS = {field: f"{field}_vector" for field in FIELDS}
"""of a Parquet file"""
FAISS_FILE, FAISS_IDS = "index.faiss", "ids.parquet"

_EXACT_STORES = ("IndexFlat", "IndexFlatIP", "IndexFlatL2", "IndexIVFFlat", "IndexHNSWFlat")


def export_npy(
    collection: Collection,
    out: Path,
    *,
    fields: Sequence[str] | None = None,
    dtype: str | None = None,
    rows_per_part: int = ROWS_PER_PART,
    progress: Progress | None = None,
) -> int:
    """Write a new folder as clip-retrieval lays it out; returns N.

    Files are aligned row by row, so every item needs a vector in each of `fields`; None takes those
    that any item has. dtype: float16 or float32; None is the collection's own.
    """
    name = dtype or collection.dtype.name
    if name not in ("float16", "float32") or rows_per_part < 1:
        raise IndexStoreError(
            f"dtype {name} must be float16 or float32, and rows_per_part {rows_per_part} at least 1"
        )
    with collection.snapshot(), _new_folder(out) as folder:
        rowids, having = _rows(collection)
        chosen = fields or [field for field in FIELDS if len(having[field])] or FIELDS[:1]
        for field in chosen:
            if field not in having:
                raise IndexStoreError(f"field {field!r} is not one of {', '.join(FIELDS)}")
            if missing := len(rowids) - len(having[field]):
                raise IndexStoreError(
                    f"{missing} of {len(rowids)} items have no {field} vector, and .npy files have"
                    " one for each row; leave that field out, or export Parquet"
                )
        leaves = Leaves(collection)
        starts = range(0, max(1, len(rowids)), rows_per_part)
        for part, start in enumerate(starts):
            number = str(part).zfill(max(4, len(str(len(starts)))))
            rows = rowids[start : start + rows_per_part]
            _write_metadata(collection, rows, new_part(folder, METADATA, number), leaves)
            for field in chosen:
                _write_npy(collection, rows, field, new_part(folder, field, number), name)
            if progress is not None:
                progress(start + len(rows), len(rowids))
    return len(rowids)


def export_parquet(collection: Collection, out: Path, *, progress: Progress | None = None) -> int:
    """Write one new Parquet file of all items, their vectors as lists of float32; returns N.

    A vector that an item does not have is null.
    """
    lists = pa.list_(pa.float32(), collection.embed_dim)
    schema = item_schema(collection, [(name, lists) for name in VECTOR_COLUMNS.values()])
    with collection.snapshot(), _new_file(out) as file, pq.ParquetWriter(file, schema) as writer:
        rowids, having = _rows(collection)
        for start, rows in _blocks(rowids):
            columns = item_columns(_items(collection, rows))
            for field in FIELDS:
                there = np.isin(rows, having[field], assume_unique=True)
                columns.append(to_lists(collection.vectors_of(rows[there], field), there))
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            if progress is not None:
                progress(start + len(rows), len(rowids))
    return len(rowids)


def export_faiss(collection: Collection, out: Path, *, field: str = "image") -> int:
    """Write a new folder of the built index, labels 0..N-1, and of the items of those; returns N.

    An exact index becomes an IndexFlatIP. IndexStoreError unless an index of that field is built,
    and nothing was written since.
    """
    with collection.snapshot() as generation, _new_folder(out) as folder:
        built = cache.read(collection, field, generation)
        if built is None or not np.array_equal(built.rowids, collection.rowids(field)):
            state = "no index is built" if built is None else "items changed since it was built"
            raise IndexStoreError(
                f"collection {collection.name!r}, {field} vectors: {state}; build it first:"
                f" clipserve index build {collection.path}"
            )
        index = built.index
        if index is None:
            index = faiss.IndexFlatIP(collection.embed_dim)
            for _, vectors in collection.vector_blocks(0, field):
                index.add(vectors.astype(np.float32))
        # Through a Python file: FAISS's own writer does not notice every full disk.
        with (folder / FAISS_FILE).open("wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        _write_metadata(collection, built.rowids, folder / FAISS_IDS, None)
    return len(built.rowids)


def import_npy(
    folder: Path,
    collection: Collection,
    *,
    id_column: str | None = None,
    normalize: bool = False,
    progress: Progress | None = None,
) -> int:
    """Upsert what clip-retrieval, or `export_npy`, wrote; returns N.

    id_column names the column of ids (None: id, image_path or key). `normalize` scales vectors to
    length 1 instead of refusing others. IndexStoreError names the files where a part is missing,
    rows differ, an id is there twice, or the vectors are not the collection's.
    """
    tables: list[ItemTable] = []
    matrices: list[dict[str, np.ndarray]] = []
    for metadata, files in find_parts(folder):
        table = ItemTable(metadata, collection, id_column)
        tables.append(table)
        matrices.append({field: open_npy(file) for field, file in files.items()})
        for field, file in files.items():
            check_shape(file, matrices[-1][field].shape, table, collection)
    check_distinct(tables, ROWS_PER_WRITE)
    writer = RowWriter(collection, sum(t.num_rows for t in tables), normalize, progress)
    for table, matrix_of in zip(tables, matrices, strict=True):
        start = 0
        for items, _ in table.blocks(ROWS_PER_WRITE):
            stop = start + len(items)
            writer.write(table, items, {f: m[start:stop] for f, m in matrix_of.items()})
            start = stop
    return writer.done


def import_parquet(
    source: Path,
    collection: Collection,
    *,
    id_column: str | None = None,
    vector_columns: Mapping[str, str] = VECTOR_COLUMNS,
    normalize: bool = False,
    progress: Progress | None = None,
) -> int:
    """Upsert the rows of a Parquet file, or of all in a folder; returns N.

    vector_columns: field -> column of lists of numbers; one of them must be there. The rest as in
    `import_npy`.
    """
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise IndexStoreError(f"{source} holds no .parquet files")
    apart = tuple(vector_columns.values())
    tables = [ItemTable(file, collection, id_column, apart) for file in files]
    for table in tables:
        if not {*apart} & {*table.columns}:
            raise IndexStoreError(
                f"{table.path} has no column of vectors ({', '.join(apart)}); it has:"
                f" {', '.join(table.columns[:30])}"
            )
    check_distinct(tables, ROWS_PER_WRITE)
    writer = RowWriter(collection, sum(t.num_rows for t in tables), normalize, progress)
    for table in tables:
        for items, rows in table.blocks(ROWS_PER_WRITE):
            vectors, there = {}, {}
            for field, name in vector_columns.items():
                if name in table.columns:
                    vectors[field], there[field] = table.vectors(rows, name)
            writer.write(table, items, vectors, there)
    return writer.done


def import_faiss(
    index_file: Path,
    ids_file: Path,
    collection: Collection,
    *,
    field: str = "image",
    id_column: str | None = None,
    normalize: bool = False,
    lossy: bool = False,
    progress: Progress | None = None,
) -> int:
    """Upsert the vectors of a FAISS index; row i of the Parquet file is of label i. Returns N.

    An index that keeps its vectors rounded or coded is refused unless `lossy`: they come back as
    approximations. The rest as in `import_npy`.
    """
    if field not in FIELDS:
        raise IndexStoreError(f"field {field!r} is not one of {', '.join(FIELDS)}")
    stored = _FaissVectors(index_file, lossy)
    table = ItemTable(ids_file, collection, id_column)
    check_shape(index_file, stored.shape, table, collection)
    check_distinct([table], ROWS_PER_WRITE)
    writer = RowWriter(collection, table.num_rows, normalize or lossy, progress)
    for items, _ in table.blocks(ROWS_PER_WRITE):
        stop = writer.done + len(items)
        writer.write(table, items, {field: stored.block(writer.done, stop)})
    return writer.done


def _rows(collection: Collection) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Row numbers of all items, ascending, and of those that have each vector."""
    having = {field: collection.rowids(field) for field in FIELDS}
    return np.unique(np.concatenate([*having.values()])), having


def _write_npy(
    collection: Collection, rowids: np.ndarray, field: str, path: Path, dtype: str
) -> None:
    element = np.dtype(dtype).newbyteorder("<")
    header = {
        "descr": element.str,
        "fortran_order": False,
        "shape": (len(rowids), collection.embed_dim),
    }
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, header)
        for _, rows in _blocks(rowids):
            file.write(collection.vectors_of(rows, field).astype(element).data)


def _blocks(rowids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Where each block begins, and its row numbers."""
    for start in range(0, len(rowids), BLOCK_ROWS):
        yield start, rowids[start : start + BLOCK_ROWS]


def _items(collection: Collection, rowids: np.ndarray) -> list[Item]:
    found = collection.items_of(rowids)
    return [found[rowid] for rowid in rowids.tolist()]


def _write_metadata(
    collection: Collection, rowids: np.ndarray, path: Path, leaves: Leaves | None
) -> None:
    others = [("image_path", pa.string()), *(leaves.types if leaves else ())]
    schema = item_schema(collection, others)
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for _, rows in _blocks(rowids):
            items = _items(collection, rows)
            own = item_columns(items)
            columns = [*own, own[0], *(leaves.columns(items) if leaves else ())]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))


class _FaissVectors:
    """The vectors in a FAISS index, by their labels 0..N-1."""

    def __init__(self, path: Path, lossy: bool) -> None:
        try:
            self._owner = faiss.read_index(str(path))  # of the memory that the others point into
            self._index, labels = self._owner, None
            if isinstance(self._owner, faiss.IndexIDMap):
                self._index = faiss.downcast_index(self._owner.index)
                labels = faiss.vector_to_array(self._owner.id_map)
            self._check_kind(path, lossy)
            self.shape = (self._index.ntotal, self._index.d)
            self._places = np.arange(self.shape[0])
            if labels is not None:
                _check_labels(path, labels)
                self._places = np.argsort(labels)
            self._open_lists(path)
            self.block(0, min(1, self.shape[0]))  # some kinds cannot
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise IndexStoreError(f"{path} cannot be read as a FAISS index: {reason}") from None

    def block(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, E) float32"""
        vectors: np.ndarray = self._index.reconstruct_batch(self._places[start:stop])
        return vectors

    def _check_kind(self, path: Path, lossy: bool) -> None:
        kind = type(self._index).__name__
        if kind not in _EXACT_STORES and not lossy:
            raise IndexStoreError(
                f"{path} is an {kind}, which may not give its vectors back as they were; import"
                " what it was made from, or allow a lossy import"
            )

    def _open_lists(self, path: Path) -> None:
        """Inverted lists are in an order of their own."""
        inverted = faiss.try_extract_index_ivf(self._index)
        if inverted is not None:
            lists = inverted.invlists
            sizes = [lists.list_size(number) for number in range(inverted.nlist)]
            parts = [
                faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
                for number, size in enumerate(sizes)
                if size
            ]
            _check_labels(path, np.concatenate([np.zeros(0, np.int64), *parts]))
            inverted.make_direct_map()


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if not np.array_equal(np.sort(labels), np.arange(len(labels))):
        raise IndexStoreError(
            f"{path}: its labels are not 0..{len(labels) - 1}, each once, and so are no rows"
        )


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Appears, complete, when the block succeeds."""
    with _new(out), new_directory(out, replace=False) as folder:
        yield folder


@contextlib.contextmanager
def _new_file(out: Path) -> Iterator[BinaryIO]:
    """Appears, complete, when the block succeeds."""
    with _new(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_name(f".{out.name}.{os.getpid()}.whole")
        try:
            with new_file(whole) as file:
                yield file
            os.link(whole, out)  # unlike a rename it replaces nothing
        finally:
            whole.unlink(missing_ok=True)
        sync(out.parent)


@contextlib.contextmanager
def _new(out: Path) -> Iterator[None]:
    there = IndexStoreError(f"{out} is there already; remove it, or export to another place")
    if out.exists():
        raise there
    try:
        yield
    except FileExistsError:  # meanwhile
        raise there from None
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise IndexStoreError(
            f"{out} cannot be written, nothing is left of it: {reason}"
        ) from error
