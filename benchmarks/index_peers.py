"""One index under test, in a process of its own; benchmarks/index.py tells it what to do.

    python -m benchmarks.index_peers NAME FOLDER COUNT DIM THREADS QUERIES

Reads commands from stdin, a line of JSON each, and answers each with one. Every contender builds
what it needs into its own folder once, opens that, and answers questions; what they have in common
is timed in `Worker`. Needs only numpy and the contender's own packages: the peers have an
environment of their own, with other versions than ours.

Legend: Q queries, N vectors, E embedding.
"""

import gc
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.index_data import BUCKETS, NUM_QUERIES, ROWS_AT_A_TIME, Data, K, size_of

BATCH = 64
TARGETS = (0.9, 0.95, 0.99)
_CLIP_S = 10.0
"""that measuring a recall may take; slow peers answer fewer of the queries"""

Answer = Any


class Contender(Protocol):
    """A way to search. `knobs` is the largest value of its one search parameter; None for none."""

    packages: tuple[str, ...]
    knob: str
    most: int | None

    def build(self) -> dict[str, Any]:
        """Into the folder; returns what is worth noting."""

    def open(self) -> None: ...

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        """How far to search from now on, and the buckets [first, end) that are let through."""

    def ask(self, queries: np.ndarray) -> Answer:
        """The K best of each query (Q, E), in the contender's own form."""

    def labels(self, answer: Answer) -> list[list[int]]:
        """The places that an answer names."""


class Ours:
    """clipserve: `Searcher` over a collection, at the settings it was tuned to for a target."""

    packages = ("faiss-cpu", "apsw", "torch", "numpy")
    knob, most = "target", None

    def __init__(self, data: Data, folder: Path, threads: int, kind: str) -> None:
        import index.build
        import index.search  # noqa: F401  (all imports come before memory is counted)

        self._data, self._folder, self._threads, self._kind = data, folder, threads, kind
        self._path = folder / "collection"
        self.with_items = False

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
                queries=self._data.queries("tuning"),
                threads=self._threads,
            )
        return {
            "kind": info.kind,
            "reason": info.reason,
            "index_memory_bytes": info.memory_bytes,
        }

    def tune(self) -> dict[str, Any]:
        """For the targets that are not the default, as `build` would with them; of k = 10 alone."""
        import faiss

        import index.tune as tuning
        from index.build import _threads

        tuning._TUNED_K, tuning._FILTERS = {K: NUM_QUERIES}, ()
        stored = self._folder / "tunings.json"
        tunings: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
        base = self._searcher._view.base
        assert base is not None
        assert base.info is not None
        for target in TARGETS if base.info.kind != "exact" else ():
            if str(target) in tunings:
                continue
            started = time.monotonic()
            point = base.info.tuned[K]
            if target != base.info.recall_target:
                index = faiss.read_index(str(next(self._folder.rglob("*.faiss"))))
                with _threads(self._threads):
                    tuned = tuning.tune(index, base._vectors, self._data.queries("tuning"), target)
                point = tuned.tuned[K]
            tunings[str(target)] = dict(point) | {"took_s": round(time.monotonic() - started, 1)}
            stored.write_text(json.dumps(tunings, indent=1))
        self._read_tunings()
        return tunings

    def open(self) -> None:
        from index.search import Searcher

        self._searcher = Searcher(self._path, device="cpu")
        self._read_tunings()

    def _read_tunings(self) -> None:
        import dataclasses

        info = self._searcher.info
        assert info is not None, "the index was not taken; see the log"
        self._infos = {info.recall_target: info}
        stored = self._folder / "tunings.json"
        for target, point in json.loads(stored.read_text()).items() if stored.exists() else ():
            if float(target) == info.recall_target or info.kind == "exact":
                continue
            self._infos[float(target)] = dataclasses.replace(
                info,
                recall_target=float(target),
                tuned={K: {name: value for name, value in point.items() if name != "took_s"}},
            )

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        from index.filters import parse

        base = self._searcher._view.base
        assert base is not None
        wanted = self._infos.get(knob, base.info)
        if wanted is not base.info:
            base.info = wanted  # as if it had been built for that target
            base.plan.cache_clear()
        self._filter = None
        if buckets is not None:
            first, end = buckets
            self._filter = parse({"bucket": {"gte": first, "lt": end}})

    def ask(self, queries: np.ndarray) -> Answer:
        return self._searcher.search(queries, K, filter=self._filter, with_items=self.with_items)

    def labels(self, answer: Answer) -> list[list[int]]:
        return [[int(hit.id) for hit in hits] for hits in answer]


class Faiss:
    """FAISS as its own documentation shows it, its vectors in memory; nprobe is the knob."""

    packages = ("faiss-cpu", "numpy")
    knob = "nprobe"

    def __init__(self, data: Data, folder: Path, threads: int, codes: str) -> None:
        self._data, self._file = data, folder / "index.faiss"
        self._name = f"{_lists(data)},{codes}"
        self._is_refined = codes.endswith("RFlat")
        import faiss

        self._faiss: Any = faiss
        self.most: int | None = int(_lists(data)[3:])

    def build(self) -> dict[str, Any]:
        faiss = self._faiss
        vectors = self._data.vectors()
        index = faiss.index_factory(self._data.dim, self._name, faiss.METRIC_INNER_PRODUCT)
        ivf = faiss.extract_index_ivf(index)
        ivf.cp.spherical = True
        ivf.cp.min_points_per_centroid = 1
        drawn = np.random.default_rng(0).permutation(len(vectors))[: max(50_000, 64 * ivf.nlist)]
        index.train(vectors[np.sort(drawn)])
        for start in range(0, len(vectors), ROWS_AT_A_TIME):
            index.add(np.ascontiguousarray(vectors[start : start + ROWS_AT_A_TIME]))
        faiss.write_index(index, str(self._file))
        return {"kind": self._name}

    def open(self) -> None:
        # Of queries times dimensions, in 1.15: from a few queries on, and not for one alone, its
        # matrix products are faster (4,096 lists: 64 queries 6 ms, not 38; one 0.4 ms, not 1.7).
        self._faiss.cvar.distance_compute_blas_threshold = 4 * self._data.dim
        self._index = self._faiss.read_index(str(self._file))
        self._buckets = self._data.buckets()

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        self._nprobe, self._selector = int(knob), None
        if buckets is not None:
            mask = (self._buckets >= buckets[0]) & (self._buckets < buckets[1])
            bits = np.packbits(mask, bitorder="little")
            self._selector = self._faiss.IDSelectorBitmap(bits)

    def ask(self, queries: np.ndarray) -> Answer:
        selector = {} if self._selector is None else {"sel": self._selector}
        wanted = self._faiss.SearchParametersIVF(nprobe=self._nprobe, **selector)
        if self._is_refined:
            refined = self._faiss.IndexRefineSearchParameters
            wanted = refined(k_factor=2, base_index_params=wanted)
        return self._index.search(queries, K, params=wanted)[1]

    def labels(self, answer: Answer) -> list[list[int]]:
        return [list(row) for row in answer.tolist()]


class Hnswlib:
    """Filters are a Python call for each vector it meets: not measured."""

    packages = ("hnswlib", "numpy")
    knob, most = "ef", 4096

    def __init__(self, data: Data, folder: Path, threads: int) -> None:
        import hnswlib

        self._data, self._threads, self._file = data, threads, folder / "index.hnsw"
        self._index = hnswlib.Index("ip", data.dim)

    def build(self) -> dict[str, Any]:
        settings = {"M": 16, "ef_construction": 200}
        self._index.init_index(self._data.count, **settings)
        self._index.set_num_threads(self._threads)
        vectors = self._data.vectors()
        for start in range(0, len(vectors), ROWS_AT_A_TIME):
            self._index.add_items(vectors[start : start + ROWS_AT_A_TIME])
        self._index.save_index(str(self._file))
        return settings

    def open(self) -> None:
        self._index.load_index(str(self._file))
        self._index.set_num_threads(self._threads)

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        self._index.set_ef(max(K, int(knob)))

    def ask(self, queries: np.ndarray) -> Answer:
        return self._index.knn_query(queries, K)[0]

    def labels(self, answer: Answer) -> list[list[int]]:
        return [list(row) for row in answer.tolist()]


class Usearch:
    """It has no filters in Python."""

    packages = ("usearch", "numpy")
    knob, most = "expansion", 4096

    def __init__(self, data: Data, folder: Path, threads: int) -> None:
        from usearch.index import Index

        self._data, self._threads, self._file = data, threads, folder / "index.usearch"
        self._settings = {"connectivity": 16, "expansion_add": 128, "dtype": "f32"}
        self._index = Index(ndim=data.dim, metric="ip", **self._settings)

    def build(self) -> dict[str, Any]:
        vectors = self._data.vectors()
        for start in range(0, len(vectors), ROWS_AT_A_TIME):
            block = np.ascontiguousarray(vectors[start : start + ROWS_AT_A_TIME])
            keys = np.arange(start, start + len(block))
            self._index.add(keys, block, threads=self._threads)
        self._index.save(str(self._file))
        return self._settings

    def open(self) -> None:
        self._index.load(str(self._file))

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        self._index.expansion_search = max(K, int(knob))

    def ask(self, queries: np.ndarray) -> Answer:
        return self._index.search(queries, K, threads=self._threads).keys

    def labels(self, answer: Answer) -> list[list[int]]:
        return [list(row) for row in np.atleast_2d(answer).tolist()]


class Milvus:
    """milvus-lite behind pymilvus: the same inverted lists, in each of its segments."""

    packages = ("milvus-lite", "pymilvus", "faiss-cpu", "numpy")
    knob = "nprobe"

    def __init__(self, data: Data, folder: Path, threads: int) -> None:
        import pymilvus

        self._pymilvus = pymilvus
        self._data, self._file = data, folder / "milvus.db"
        self._lists = 2 ** round(np.log2(4 * data.count**0.5))
        self.most: int | None = self._lists

    def build(self) -> dict[str, Any]:
        DataType = self._pymilvus.DataType
        client = self._pymilvus.MilvusClient(str(self._file))
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._data.dim)
        schema.add_field("bucket", DataType.INT64)
        client.create_collection("items", schema=schema)
        vectors, buckets = self._data.vectors(), self._data.buckets().tolist()
        for start in range(0, len(vectors), 2048):
            block = vectors[start : start + 2048]
            rows = [
                {"id": start + i, "vector": vector, "bucket": buckets[start + i]}
                for i, vector in enumerate(block)
            ]
            client.insert("items", rows)
        client.flush("items")
        wanted = client.prepare_index_params()
        settings = {"nlist": self._lists}
        wanted.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params=settings)
        client.create_index("items", wanted)
        client.load_collection("items")
        client.close()
        return {"kind": "IVF_FLAT", **settings}

    def open(self) -> None:
        self._client = self._pymilvus.MilvusClient(str(self._file))
        self._client.load_collection("items")

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        self._parameters = {"metric_type": "IP", "params": {"nprobe": int(knob)}}
        self._filter = ""
        if buckets is not None:
            self._filter = f"bucket >= {buckets[0]} and bucket < {buckets[1]}"

    def ask(self, queries: np.ndarray) -> Answer:
        return self._client.search(
            "items",
            list(queries),
            limit=K,
            anns_field="vector",
            filter=self._filter,
            search_params=self._parameters,
        )

    def labels(self, answer: Answer) -> list[list[int]]:
        return [[hit["id"] for hit in hits] for hits in answer]


class Qdrant:
    """qdrant-client's local mode: numpy compares all vectors, Python the metadata.

    In memory: on disk it commits each item by itself, some hundred a second. Above 20,000 items it
    warns that it is not made for so many.
    """

    packages = ("qdrant-client", "numpy")
    knob, most = "", None

    def __init__(self, data: Data, folder: Path, threads: int) -> None:
        import qdrant_client

        self._models: Any = qdrant_client.models
        self._client = qdrant_client.QdrantClient(":memory:")
        self._data = data

    def build(self) -> dict[str, Any]:
        params = self._models.VectorParams(size=self._data.dim, distance=self._models.Distance.DOT)
        self._client.create_collection("items", vectors_config=params)
        vectors, buckets = self._data.vectors(), self._data.buckets().tolist()
        for start in range(0, len(vectors), 2048):
            block = vectors[start : start + 2048]
            ids = list(range(start, start + len(block)))
            payloads = [{"bucket": buckets[place]} for place in ids]
            batch = self._models.Batch(ids=ids, vectors=block.tolist(), payloads=payloads)
            self._client.upsert("items", batch)
        return {"kind": "all compared, in memory alone"}

    def open(self) -> None:
        self.build()

    def set(self, knob: float, buckets: tuple[int, int] | None) -> None:
        self._filter = None
        if buckets is not None:
            between = self._models.Range(gte=buckets[0], lt=buckets[1])
            condition = self._models.FieldCondition(key="bucket", range=between)
            self._filter = self._models.Filter(must=[condition])

    def ask(self, queries: np.ndarray) -> Answer:
        wanted = [
            self._models.QueryRequest(query=query.tolist(), filter=self._filter, limit=K)
            for query in queries
        ]
        return self._client.query_batch_points("items", wanted)

    def labels(self, answer: Answer) -> list[list[int]]:
        return [[point.id for point in response.points] for response in answer]


def contender(name: str, data: Data, folder: Path, threads: int) -> Contender:
    """By its name in benchmarks/index.py: "clipserve KIND", "faiss CODES" or a package."""
    package, _, kind = name.partition(" ")
    if package == "clipserve":
        if kind == "rabitq":
            kind = f"{_lists(data)},RaBitQ"
        return Ours(data, folder, threads, kind)
    if package == "faiss":
        return Faiss(data, folder, threads, kind.replace(" refined", ",RFlat"))
    peers: dict[str, Callable[[Data, Path, int], Contender]]
    peers = {
        "hnswlib": Hnswlib,
        "usearch": Usearch,
        "milvus-lite": Milvus,
        "qdrant-client": Qdrant,
    }
    return peers[package](data, folder, threads)


class Worker:
    """Carries out commands; `batches` of queries go round and round while something is timed."""

    def __init__(self, made: Contender, data: Data, folder: Path, num_queries: int) -> None:
        self._contender, self._data, self._folder = made, data, folder
        self._queries = data.queries()[:num_queries]
        self._before: dict[str, int] = {}

    def build(self) -> dict[str, Any]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        before, started = resident(), time.monotonic()
        noted = self._contender.build()
        return {
            "seconds": round(time.monotonic() - started, 1),
            "peak_extra_bytes": resident()["peak"] - before["total"],
            "disk_bytes": size_of(self._folder),
            "versions": {name: version(name) for name in self._contender.packages},
        } | noted

    def open(self) -> dict[str, Any]:
        self._before, started = resident(), time.monotonic()
        self._contender.open()
        seconds = round(time.monotonic() - started, 2)
        return {"open_s": seconds, "knob": self._contender.knob, "most": self._contender.most}

    def tune(self) -> dict[str, Any]:
        assert isinstance(self._contender, Ours)
        return self._contender.tune()

    def memory(self) -> dict[str, Any]:
        """What opening and searching added, a vector: in memory of its own, and of mapped files."""
        now = resident()
        return {
            f"{kind}_bytes_per_vector": round((now[kind] - self._before[kind]) / self._data.count)
            for kind in ("own", "mapped")
        }

    def recall(self, knob: float, share: float = 1) -> dict[str, Any]:
        """Over all queries, or as many as time allows. It is the warm-up too."""
        self._contender.set(knob, _buckets(share))
        truth, found, asked, started = self._data.truth(share), 0, 0, time.monotonic()
        for start in range(0, len(self._queries), BATCH):
            answer = self._contender.ask(self._queries[start : start + BATCH])
            for labels, best in zip(self._contender.labels(answer), truth[start:], strict=False):
                found += len(set(labels) & set(best[best >= 0].tolist()))
                asked += int((best >= 0).sum())
            if time.monotonic() - started > _CLIP_S:
                break
        return {"recall": round(found / max(1, asked), 4)}

    def speed(self, knob: float, mode: str, seconds: float, share: float = 1) -> dict[str, Any]:
        """mode: "batch" of BATCH, "single" queries, or from two "callers" at once."""
        self._contender.set(knob, _buckets(share))
        if isinstance(self._contender, Ours):
            self._contender.with_items = mode == "single_items"
        work = self._work(BATCH if mode == "batch" else 1)
        self._contender.ask(next(work))  # after `recall`, which has warmed up
        if mode == "callers":
            return self._callers(seconds)
        started, cpu, times, asked = time.perf_counter(), time.process_time(), [], 0
        while (now := time.perf_counter()) - started < seconds or not times:
            some = next(work)
            self._contender.ask(some)
            times.append(time.perf_counter() - now)
            asked += len(some)
        found = {
            "qps": asked / (time.perf_counter() - started),
            "cpu_ms": 1000 * (time.process_time() - cpu) / asked,
        }
        if mode != "batch":
            found["p50_ms"] = 1000 * float(np.percentile(times, 50))
            found["p99_ms"] = 1000 * float(np.percentile(times, 99))
        return found

    def new_filters(self, knob: float, share: float, number: int) -> dict[str, Any]:
        """One query each, with filters that were never seen, all equally selective."""
        times = []
        for some, step in zip(self._work(1), range(number), strict=False):
            first = int((BUCKETS - share * BUCKETS) * (step + 1) / (number + 1)) or step + 1
            started = time.perf_counter()
            self._contender.set(knob, (first, first + max(1, round(share * BUCKETS))))
            self._contender.ask(some)
            times.append(time.perf_counter() - started)
        return {"first_ms": 1000 * times[0], "p50_ms": 1000 * float(np.percentile(times[1:], 50))}

    def _callers(self, seconds: float) -> dict[str, Any]:
        asked, end = [0, 0], time.perf_counter() + seconds

        def ask(caller: int) -> None:
            for some in self._work(1, caller * len(self._queries) // 2):
                self._contender.ask(some)
                asked[caller] += 1
                if time.perf_counter() > end:
                    return

        started = time.perf_counter()
        threads = [threading.Thread(target=ask, args=[caller]) for caller in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"qps": sum(asked) / (time.perf_counter() - started)}

    def _work(self, size: int, first: int = 0) -> Iterator[np.ndarray]:
        starts = range(0, len(self._queries) - size + 1, size)
        return (self._queries[s : s + size] for s in itertools.cycle([*starts[first:], *starts]))


def resident() -> dict[str, int]:
    """Bytes of this process's memory now, and the peak."""
    names = {"VmHWM": "peak", "VmRSS": "total", "RssAnon": "own", "RssFile": "mapped"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def _lists(data: Data) -> str:
    """As many as ours has by itself: "IVF4096"."""
    from index.choose import choose

    return choose("ivf", data.count, data.dim).kind.partition(",")[0]


def _buckets(share: float) -> tuple[int, int] | None:
    return None if share == 1 else (0, round(share * BUCKETS))


def main() -> None:
    name, folder, count, dim, threads, queries = sys.argv[1:]
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    where = Path(folder)
    data = Data(where.parent, int(count), int(dim))
    made = contender(name, data, where, int(threads))
    worker = Worker(made, data, where, int(queries))
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        answers.write(json.dumps(getattr(worker, do)(**command)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
