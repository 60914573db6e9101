"""clipserve as a contender: `Searcher` over a collection, at the settings it was tuned to."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index.data import Data, K


class Ours:
    """It has no knob: it is built for a target."""

    packages = ("faiss-cpu", "apsw", "torch", "numpy")
    knob, most = "", None

    def __init__(self, data: Data, folder: Path, threads: int, kind: str, target: float) -> None:
        import index.build
        import index.search  # noqa: F401  (all imports come before memory is counted)

        self._data, self._path, self._threads = data, folder / "collection", threads
        self._kind, self._target = kind, target

    def build(self) -> dict[str, Any]:
        from index.build import build
        from index.collection import Collection

        self._path.mkdir()
        for file in self._data.collection.iterdir():  # one database, an index of its own
            if file.name != "indexes":
                (self._path / file.name).symlink_to(file.resolve())
        with Collection.open(self._path) as collection:
            info = build(
                collection,
                kind=self._kind,
                recall_target=self._target,
                queries=self._data.queries("tuning"),
                threads=self._threads,
            )
        found = {"kind": info.kind, "reason": info.reason, "index_bytes": info.memory_bytes}
        return found | ({"setting": info.tuned[K]} if info.tuned else {})

    def open(self) -> None:
        from index.search import Searcher

        self._searcher = Searcher(self._path, device="cpu")
        assert self._searcher.info is not None, "the index was not taken; see the log"

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
        from index.filters import parse

        self._filter, self._with_items = None, with_items
        if buckets is not None:
            first, end = buckets
            self._filter = parse({"bucket": {"gte": first, "lt": end}})

    def ask(self, queries: np.ndarray) -> Any:
        return self._searcher.search(queries, K, filter=self._filter, with_items=self._with_items)

    def labels(self, answer: Any) -> list[list[int]]:
        return [[int(hit.id) for hit in hits] for hits in answer]
