"""One contender of benchmarks/index in a process of its own, which does what it is told to.

    python -m benchmarks.index.worker NAME FOLDER COUNT DIM THREADS

Reads commands from stdin, a line of JSON each, and answers each with one. Every contender builds
what it needs into its own folder once, opens that, and answers questions. Start at `Worker`.
"""

import gc
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.index.contenders import Contender, Faiss, Hnswlib, Milvus, Qdrant, Usearch
from benchmarks.index.data import BUCKETS, Data, size_of
from benchmarks.index.ours import Ours

BATCH = 64
ASKED = 512
"""of the queries"""
TARGETS = (0.9, 0.95, 0.99)
_CLIP_S = 60.0
"""that measuring a recall may take; slow peers answer fewer of the queries"""
_LOOK_EVERY_S = 0.05


class Worker:
    """Carries out commands; `batches` of queries go round and round while something is timed."""

    def __init__(self, made: Contender, data: Data, folder: Path) -> None:
        self._contender, self._data, self._folder = made, data, folder
        self._queries = data.queries()[:ASKED]
        self._before: dict[str, int] = {}

    def build(self) -> dict[str, Any]:
        gc.collect()
        before, started, cpu = resident(), time.monotonic(), time.process_time()
        with _Peak() as peak:
            noted = self._contender.build()
        return {
            "seconds": round(time.monotonic() - started, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "extra_own_bytes": peak.own - before["own"],
            "extra_bytes_with_mapped_files": peak.total - before["total"],
            "disk_bytes": size_of(self._folder),
            "versions": {name: version(name) for name in self._contender.packages},
        } | noted

    def open(self) -> dict[str, Any]:
        self._before, started = resident(), time.monotonic()
        self._contender.open()
        seconds = round(time.monotonic() - started, 2)
        return {"open_s": seconds, "knob": self._contender.knob, "most": self._contender.most}

    def memory(self) -> dict[str, Any]:
        """What opening and searching added, a vector: in memory of its own, and of mapped files."""
        now = resident()
        return {
            f"{kind}_bytes_per_vector": round((now[kind] - self._before[kind]) / self._data.count)
            for kind in ("own", "mapped")
        }

    def recall(self, knob: float, share: float = 1) -> dict[str, Any]:
        """Over all queries, or as many as time allows. It is the warm-up too."""
        self._contender.set(knob, _buckets(share), with_items=False)
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
        self._contender.set(knob, _buckets(share), with_items=mode == "single_items")
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
            buckets = (first, first + max(1, round(share * BUCKETS)))
            self._contender.set(knob, buckets, with_items=False)
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


class _Peak:
    """The most memory while it is entered."""

    def __init__(self) -> None:
        self.own = self.total = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            now = resident()
            self.own, self.total = max(self.own, now["own"]), max(self.total, now["total"])


def resident() -> dict[str, int]:
    """Bytes of this process's memory now: its own, that of files it has mapped, and both."""
    names = {"VmRSS": "total", "RssAnon": "own", "RssFile": "mapped"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def contender(name: str, data: Data, folder: Path, threads: int) -> Contender:
    """By its name: "clipserve KIND [TARGET]", "faiss CODES" or a package."""
    package, _, kind = name.partition(" ")
    if package == "clipserve":
        kind, _, target = kind.partition(" ")
        return Ours(data, folder, threads, kind, float(target or 0.95))
    if package == "faiss":
        return Faiss(data, folder, threads, kind)
    peers: dict[str, type[Hnswlib] | type[Usearch] | type[Milvus] | type[Qdrant]]
    peers = {
        "hnswlib": Hnswlib,
        "usearch": Usearch,
        "milvus-lite": Milvus,
        "qdrant-client": Qdrant,
    }
    return peers[package](data, folder, threads)


def _buckets(share: float) -> tuple[int, int] | None:
    return None if share == 1 else (0, round(share * BUCKETS))


def main() -> None:
    name, folder, count, dim, threads = sys.argv[1:]
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    where = Path(folder)
    data = Data(where.parent, int(count), int(dim))
    worker = Worker(contender(name, data, where, int(threads)), data, where)
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        answers.write(json.dumps(getattr(worker, do)(**command)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
