"""The index of one field on disk: what it is, FAISS's part of it, the vectors, their row numbers.

`DIR/indexes/<field>/index.json` (`info.py`) names its files with their sizes and sha256: `.faiss`
(none for an exact index), `.vectors` (N rows in the collection's dtype, little-endian, mapped into
memory), `.rows` (N int64, ascending), and `.queries` (Q float32 rows) if some were given to tune
it with. All are written aside, flushed and renamed, index.json last; a reader keeps the files it
has open when others take their place. It is a cache: whatever is damaged or does not fit is
ignored, with a warning, and can be built again. Start at `read` and `Writer`.

Legend: N vectors, E embedding, Q queries.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import faiss as untyped_faiss
import numpy as np

from clipserve.errors import IndexStoreError
from clipserve.files import sha256, sync, write_atomic
from index.collection import Collection
from index.info import File, IndexInfo

logger = logging.getLogger(__name__)
faiss: Any = untyped_faiss  # its stubs lack half of what is used here

FORMAT_VERSION = 2
INFO_FILE = "index.json"

_KINDS = ("faiss", "vectors", "rows", "queries")
_READ_ATTEMPTS = 3


@dataclass(frozen=True)
class Cache:
    """An index that was read, and whole."""

    info: IndexInfo
    index: Any | None
    """FAISS's, labels are positions; None for an exact one"""
    vectors: np.ndarray
    """(N, E) in the collection's dtype, read from disk as they are needed"""
    rowids: np.ndarray
    """(N,) int64, ascending"""


def folder(path: Path, field: str) -> Path:
    """Where the index of a field lies in a collection's directory."""
    return path / "indexes" / field


def read(collection: Collection, field: str, generation: int) -> Cache | None:
    """The index of a field, every byte of it verified; None, with a warning, unless one fits.

    generation: of the caller's snapshot of the collection; an index of a later one does not fit.
    """
    info = read_info(collection.path, field)
    for _ in range(_READ_ATTEMPTS):
        if info is None:
            return None
        try:
            _check_fit(info, collection, generation)
            return _load(folder(collection.path, field), info)
        except FileNotFoundError as error:
            missing, info = info, read_info(collection.path, field)
            if info == missing:  # not replaced by a newer one in this moment
                _ignore(collection, missing, f"its file {Path(error.filename).name} is gone")
                return None
        except (OSError, RuntimeError, ValueError) as error:
            _ignore(collection, info, str(error).strip().splitlines()[0])
            return None
    return None


def read_info(path: Path, field: str = "image") -> IndexInfo | None:
    """What the index of a field says it is; None, with a warning if damaged, if there is none."""
    try:
        return _parse(folder(path, field) / INFO_FILE)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        file = folder(path, field) / INFO_FILE
        logger.warning("%s is ignored: %s; build the index again", file, error)
        return None


def read_queries(path: Path, info: IndexInfo) -> np.ndarray | None:
    """Those (Q, E) given to tune the index with; None if none were, or, with a warning, if damaged.

    Hold the lock of the indexes, or they may be gone.
    """
    if "queries" not in info.files:
        return None
    file = info.files["queries"]
    try:
        _verify(folder(path, info.field), file)
        queries = np.fromfile(folder(path, info.field) / file["name"], "<f4")
        return queries.astype(np.float32, copy=False).reshape(-1, info.embed_dim)
    except (OSError, ValueError) as error:
        logger.warning("the queries that tuned the index of %s are not used: %s", path, error)
        return None


def stamp(path: Path, field: str) -> tuple[int, int] | None:
    """Changes when an index is put in place; None while there is none."""
    try:
        # Asked before every search: without the Paths that `folder` makes.
        status = os.stat(f"{path}/indexes/{field}/{INFO_FILE}")
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


class Writer:
    """Puts a new index in place of the old one, which stays if anything fails.

    `append` all vectors, look at them with `vectors` and `rowids`, then `commit`. A context manager
    that removes what was not committed. One at a time in a collection: hold its lock.
    """

    def __init__(self, path: Path, field: str, embed_dim: int, dtype: np.dtype[Any]) -> None:
        self._folder = folder(path, field)
        self._shape_of_row = (embed_dim,)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._rowids = [np.zeros(0, dtype=np.int64)]
        self._digests: dict[str, str] = {}
        with _write_errors(self._folder):
            # Not with all parents: a collection that was dropped meanwhile must stay away.
            self._folder.parent.mkdir(exist_ok=True)
            self._folder.mkdir(exist_ok=True)
            _remove_files(self._folder, ".*.tmp")  # left by a build that was killed
            self._files = [_HashedFile(self._temporary("vectors"))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        _remove_files(self._folder, ".*.tmp")

    def append(self, rowids: np.ndarray, vectors: np.ndarray) -> None:
        """Vectors (n, E) and their row numbers (n,), above those before."""
        with _write_errors(self._folder):
            self._files[0].write(np.ascontiguousarray(vectors, dtype=self._dtype).data)
        self._rowids.append(np.asarray(rowids, dtype=np.int64))

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The vectors (N, E) as they lie on disk, and their row numbers (N,); none come after."""
        with _write_errors(self._folder):
            self._digests["vectors"] = self._files[0].finish()
            rowids = np.concatenate(self._rowids)
            file = self._start("rows")
            file.write(rowids.astype("<i8").data)
            self._digests["rows"] = file.finish()
        shape = (len(rowids), *self._shape_of_row)
        return _map(self._temporary("vectors"), self._dtype, shape), rowids

    def commit(
        self, info: IndexInfo, index: Any | None, queries: np.ndarray | None = None
    ) -> IndexInfo:
        """Write the index, and the queries (Q, E) given to tune it with, and rename everything
        into place; returns `info` with its files."""
        with _write_errors(self._folder):
            if queries is not None:
                file = self._start("queries")
                file.write(np.ascontiguousarray(queries, dtype="<f4").data)
                self._digests["queries"] = file.finish()
            if index is not None:
                # Through a Python file, because FAISS's own writer neither flushes to disk nor
                # reports that a small file met a full disk.
                file = self._start("faiss")
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
                self._digests["faiss"] = file.finish()
            # The digest keeps two indexes of one generation apart: a reader never meets a file
            # that its index.json does not mean.
            together = hashlib.sha256("".join(sorted(self._digests.values())).encode()).hexdigest()
            stem = f"{info.generation}-{together[:12]}"
            files: dict[str, File] = {}
            for kind, digest in self._digests.items():
                final = self._folder / f"{stem}.{kind}"
                self._temporary(kind).replace(final)
                files[kind] = {"name": final.name, "size": final.stat().st_size, "sha256": digest}
            sync(self._folder)
            info = dataclasses.replace(info, files=files)
            if "faiss" in files:
                info = dataclasses.replace(info, memory_bytes=files["faiss"]["size"])
            content = json.loads(json.dumps(dataclasses.asdict(info)))  # as it will be read
            stored = {
                "format_version": FORMAT_VERSION,
                "sha256": _digest(content),
                "index": content,
            }
            write_atomic(self._folder / INFO_FILE, json.dumps(stored, indent=2) + "\n")
        for kind in _KINDS:
            _remove_files(self._folder, f"*.{kind}", keep=f"{stem}.{kind}")
        return info

    def _start(self, kind: str) -> "_HashedFile":
        self._files.append(_HashedFile(self._temporary(kind)))
        return self._files[-1]

    def _temporary(self, kind: str) -> Path:
        return self._folder / f".{kind}.{os.getpid()}.tmp"


class _HashedFile:
    """A file to write from start to end; `finish` has it on disk and returns its sha256."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> None:
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> str:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not flushed will not be kept
            self._file.close()


def _parse(file: Path) -> IndexInfo:
    """ValueError says how it is damaged."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    try:
        content = stored["index"]
        if stored["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {stored['format_version']} is not {FORMAT_VERSION}")
        if stored["sha256"] != _digest(content):
            raise ValueError("its checksum is wrong")
        content["tuned"] = {int(k): point for k, point in content["tuned"].items()}
        content["filtered"] = {float(s): factor for s, factor in content["filtered"].items()}
        return IndexInfo(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not as an index describes itself: {error!r}") from None


def _check_fit(info: IndexInfo, collection: Collection, generation: int) -> None:
    """ValueError says why the index does not belong to the collection."""
    if info.fingerprint != collection.fingerprint:
        raise ValueError(
            f"it was built for another model, {info.fingerprint[:12]}, and the collection is of"
            f" {collection.fingerprint[:12]}"
        )
    if info.identity != collection.identity or info.generation > generation:
        raise ValueError("it was built from another collection, or from a later state of it")
    if (info.embed_dim, info.dtype) != (collection.embed_dim, collection.dtype.name):
        raise ValueError(f"its vectors are of {info.embed_dim} {info.dtype} each")


def _load(where: Path, info: IndexInfo) -> Cache:
    """ValueError says which file is damaged."""
    with ThreadPoolExecutor(len(_KINDS)) as pool:  # hashing lets other threads run
        for check in [pool.submit(_verify, where, file) for file in info.files.values()]:
            check.result()
    paths = {kind: where / file["name"] for kind, file in info.files.items()}
    shape = (info.count, info.embed_dim)
    vectors = _map(paths["vectors"], np.dtype(info.dtype).newbyteorder("<"), shape)
    rowids = np.fromfile(paths["rows"], "<i8").astype(np.int64, copy=False)
    index = faiss.read_index(str(paths["faiss"])) if "faiss" in paths else None
    if len(rowids) != info.count or (index is not None and index.ntotal != info.count):
        raise ValueError(f"its files do not have the {info.count} vectors that it says")
    return Cache(info, index, vectors, rowids)


def _verify(where: Path, file: File) -> None:
    path = where / file["name"]
    if path.stat().st_size != file["size"] or sha256(path) != file["sha256"]:
        raise ValueError(
            f"{file['name']} is damaged: its sha256 is not the one it was written with"
        )


def _map(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """What is written into it stays in this process; torch refuses memory that is read-only.

    A file that is cut short meanwhile would end the process: nobody may write in place.
    """
    if not shape[0]:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, mode="c", shape=shape)


def _ignore(collection: Collection, info: IndexInfo, reason: str) -> None:
    logger.warning(
        "the %s index of collection %s is ignored: %s; all vectors are compared until it is built"
        " again: clipserve index check %s",
        info.field,
        collection.name,
        reason,
        collection.path,
    )


@contextlib.contextmanager
def _write_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise IndexStoreError(
            f"{where}: the index cannot be written, the old one stays:"
            f" {getattr(error, 'strerror', None) or error}"
        ) from error


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_files(where: Path, pattern: str, keep: str | None = None) -> None:
    """Old files; one that will not go is left for the next build."""
    for file in sorted(where.glob(pattern)):
        if file.name != keep:
            with contextlib.suppress(OSError):
                file.unlink()
