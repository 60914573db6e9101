"""Durable upserts per second, in batches of 100, and whether the next query finds them.

    python -m benchmarks.upserts [--items 50000] [--folder DIR] [--out FILE.json]

Vectors of 512 dimensions and about 200 bytes of metadata, no thumbnails; every batch is on disk
when it counts. Vectors in the database, as a collection keeps them, in float32 and float16, beside
the alternative: appended to a segment file that is flushed before the commit which names their
place. The ways take turns, several rounds, and the median counts. FOLDER must be on the disk that
is to be measured.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from benchmarks.embedding import processor
from index import database
from index.collection import Collection, Item
from index.database import Database
from index.items import check_item
from index.search import Searcher

PACKAGES = ("apsw", "numpy", "faiss-cpu")
EMBED_DIM = 512
BATCH = 100
MODEL = {"fingerprint": "0" * 64, "model_name": "none", "embed_dim": EMBED_DIM}

Upsert = Callable[[list[Item], np.ndarray], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upserts.json"))
    arguments = parser.parse_args()
    ways = {
        "database, float32": lambda path: InDatabase(path, "float32"),
        "database, float16": lambda path: InDatabase(path, "float16"),
        "segment file, float32": lambda path: InSegment(path),
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        flushes = flushes_per_s(Path(folder))
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                path = Path(folder) / "pets"
                rounds[name].append(measure(way, path, arguments.items))
                shutil.rmtree(path)
        found = next_query(Path(folder) / "pets")
    results = {name: medians(of) for name, of in rounds.items()}
    segment = results["segment file, float32"]
    rows = segment["bytes_per_item"] - segment["of_that_the_segment"]  # without vectors
    for result in results.values():
        del result["of_that_the_segment"]
        result["bytes_per_vector"] = round(result["bytes_per_item"] - rows)
    report = {
        "benchmark": "upserts",
        "unit": "durable upserts per second in batches of 100, median of rounds; milliseconds a"
        " batch; bytes of disk",
        "items": arguments.items,
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "flushes_of_4_kb_per_s": round(flushes),
        },
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "sqlite": apsw.sqlite_lib_version()},
        "results": results | {"next query": found},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


class InDatabase:
    """As clipserve does it."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.collection = Collection.open_or_create(path, **MODEL, dtype=dtype)
        self.upsert = self.collection.upsert

    def close(self) -> None:
        self.collection.close()


class InSegment:
    """Vectors with a checksum at the end of a file, flushed; then a row that says where."""

    def __init__(self, path: Path) -> None:
        schema = (
            """CREATE TABLE items (
                rowid INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, caption TEXT NOT NULL,
                source TEXT NOT NULL, metadata TEXT NOT NULL, place INTEGER NOT NULL)""",
            "CREATE UNIQUE INDEX items_id ON items (id)",
            """CREATE TABLE deletions (
                generation INTEGER, removed INTEGER, PRIMARY KEY (generation, removed))
                WITHOUT ROWID""",
        )
        database.create(path, schema, MODEL)
        self.database = Database.open(path)
        self.segment = (path / "segment").open("ab", buffering=0)

    def upsert(self, items: list[Item], vectors: np.ndarray) -> None:
        rows = [check_item(item) for item in items]
        place = self.segment.tell()
        for vector in vectors:
            data = vector.tobytes()
            self.segment.write(data + zlib.crc32(data).to_bytes(4, "little"))
        os.fdatasync(self.segment.fileno())
        size = vectors.shape[1] * 4 + 4
        with self.database.write() as (connection, generation):
            ids = [(item.id,) for item in items]
            for id in ids:
                connection.execute(
                    "INSERT INTO deletions SELECT ?, rowid FROM items WHERE id = ?",
                    (generation, *id),
                )
            connection.executemany("DELETE FROM items WHERE id = ?", ids)
            placed = ((*row, place + i * size) for i, row in enumerate(rows))
            connection.executemany(
                "INSERT INTO items (id, caption, source, metadata, place) VALUES (?, ?, ?, ?, ?)",
                placed,
            )

    def close(self) -> None:
        self.database.close()
        self.segment.close()


def measure(
    way: Callable[[Path], InDatabase | InSegment], path: Path, count: int
) -> dict[str, float]:
    opened = way(path)
    fresh = timed(opened.upsert, list(batches(count, 0)))
    opened.close()
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    opened = way(path)
    replaced = timed(opened.upsert, list(batches(count // 5, 1)))
    opened.close()
    return {
        "new_per_s": BATCH / statistics.mean(fresh),
        "new_ms_p50": 1000 * statistics.median(fresh),
        "new_ms_p99": 1000 * float(np.percentile(fresh, 99)),
        "replaced_per_s": BATCH / statistics.mean(replaced),
        "bytes_per_item": sum(sizes.values()) / count,
        "of_that_the_segment": sizes.get("segment", 0) / count,
    }


def timed(upsert: Upsert, work: list[tuple[list[Item], np.ndarray]]) -> list[float]:
    """Seconds of each batch."""
    seconds = []
    for items, vectors in work:
        started = time.perf_counter()
        upsert(items, vectors)
        seconds.append(time.perf_counter() - started)
    return seconds


def batches(count: int, seed: int) -> Iterator[tuple[list[Item], np.ndarray]]:
    """Ids in no order, as the names of files are; those of the next seed are among them."""
    random = np.random.default_rng(seed)
    numbers = np.random.default_rng(0).permutation(count if not seed else 5 * count)[:count]
    for start in range(0, count, BATCH):
        items = [
            Item(f"{number * 2654435761 % 2**32:08x}.jpg", "a caption", "", metadata(number))
            for number in numbers[start : start + BATCH].tolist()
        ]
        vectors = random.standard_normal((len(items), EMBED_DIM), dtype=np.float32)
        yield items, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def metadata(number: int) -> dict[str, Any]:
    """About 200 bytes of JSON."""
    return {
        "price": number % 1000 / 10,
        "colour": ("red", "green", "blue")[number % 3],
        "sizes": [34 + number % 12, 35 + number % 12],
        "shop": {"name": f"shop {number % 50}", "city": "somewhere"},
        "description": f"what a shop says of its thing with the number {number:09d}",
    }


def next_query(path: Path, count: int = 20_000, tries: int = 200) -> dict[str, float]:
    """Upsert one item and ask for its vector at once, from another connection."""
    with Collection.create(path, **MODEL) as collection:
        timed(collection.upsert, list(batches(count, 0)))
        with Searcher(path, device="cpu") as searcher:
            found, seconds = 0, []
            for number in range(tries):
                vector = np.random.default_rng(number).standard_normal(EMBED_DIM)
                vector /= np.linalg.norm(vector)
                collection.upsert([Item(f"new {number}")], vector[None])
                started = time.perf_counter()
                ((hit,),) = searcher.search(vector[None], 1)
                seconds.append(time.perf_counter() - started)
                found += hit.id == f"new {number}"
    return {"upserts": tries, "found": found, "ms_p50": 1000 * statistics.median(seconds)}


def flushes_per_s(folder: Path, count: int = 200) -> float:
    """What the disk can do."""
    with (folder / "flushes").open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
        return count / (time.perf_counter() - started)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: float(f"{statistics.median(of[name] for of in rounds):.4g}") for name in rounds[0]
    }


if __name__ == "__main__":
    main()
