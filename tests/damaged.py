"""A collection to damage, and how: by bits of its files, or from inside its database."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from index.collection import DATABASE, Collection, Item
from index.sqlite import connect

MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 64}
PAGE = 16384


def vectors(count: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def fill(path: Path) -> Path:
    """A collection of 600 items with everything, in many pages; closed cleanly."""
    with Collection.create(path, **MODEL) as collection:
        items = [Item(f"{i:03d}", "x" * 200, metadata={"n": i}) for i in range(600)]
        pictures = [b"j" * 400] * 600
        collection.upsert(items, vectors(600), pictures, text_vectors=vectors(600, seed=1))
        collection.delete(["000"])
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The database, to write into it what clipserve never would; its checksums stay right."""
    with contextlib.closing(connect(path / DATABASE, "mode=rw")) as connection:
        yield connection


def leaf_of(path: Path, tree: str) -> int:
    """Where the second-last leaf page of a table or an index begins, in bytes; or its only one."""
    with opened(path) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        ((root,),) = connection.execute(query, (tree,)).fetchall()
    data = (path / DATABASE).read_bytes()
    start = (root - 1) * PAGE
    if data[start] in (10, 13):  # a leaf
        return start
    count = int.from_bytes(data[start + 3 : start + 5], "big")
    cell = int.from_bytes(data[start + 12 + 2 * (count - 1) :][:2], "big")
    return (int.from_bytes(data[start + cell :][:4], "big") - 1) * PAGE


def flip(file: Path, position: int, bit: int = 3) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        (value,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([value ^ 1 << bit]))
