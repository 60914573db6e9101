"""What ours is compared with: FAISS itself and other libraries, each as its documents show it.

Needs only numpy and the contender's own packages: the peers have an environment of their own, with
other versions than ours. Start at `Contender`.

Legend: Q queries, N vectors, E embedding.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.index.data import ROWS_AT_A_TIME, Data, K

Answer = Any


class Contender(Protocol):
    """A way to search. `knobs` is the largest value of its one search parameter; None for none."""

    packages: tuple[str, ...]
    knob: str
    most: int | None

    def build(self) -> dict[str, Any]:
        """Into the folder; returns what is worth noting."""

    def open(self) -> None: ...

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
        """How far to search from now on, and the buckets [first, end) that are let through."""

    def ask(self, queries: np.ndarray) -> Answer:
        """The K best of each query (Q, E), in the contender's own form."""

    def labels(self, answer: Answer) -> list[list[int]]:
        """The places that an answer names."""


class Faiss:
    """Its vectors are in memory; nprobe is the knob. All kinds share the lists trained for SQ8."""

    packages = ("faiss-cpu", "numpy")
    knob = "nprobe"

    def __init__(self, data: Data, folder: Path, threads: int, codes: str) -> None:
        import faiss

        self._faiss: Any = faiss
        self._data, self._file, self._codes = data, folder / "index.faiss", codes
        self._lists = 2 ** round(np.log2(4 * data.count**0.5))  # as many as ours has by itself
        self.most: int | None = self._lists

    def build(self) -> dict[str, Any]:
        vectors = self._data.vectors()
        if self._codes == "SQ8":
            index = self._train(vectors)
        else:
            index = self._faiss.read_index(str(self._data.folder / "faiss-SQ8" / "index.faiss"))
            index = (self._with_floats if self._codes == "Flat" else self._refined)(index, vectors)
        self._faiss.write_index(index, str(self._file))
        return {"kind": f"IVF{self._lists},{self._codes}"}

    def _train(self, vectors: np.ndarray) -> Any:
        name, metric = f"IVF{self._lists},SQ8", self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.index_factory(self._data.dim, name, metric)
        index.cp.spherical = True
        index.cp.min_points_per_centroid = 1
        drawn = np.random.default_rng(0).permutation(len(vectors))
        index.train(vectors[np.sort(drawn[: max(50_000, 64 * self._lists)])])
        self._fill(index, vectors)
        return index

    def _fill(self, index: Any, vectors: np.ndarray) -> None:
        for start in range(0, len(vectors), ROWS_AT_A_TIME):
            index.add(np.ascontiguousarray(vectors[start : start + ROWS_AT_A_TIME]))

    def _with_floats(self, trained: Any, vectors: np.ndarray) -> Any:
        """The same lists, of vectors and not of their codes."""
        faiss, lists = self._faiss, trained.invlists
        index = faiss.IndexIVFFlat(trained.quantizer, trained.d, trained.nlist, trained.metric_type)
        self._trained = trained  # it has the quantizer
        for number in range(trained.nlist):
            if size := lists.list_size(number):
                ids = np.array(faiss.rev_swig_ptr(lists.get_ids(number), size))
                codes = vectors[ids].view(np.uint8)
                pointers = faiss.swig_ptr(ids), faiss.swig_ptr(codes)
                index.invlists.add_entries(number, size, *pointers)
        index.ntotal, index.is_trained = trained.ntotal, True
        return index

    def _refined(self, trained: Any, vectors: np.ndarray) -> Any:
        flat = self._faiss.IndexFlatIP(self._data.dim)
        self._fill(flat, vectors)
        return self._faiss.IndexRefine(trained, flat)

    def open(self) -> None:
        # Of queries times dimensions, in 1.15: from a few queries on, and not for one alone, its
        # matrix products are faster (4,096 lists: 64 queries 6 ms, not 38; one 0.4 ms, not 1.7).
        self._faiss.cvar.distance_compute_blas_threshold = 4 * self._data.dim
        self._index = self._faiss.read_index(str(self._file))
        self._buckets = self._data.buckets()

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
        self._nprobe, self._selector = int(knob), None
        if buckets is not None:
            mask = (self._buckets >= buckets[0]) & (self._buckets < buckets[1])
            bits = np.packbits(mask, bitorder="little")
            self._selector = self._faiss.IDSelectorBitmap(bits)

    def ask(self, queries: np.ndarray) -> Answer:
        selector = {} if self._selector is None else {"sel": self._selector}
        wanted = self._faiss.SearchParametersIVF(nprobe=self._nprobe, **selector)
        if self._codes == "SQ8 refined":
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
        settings = {"M": 16, "ef_construction": 100}
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

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
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

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
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

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
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

    def set(self, knob: float, buckets: tuple[int, int] | None, with_items: bool) -> None:
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
