"""Choose, train, tune and store the FAISS index of a collection, and say why.

The index is a cache: `DIR/index.json` names one `DIR/index-*.faiss` with its sha256, the generation
and the model it was built from; whatever does not fit is ignored by the search. Both files are
written aside, flushed and renamed. Start at `build`.

Legend: N vectors, E embedding, Q queries.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.files import sync, write_atomic
from index.backend import overfetch, search_parameters, set_blas_threshold
from index.collection import Collection, directory_lock

logger = logging.getLogger(__name__)
faiss: Any = untyped_faiss  # its stubs lack half of what is used here

FORMAT_VERSION = 1
INFO_FILE = "index.json"
EXACT_LIMIT = 200_000
"""vectors up to which every one is compared: 0.4 GB and about 50 ms on one core at E = 512"""
RECALL_TARGET = 0.95

_KIND = re.compile(r"IVF([1-9]\d{0,6}),(SQ8|Flat)")
_TRAINING_PER_LIST = 50
_NUM_QUERIES = 256
_TUNED_K = (10, 100, 1000)
_SEED = 0


@dataclass(frozen=True)
class IndexInfo:
    """What an index is, why, and what it was measured to find."""

    kind: str
    """ "exact", or FAISS's name of it, such as "IVF2048,SQ8" """
    reason: str
    count: int
    seconds: float
    size_bytes: int
    generation: int
    """of the collection when it was read"""
    max_rowid: int
    """rows above it came later and are scanned beside the index"""
    fingerprint: str
    """of the model whose vectors are in it"""
    identity: str
    """of the collection"""
    faiss_version: str
    file: str | None = None
    sha256: str | None = None
    nprobe: dict[int, int] = field(default_factory=dict)
    """k -> lists to search when k are wanted"""
    recall: dict[int, float] = field(default_factory=dict)
    """k -> fraction of the true best k that were found with that nprobe"""


def build(
    collection: Collection,
    *,
    kind: str = "auto",
    exact_limit: int = EXACT_LIMIT,
    recall_target: float = RECALL_TARGET,
) -> IndexInfo:
    """Build the index of a collection and put it in place of the one before.

    kind: "auto" (exact up to `exact_limit` vectors), "exact", "ivf", or "IVF<lists>,SQ8" or
    "IVF<lists>,Flat". Writers and searches go on meanwhile. IndexStoreError if another process is
    building, or nothing can be written; the old index stays then.
    """
    with directory_lock(collection.path, ".index.lock", wait=False):
        started = time.monotonic()
        _remove_files(collection.path, ".index-*.tmp")
        with collection.snapshot() as generation:
            rowids = collection.rowids()
            chosen, reason = _choose(kind, len(rowids), collection.embed_dim, exact_limit)
            fields: dict[str, Any] = {}
            index = None
            if chosen != "exact":
                index, nprobe, recall = _train(collection, rowids, chosen, recall_target)
                reason += _describe(nprobe, recall, recall_target)
                fields |= {"nprobe": nprobe, "recall": recall}
        if index is not None:
            fields |= _write_index(collection.path, generation, index)
        info = IndexInfo(
            kind=chosen,
            reason=reason,
            count=len(rowids),
            generation=generation,
            max_rowid=int(rowids[-1]) if len(rowids) else 0,
            fingerprint=collection.fingerprint,
            identity=collection.identity,
            faiss_version=faiss.__version__,
            seconds=time.monotonic() - started,
            **({"size_bytes": 0} | fields),
        )
        _write_info(collection.path, info)
        _remove_files(collection.path, "index-*.faiss", keep=info.file)
    logger.info("index of %s: %s, %s", collection.path, info.kind, info.reason)
    return info


def read_info(path: Path) -> IndexInfo | None:
    """The index of the collection in `path`; None, with a warning if damaged, if there is none."""
    file = path / INFO_FILE
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        content = stored["index"]
        if stored["sha256"] != _digest(content):
            raise ValueError("its checksum is wrong")
        if stored["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {stored['format_version']} is not {FORMAT_VERSION}")
        for name in ("nprobe", "recall"):
            content[name] = {int(k): value for k, value in content[name].items()}
        return IndexInfo(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is ignored: %s; build the index again", file, error)
        return None


def _choose(kind: str, count: int, embed_dim: int, exact_limit: int) -> tuple[str, str]:
    """The kind to build, and why."""
    lists = 2 ** round(math.log2(4 * math.sqrt(max(count, 1))))
    if kind == "exact":
        return "exact", "asked for; every vector is compared with the query"
    if kind == "auto" and count <= exact_limit:
        return "exact", (
            f"{count:,} vectors are at most {exact_limit:,}: comparing each with the query is fast"
            " and misses none"
        )
    if kind in ("auto", "ivf"):
        cost = count * embed_dim * 4 / 2**20
        why = f"more than {exact_limit:,}" if kind == "auto" else "asked for"
        chosen = f"IVF{lists},SQ8"
        reason = (
            f"{count:,} vectors ({why}), an exact scan reads {cost:,.0f} MiB a query;"
            f" 2^round(log2(4 sqrt N)) = {lists} lists, one byte a dimension, the best candidates"
            " scored again exactly"
        )
    else:
        chosen, reason = kind, "asked for; the best candidates are scored again exactly"
    found = _KIND.fullmatch(chosen)
    if found is None:
        raise ConfigError(
            f"unknown index kind {kind!r}; use auto, exact, ivf, IVF<lists>,SQ8 or IVF<lists>,Flat"
        )
    if int(found[1]) > count:
        raise ConfigError(f"{chosen} has more lists than the {count} vectors; use kind exact")
    return chosen, reason


def _train(
    collection: Collection, rowids: np.ndarray, kind: str, recall_target: float
) -> tuple[Any, dict[int, int], dict[int, float]]:
    """The filled index, and for each tuned k the nprobe and its measured recall."""
    set_blas_threshold()
    random = np.random.default_rng(_SEED)
    index = faiss.index_factory(collection.embed_dim, kind, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    index.cp.min_points_per_centroid = 1  # only silences a line on stderr
    drawn = random.permutation(rowids)
    num_queries = min(_NUM_QUERIES, max(1, len(rowids) // 10))
    num_training = min(len(rowids), index.nlist * _TRAINING_PER_LIST)
    held_out, training = drawn[:num_queries], drawn[-num_training:]
    index.train(collection.vectors_of(np.sort(training)))
    queries = _perturb(collection.vectors_of(held_out), random)
    ks = [k for k in _TUNED_K if k <= len(rowids)] or [len(rowids)]
    truth = _add_all(collection, index, queries, ks[-1])
    nprobe, recall = {}, {}
    for k in ks:
        nprobe[k], recall[k] = _tune(index, queries, truth[:, :k], recall_target)
    return index, nprobe, recall


def _perturb(vectors: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Queries at a cosine of about 0.7 to stored vectors.

    Text queries, which search is for, are farther from pictures than other pictures are, and a
    stored vector as its own query would always find itself.
    """
    noise = random.standard_normal(vectors.shape, dtype=np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    queries = vectors + noise
    return np.ascontiguousarray(queries / np.linalg.norm(queries, axis=1, keepdims=True))


def _add_all(collection: Collection, index: Any, queries: np.ndarray, k: int) -> np.ndarray:
    """Fill the index; returns the true best k rows of each query (Q, k)."""
    best = np.full((len(queries), 0), 0, dtype=np.float32)
    truth = np.full((len(queries), 0), -1, dtype=np.int64)
    for rowids, vectors in collection.vector_blocks():
        index.add_with_ids(vectors, rowids)
        scores, places = faiss.knn(
            queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best = np.concatenate([best, scores], axis=1)
        truth = np.concatenate([truth, rowids[places]], axis=1)
        order = np.argsort(-best, axis=1)[:, :k]
        best = np.take_along_axis(best, order, axis=1)
        truth = np.take_along_axis(truth, order, axis=1)
    return truth


def _tune(
    index: Any, queries: np.ndarray, truth: np.ndarray, recall_target: float
) -> tuple[int, float]:
    """The least power of two of lists that reaches the target, and the recall it reaches."""
    k = truth.shape[1]
    nprobe = 1
    while True:
        parameters = search_parameters({k: nprobe}, nprobe)
        _, found = index.search(queries, min(overfetch(k), index.ntotal), params=parameters)
        hits = sum(int(np.isin(truth[i], found[i]).sum()) for i in range(len(truth)))
        recall = hits / truth.size
        if recall >= recall_target or nprobe >= index.nlist:
            return nprobe, recall
        nprobe = min(2 * nprobe, index.nlist)


def _describe(nprobe: dict[int, int], recall: dict[int, float], target: float) -> str:
    k = min(nprobe)
    return (
        f"; recall@{k} {recall[k]:.3f} (target {target:g}) with {nprobe[k]} lists searched,"
        " measured with noisy copies of stored vectors"
    )


def _write_index(path: Path, generation: int, index: Any) -> dict[str, Any]:
    """Write aside and rename; returns file, sha256 and size_bytes.

    Through a Python file, because FAISS's own writer neither flushes to disk nor reports that a
    small file met a full disk.
    """
    temporary = path / f".index-{generation}.{os.getpid()}.tmp"
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            faiss.write_index(index, faiss.PyCallbackIOWriter(write))
            file.flush()
            os.fsync(file.fileno())
            size_bytes = file.tell()
        # The digest keeps two indexes of one generation apart: a reader never meets a file that
        # its index.json does not mean.
        final = path / f"index-{generation}-{digest.hexdigest()[:12]}.faiss"
        temporary.replace(final)
        sync(path)
    except (OSError, RuntimeError) as error:
        raise IndexStoreError(
            f"{path}: the index cannot be written, the old one stays:"
            f" {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": final.name, "sha256": digest.hexdigest(), "size_bytes": size_bytes}


def _write_info(path: Path, info: IndexInfo) -> None:
    content = json.loads(json.dumps(asdict(info)))  # as it will be read: text keys
    stored = {"format_version": FORMAT_VERSION, "sha256": _digest(content), "index": content}
    try:
        write_atomic(path / INFO_FILE, json.dumps(stored, indent=2) + "\n")
    except OSError as error:
        raise IndexStoreError(
            f"{path / INFO_FILE} cannot be written, the old index stays: {error.strerror}"
        ) from error


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_files(path: Path, pattern: str, keep: str | None = None) -> None:
    """Old files; one that will not go is left for the next build."""
    for file in sorted(path.glob(pattern)):
        if file.name != keep:
            with contextlib.suppress(OSError):
                file.unlink()
