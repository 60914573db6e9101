"""Collections to export from and import into, and files as other programs write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from index.collection import Collection, Item

E = 8
Make = Callable[..., Collection]
"""make(name, dtype) -> a new collection"""


def maker(folder: Path) -> Make:
    def make(name: str = "new", dtype: str = "float32", fingerprint: str = "a" * 64) -> Collection:
        return Collection.create(
            folder / name, fingerprint=fingerprint, model_name="m", embed_dim=E, dtype=dtype
        )

    return make


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, E))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def items(count: int) -> list[Item]:
    return [
        Item(f"id {i}", f"caption {i}", f"row {i}", {"n": i, "size": {"width": i / 2}, "tags": [i]})
        for i in range(count)
    ]


def fill(collection: Collection, count: int = 10, with_text: bool = False) -> Collection:
    text = unit_vectors(count, 1) if with_text else None
    collection.upsert(items(count), unit_vectors(count), text_vectors=text)
    return collection


def contents(collection: Collection) -> dict[str, Any]:
    """Everything by id, vectors to the last bit."""
    found: dict[str, Any] = {}
    for field in ("image", "text"):
        rowids = collection.rowids(field)
        vectors = collection.vectors_of(rowids, field)
        known = collection.items_of(rowids)
        for rowid, vector in zip(rowids.tolist(), vectors, strict=True):
            found.setdefault(known[rowid].id, [known[rowid]]).append((field, vector.tobytes()))
    return found


def write_npy(folder: Path, number: str, rows: int, **columns: list[Any]) -> None:
    """A part as clip-retrieval writes it."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    vectors = unit_vectors(rows, int(number)).astype(np.float16)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")
