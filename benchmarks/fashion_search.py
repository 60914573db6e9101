"""Retrieval with a model that was trained on what it searches: the fashion set, all of its 20,000.

    python -m benchmarks.fashion_search MODEL [--data ../shared/data/fashion] [--queries 2000]
        [--kinds exact IVF128,SQ8] [--recall 0.95] [--k-test 16] [--out FILE.json]

The train pictures are embedded into a collection with their thumbnails, one index of each kind is
tuned to --recall on captions of the validation set, and other captions, each of whose picture is in
the collection, are searched for. Measured: the part of the exact search's ten hits that the index
finds, recall@1, 5, 10 of each caption's own picture (and of any with the same caption) by the exact
search and by the index, and, with an ALBEF, the same after its matching head has ordered the first
k_test anew.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

import clipserve
from benchmarks.embedding import processor
from clipserve.config import RerankScore
from clipserve.model import Model
from clipserve.sources import Record, read_source
from index.build import RECALL_TARGET, build
from index.collection import Collection
from index.embed_corpus import embed_corpus
from index.rerank import rerank
from index.search import Hit, Searcher

PACKAGES = ("torch", "faiss-cpu", "numpy")
KS = (1, 5, 10)
SEED = 0


def main() -> None:
    arguments = read_arguments()
    model = clipserve.load(arguments.model)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        path = Path(scratch) / "fashion"
        report = embed_corpus(model, str(arguments.data / "train-*.tar"), path)
        with Collection.open(path) as collection:
            texts, own = queries_of(arguments.data / "train-*.tar", arguments.queries)
            tuning, _ = queries_of(arguments.data / "val-*.tar", 1000)
            measured = measure(model, collection, texts, own, tuning, arguments)
    result = {
        "benchmark": "fashion_search",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "model": {
            "objectives": list(model.info.objective),
            "training": model.info.training,
            "fingerprint": model.info.fingerprint,
        },
        "items": report.added,
        "items_per_second": report.added / report.seconds,
        "queries": len(texts),
        "recall_target": arguments.recall,
        "k_test": arguments.k_test,
        **measured,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    model: Model,
    collection: Collection,
    texts: Sequence[str],
    own: Sequence[str],
    tuning: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The exact search first, by which the indexes are judged."""
    vectors, tuned_with = model.embed_texts(texts), model.embed_texts(tuning)
    kinds: dict[str, Any] = {}
    exact: list[list[Hit]] = []
    for kind in arguments.kinds:
        info = build(collection, kind=kind, queries=tuned_with, recall_target=arguments.recall)
        with Searcher(collection.path) as searcher:
            started = time.perf_counter()
            hits = searcher.search(vectors, 50)
            seconds = time.perf_counter() - started
        exact = exact or hits
        kinds[kind] = {
            "built_in_s": info.seconds,
            "queries_per_second": len(texts) / seconds,
            "of_exact_10": same(hits, exact, 10),
            **recalls(hits, texts, own),
        }
        tell(kind, kinds[kind])
    matched: dict[str, Any] = {}
    if model.has_fusion:
        for score in arguments.scores:
            found = rerank(model, texts, exact, collection, k_test=arguments.k_test, score=score)
            matched[score] = recalls(found.hits, texts, own)
            matched[score]["pairs_per_second"] = found.pairs_per_second
            tell(score, matched[score])
    return {"kinds": kinds, "reranked": matched}


def queries_of(source: Path, count: int) -> tuple[list[str], list[str]]:
    """Captions, and the ids of the pictures they describe; drawn once and for all."""
    records = [record for record in read_source(source) if isinstance(record, Record)]
    chosen = np.random.default_rng(SEED).permutation(len(records))[:count]
    return [records[i].captions[0] for i in chosen], [records[i].key for i in chosen]


def recalls(
    hits: Sequence[Sequence[Hit]], texts: Sequence[str], own: Sequence[str]
) -> dict[str, float]:
    """Of each caption's own picture, and of any that has the same caption: a third have."""
    found = {}
    for k in KS:
        first = [few[:k] for few in hits]
        exactly = [id in {hit.id for hit in few} for few, id in zip(first, own, strict=True)]
        alike = [
            text in {hit.caption for hit in few} for few, text in zip(first, texts, strict=True)
        ]
        found |= {f"t2i_r{k}": float(np.mean(exactly)), f"caption_r{k}": float(np.mean(alike))}
    return found


def same(hits: Sequence[Sequence[Hit]], exact: Sequence[Sequence[Hit]], k: int) -> float:
    """The part of the exact search's first k that was found among the first k."""
    common = [
        len({hit.id for hit in a[:k]} & {hit.id for hit in b[:k]}) / k
        for a, b in zip(hits, exact, strict=True)
    ]
    return float(np.mean(common))


def tell(name: str, numbers: dict[str, float]) -> None:
    told = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    sys.stdout.write(f"{name:24} {told}\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/fashion"))
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", default=["exact", "IVF128,SQ8", "HNSW32,Flat"])
    parser.add_argument("--recall", type=float, default=RECALL_TARGET)
    parser.add_argument("--k-test", type=int, default=16)
    scores = ["matching+contrastive", "matching"]
    parser.add_argument("--scores", nargs="+", choices=get_args(RerankScore), default=scores)
    parser.add_argument("--scratch", type=Path, help="where the collection is put meanwhile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fashion_search.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
