"""Choose, train, fill, tune and store the index of a collection, and say why.

The vectors are copied out of one snapshot of the collection into a file, from which everything else
is made a block at a time: the memory it takes is the index, a sample to train on, and some blocks.
Start at `build` and `rebuild`; what is on disk afterwards is in `cache.py`.

Legend: N vectors, E embedding, Q queries.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import faiss as untyped_faiss
import numpy as np

from clipserve.errors import ConfigError
from index.backends.faiss_cpu import is_ivf, set_blas_threshold
from index.cache import Writer, read_info, read_queries
from index.choose import EXACT_LIMIT, choose
from index.collection import Collection, directory_lock
from index.info import Asked, IndexInfo
from index.tune import MAX_QUERIES, NUM_QUERIES, blocks, gather, held_out, noisy_copies, tune

__all__ = ["EXACT_LIMIT", "RECALL_TARGET", "IndexInfo", "build", "read_info", "rebuild"]

logger = logging.getLogger(__name__)
faiss: Any = untyped_faiss  # its stubs lack half of what is used here

RECALL_TARGET = 0.95

_TRAINING_PER_LIST = 50
_LEAST_TRAINING = 50_000
"""vectors, for the codes, where there are few lists or none"""
_LEAST_QUERIES = 32
"""of which a recall tells more than of noisy copies"""
_SEED = 0
_TAKES_LISTS = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFRaBitQ)
"""IVF kinds that add vectors whose lists are known"""


def build(
    collection: Collection,
    *,
    kind: str = "auto",
    field: str = "image",
    queries: np.ndarray | None = None,
    exact_limit: int = EXACT_LIMIT,
    recall_target: float = RECALL_TARGET,
    memory_bytes: int | None = None,
    threads: int | None = None,
) -> IndexInfo:
    """Build the index of a collection's vectors and put it in place of the one before.

    kind, exact_limit and memory_bytes are as for `choose`. It is tuned to the recall target with
    queries (Q, E) as people ask them; without, with the collection's text vectors if `field` is
    "image" and there are some. Those that are stored vectors are left out; if that leaves too few,
    it is tuned with noisy copies of stored vectors. Writers and searches go on meanwhile.
    IndexStoreError if another process is building, or nothing can be written; the old index stays
    then. ConfigError if it cannot be built as asked for.
    """
    if queries is not None:
        queries = _check_queries(queries, collection.embed_dim)
    asked = Asked(kind=kind, exact_limit=exact_limit, memory_bytes=memory_bytes)
    with directory_lock(collection.path, ".index.lock", wait=False), _threads(threads):
        return _build(collection, field, asked, recall_target, queries)


def rebuild(
    collection: Collection,
    *,
    kind: str | None = None,
    field: str = "image",
    queries: np.ndarray | None = None,
    recall_target: float | None = None,
    memory_bytes: int | None = None,
    threads: int | None = None,
) -> IndexInfo:
    """Build the index anew as the one in place was asked for, from what is stored now.

    What is given takes the place of what was asked then; otherwise as `build`.
    """
    if queries is not None:
        queries = _check_queries(queries, collection.embed_dim)
    with directory_lock(collection.path, ".index.lock", wait=False), _threads(threads):
        # Read under the lock: what another process asked for a moment ago must not be undone.
        before = read_info(collection.path, field)
        if before and before.fingerprint != collection.fingerprint:
            before = None
        asked = Asked(kind="auto", exact_limit=EXACT_LIMIT, memory_bytes=None)
        if before:
            asked = before.asked or asked
            if queries is None:
                queries = read_queries(collection.path, before)
            if recall_target is None:
                recall_target = before.recall_target
        if kind is not None:
            asked["kind"] = kind
        if memory_bytes is not None:
            asked["memory_bytes"] = memory_bytes
        target = RECALL_TARGET if recall_target is None else recall_target
        return _build(collection, field, asked, target, queries)


def _build(
    collection: Collection,
    field: str,
    asked: Asked,
    recall_target: float,
    queries: np.ndarray | None,
) -> IndexInfo:
    """With the lock held."""
    with Writer(collection.path, field, collection.embed_dim, collection.dtype) as writer:
        started = time.monotonic()
        with collection.snapshot() as generation:
            choice = choose(
                asked["kind"],
                len(collection.rowids(field)),
                collection.embed_dim,
                exact_limit=asked["exact_limit"],
                memory_bytes=asked["memory_bytes"],
            )
            for rowids, vectors in collection.vector_blocks(field=field):
                writer.append(rowids, vectors)
            texts = _own_texts(collection) if field == "image" and queries is None else None
        vectors, rowids = writer.finish()
        info = IndexInfo(
            kind=choice.kind,
            reason=choice.reason,
            field=field,
            count=len(rowids),
            embed_dim=collection.embed_dim,
            dtype=collection.dtype.name,
            generation=generation,
            max_rowid=int(rowids[-1]) if len(rowids) else 0,
            fingerprint=collection.fingerprint,
            identity=collection.identity,
            faiss_version=faiss.__version__,
            seconds=0.0,
            memory_bytes=choice.memory_bytes,
            recall_target=recall_target,
            asked=asked,
        )
        index = None
        if choice.kind != "exact":
            random = np.random.default_rng(_SEED)
            index = _fill(choice.kind, vectors, random)
            info = _tune(info, index, vectors, queries, texts, random)
        info = dataclasses.replace(info, seconds=round(time.monotonic() - started, 3))
        info = writer.commit(info, index, queries)
    logger.info("%s index of %s: %s, %s", field, collection.path, info.kind, info.reason)
    return info


def _fill(kind: str, vectors: np.ndarray, random: np.random.Generator) -> Any:
    """A FAISS index, trained on some of the vectors and filled with all."""
    from index import lists  # and torch, which takes its time

    index, centers = _train(kind, vectors, random)
    for _, block in blocks(vectors):
        if centers is None or not isinstance(index, _TAKES_LISTS):
            index.add(block)
        else:
            into = lists.assign(block, centers)
            index.add_core(len(block), faiss.swig_ptr(block), None, faiss.swig_ptr(into))
    return index


def _train(
    kind: str, vectors: np.ndarray, random: np.random.Generator
) -> tuple[Any, np.ndarray | None]:
    """An empty index, and the centers of its lists if it has some. ConfigError if it cannot be."""
    from index import lists

    set_blas_threshold()
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    num_training, centers = _LEAST_TRAINING, None
    if is_ivf(index):
        num_training = max(num_training, index.nlist * _TRAINING_PER_LIST)
    sample = _sample(vectors, num_training, random)
    if is_ivf(index):
        centers = lists.train(sample, index.nlist, random)
        index.quantizer.add(centers)
    try:
        index.train(sample)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{kind} cannot be trained on {len(sample)} vectors; use kind exact: {reason}"
        ) from error
    return index, centers


def _tune(
    info: IndexInfo,
    index: Any,
    vectors: np.ndarray,
    queries: np.ndarray | None,
    texts: np.ndarray | None,
    random: np.random.Generator,
) -> IndexInfo:
    """`info` with what was measured, with the best queries there are."""
    queries, asked = _best_queries(vectors, queries, texts, random)
    tuning = tune(index, vectors, queries, info.recall_target)
    k, point = next(iter(tuning.tuned.items()))
    reason = (
        f"{info.reason}; recall@{k} {point['recall']:.3f} (target {info.recall_target:g}) at"
        f" breadth {point['breadth']} with {point['fetch']} candidates, {point['ms']:.2f} ms a"
        f" query, measured with {asked}"
    )
    if point["recall"] < info.recall_target:
        reason += "; the target is out of reach of this kind of index"
        logger.warning("%s index %s: %s", info.field, info.kind, reason)
    return dataclasses.replace(
        info,
        reason=reason,
        queries=asked,
        tuned=tuning.tuned,
        filtered=tuning.filtered,
        curve=tuning.curve,
    )


def _best_queries(
    vectors: np.ndarray,
    given: np.ndarray | None,
    texts: np.ndarray | None,
    random: np.random.Generator,
) -> tuple[np.ndarray, str]:
    """What to tune with, and how to call it: no stored vectors, if that leaves enough others."""
    best, what = given, "given queries"
    if best is None:
        best, what = texts, "text vectors of the collection"
    if best is not None:
        others = held_out(best, vectors)
        if len(others) == len(best):
            return best, f"{len(best)} {what}"
        if len(others) >= _LEAST_QUERIES:
            return others, f"{len(others)} of {len(best)} {what}, which are no stored vectors"
    noisy = noisy_copies(_sample(vectors, NUM_QUERIES, random), random)
    return noisy, f"{len(noisy)} noisy copies of stored vectors"


def _own_texts(collection: Collection) -> np.ndarray | None:
    rowids = collection.rowids("text")
    if len(rowids) < _LEAST_QUERIES:
        return None
    random = np.random.default_rng(_SEED)
    drawn = random.choice(rowids, min(MAX_QUERIES, len(rowids)), replace=False)
    return collection.vectors_of(np.sort(drawn), "text")[random.permutation(len(drawn))]


def _sample(vectors: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Up to `count` of the vectors, float32."""
    drawn = random.choice(len(vectors), min(count, len(vectors)), replace=False)
    return gather(vectors, np.sort(drawn))


def _check_queries(queries: np.ndarray, embed_dim: int) -> np.ndarray:
    """The first of them, of unit length, float32."""
    queries = np.asarray(queries[:MAX_QUERIES], dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != embed_dim or not len(queries):
        raise ConfigError(
            f"queries of shape {queries.shape} to tune with; they must be (number, {embed_dim})"
        )
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ConfigError("a query to tune with is zero or not finite; leave it out")
    return np.asarray(queries / lengths)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """FAISS's number of threads, for what this thread asks of it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
