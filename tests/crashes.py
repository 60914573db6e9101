"""Writes and reads for the crash test: what a collection holds after its first n writes is known.

python tests/crashes.py write COLLECTION
    For each number on its input a process that writes from that number on, until it is killed:
    says its pid, then the number of each write when it is done, and at last "killed".
python tests/crashes.py read COLLECTION
    Until its input ends; says how often it read. Ends with an error as soon as anything it
    reads does not fit together.
"""

import os
import select
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from index.collection import Collection, Item

if TYPE_CHECKING:
    from index.search import Searcher

EMBED_DIM = 8
_PAUSE_S = 0.01
_IDS = 120


@dataclass(frozen=True)
class Stored:
    """What is there under an id."""

    caption: str
    write: int
    thumbnail: bytes | None


@dataclass(frozen=True)
class Write:
    """One of the writes: all of it is done, or nothing."""

    put: dict[str, Stored]
    delete: list[str]


def write_number(number: int) -> Write:
    """Puts 1 to 30 of a few ids, of which many are there already, or deletes some."""
    random = np.random.default_rng(number)
    ids = [f"id {i}" for i in random.permutation(_IDS)[: int(random.integers(1, 31))]]
    if random.random() < 0.25:
        return Write({}, ids)
    return Write(
        {
            id: Stored(f"{id} of write {number}", number, b"jpeg %d" % number if i % 2 else None)
            for i, id in enumerate(ids)
        },
        [],
    )


def states() -> Iterator[dict[str, Stored]]:
    """What is there after 0, 1, 2, ... writes."""
    state: dict[str, Stored] = {}
    number = 0
    while True:
        yield dict(state)
        write = write_number(number)
        state |= write.put
        for id in write.delete:
            state.pop(id, None)
        number += 1


def vector_of(caption: str) -> np.ndarray:
    """(E,), another one for every caption."""
    vector = np.random.default_rng(zlib.crc32(caption.encode())).standard_normal(EMBED_DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def content(collection: Collection) -> dict[str, Stored]:
    """All that is there; AssertionError if its parts do not fit together."""
    rowids = collection.rowids()
    items = collection.items_of(rowids)
    vectors = collection.vectors_of(rowids)
    thumbnails = collection.thumbnails_of(rowids)
    assert len(items) == len(rowids) == collection.count(), "items lack vectors, or are not counted"
    found = {}
    for rowid, vector in zip(rowids.tolist(), vectors, strict=True):
        item = items[rowid]
        assert np.array_equal(vector, vector_of(item.caption)), f"the vector of {item}"
        found[item.id] = Stored(item.caption, item.metadata["write"], thumbnails.get(rowid))
    return found


def start_writers(path: Path) -> None:
    """One after the other. They are forked, since to import takes longer than to be killed."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.write(1, f"{os.getpid()}\n".encode())
            write(path, int(line))
        os.waitpid(pid, 0)
        os.write(1, b"killed\n")


def write(path: Path, start: int) -> None:
    with Collection.open(path) as collection:
        for number in range(start, sys.maxsize):
            write = write_number(number)
            if write.delete:
                collection.delete(write.delete)
            else:
                items = [
                    Item(id, stored.caption, metadata={"write": stored.write})
                    for id, stored in write.put.items()
                ]
                vectors = np.stack([vector_of(item.caption) for item in items])
                thumbnails = [stored.thumbnail for stored in write.put.values()]
                collection.upsert(items, vectors, thumbnails)
            os.write(1, f"{number}\n".encode())


def read(path: Path) -> None:
    from index.search import Searcher

    reads = 0
    with Searcher(path, device="cpu") as searcher:
        while not reads or not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
            with searcher.collection.snapshot():  # one that the search is inside of
                check_answers(searcher, content(searcher.collection))
            reads += 1
    sys.stdout.write(f"{reads}\n")


def check_answers(searcher: "Searcher", there: dict[str, Stored]) -> None:
    """AssertionError unless searches find the true best of what is there."""
    ids = sorted(there)
    if not ids:
        return
    vectors = np.stack([vector_of(there[id].caption) for id in ids])
    queries = vectors[:: max(1, len(ids) // 4)]
    scores = queries @ vectors.T
    for hits, all_scores in zip(searcher.search(queries, 3), scores, strict=True):
        best = np.argsort(-all_scores, kind="stable")[:3]
        found = [(hit.id, hit.caption) for hit in hits]
        assert found == [(ids[i], there[ids[i]].caption) for i in best]


if __name__ == "__main__":
    if sys.argv[1] == "write":
        start_writers(Path(sys.argv[2]))
    else:
        read(Path(sys.argv[2]))
