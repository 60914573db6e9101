"""Search beside raw FAISS, hnswlib (or usearch), milvus-lite and qdrant-client, on two threads.

    python -m benchmarks.index [--count 1000000] [--dim 512] [--rounds 3] [--only NAME,...]
        [--seconds 1.5] [--threads 2] [--prepare] [--redo PART,...] [--folder build/index]
        [--out FILE.json]

Clustered unit vectors, and queries from elsewhere, as texts are to pictures (`data.py`). Each
contender (`contenders.py`, `ours.py`) builds what it needs in a process of its own (`worker.py`),
whose memory is measured. Ours is built for recall 0.9, 0.95 and 0.99, tuned with queries that are
not asked later; of the others the search parameter is the least that finds as much as ours with
the very queries that are asked, so they are tuned as well as can be. Recall@10 is against the exact
answer. Then ours and one other take turns (`bench.py`): batches of 64, single queries, and at 0.95
single queries of two callers at once; the ratios are ours by the other. Filters take turns in the
same way. All answer with ids alone.

milvus-lite and qdrant-client would take hours with a million vectors: they have 20,000, and so has
ours beside them. What was made is kept in --folder, finished parts in the result file:
an interrupted run goes on, and a part is done anew that --redo names by how it starts: with
--only "faiss SQ8 refined" --redo "speed,filtered" the other contenders' parts stay as they are.
--prepare does what another load on the machine does not falsify: all but our builds, which measure
what is fastest, and the timings. Afterwards those alone take about twenty minutes of two quiet
cores with a million.

--count 20000 tests the benchmark. A million takes 12 GiB of memory, 25 GB of disk, and an hour or
two to prepare.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.index.bench import Bench
from benchmarks.index.processes import PEERS, make_environment
from benchmarks.index.report import Report
from benchmarks.index.worker import TARGETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "index.json"
OURS = "clipserve ivf"
OTHERS = (
    "faiss SQ8",  # whose lists the other two share
    "faiss Flat",
    "faiss SQ8 refined",
    "hnswlib",
    "usearch",
    "clipserve exact",
    "clipserve hnsw",
)
SMALL = {"milvus-lite": 20_000, "qdrant-client": 20_000}
"""vectors that it is measured with: of more, filling and searching it takes hours"""
NOT_BY_DEFAULT = ("usearch", "clipserve hnsw")
DEFAULT_TARGET = 0.95
FILTERING = ("faiss SQ8", "clipserve exact")
"""hnswlib and the small ones run Python for every vector, usearch has no filters in Python"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each timing")
    parser.add_argument("--prepare", action="store_true", help="everything but the timings")
    parser.add_argument("--redo", default="", help="parts, or how their names start: speed faiss")
    parser.add_argument("--only", default="", help=", ".join([*OTHERS, *SMALL]))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "index")
    parser.add_argument("--out", type=Path, help=f"{RESULTS}, or in --folder of fewer vectors")
    arguments = parser.parse_args()
    default = RESULTS
    if arguments.count < 1_000_000:
        default = arguments.folder / f"{arguments.count}x{arguments.dim}.json"
    report = Report(arguments.out or default, arguments)
    installed = make_environment(arguments.folder)
    report.value["not_installed"] = [name for name in PEERS if not installed[name]]
    wanted = arguments.only.split(",") if arguments.only else [*OTHERS, *SMALL]
    if unknown := set(wanted) - {*OTHERS, *SMALL}:
        sys.exit(f"--only knows no {', '.join(sorted(unknown))}")
    if not arguments.only and installed["hnswlib"]:
        wanted = [name for name in wanted if name not in NOT_BY_DEFAULT]
    wanted = [name for name in wanted if installed.get(name, True)]
    counts = {name: min(arguments.count, SMALL.get(name, arguments.count)) for name in wanted}
    for count in sorted(set(counts.values()), reverse=True):
        targets = TARGETS if count == arguments.count else (DEFAULT_TARGET,)
        bench = Bench(report, arguments, count, {t: f"{OURS} {t}" for t in targets})
        run(bench, [name for name in wanted if counts[name] == count], arguments.prepare)
    report.save()


def run(bench: Bench, names: list[str], prepare: bool) -> None:
    """All parts for one number of vectors."""
    try:
        bench.part("data", bench.data.make)
        for name in names:
            if not name.startswith("clipserve"):
                bench.part(f"build {name}", lambda name=name: bench.build(name))
        if prepare and not bench.is_ours_built():
            return
        for name in (*bench.ours.values(), *(n for n in names if n.startswith("clipserve"))):
            bench.part(f"build {name}", lambda name=name: bench.build(name))
        for name in (*bench.ours.values(), *names):
            is_filtered = name in FILTERING or name == bench.ours[DEFAULT_TARGET]
            bench.part(f"memory {name}", lambda name=name: bench.memory(name))
            bench.part(
                f"recall {name}",
                lambda name=name, is_filtered=is_filtered: bench.recalls(name, is_filtered),
            )
        if prepare:
            return
        bench.part("items", bench.with_items)
        for name in names:
            bench.part(f"speed {name}", lambda name=name: bench.speed(name))
            if name in FILTERING:
                bench.part(f"filtered {name}", lambda name=name: bench.filtered(name))
            bench.close(name)
    finally:
        bench.close_all()


if __name__ == "__main__":
    main()
