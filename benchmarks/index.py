"""Search beside raw FAISS, hnswlib (or usearch), milvus-lite and qdrant-client, on two threads.

    python -m benchmarks.index [--count 1000000] [--dim 512] [--rounds 3] [--only NAME,...]
        [--seconds 2] [--threads 2] [--out FILE.json]

Clustered unit vectors, and queries from elsewhere, as texts are to pictures (`index_data.py`). Each
contender (`index_peers.py`) builds what it needs in a process of its own, whose memory is measured.
Ours is built once for the default recall and tuned, as `build` would, for 0.9, 0.95 and 0.99 with
queries that are not asked later; of the others the search parameter is the least that reaches the
target with the very queries that are asked, so they are tuned as well as can be. Recall@10 is over
all queries against the exact answer. Then ours and one other take turns: batches of 64, single
queries, and single queries of two callers at once. "equal" is the other at our recall, and the
ratio is ours by that. Filters take turns in the same way. All answer with ids alone.

milvus-lite and qdrant-client would take hours with a million vectors: they have 100,000 and 20,000,
and so has ours beside them. Everything that was made is kept under build/index/, finished parts in
the result file: an interrupted run goes on, and a part is done anew when it is deleted there.

--count 20000 tests the benchmark: shorter timings, fewer queries and contenders, about two minutes
on two quiet cores after the peers' environment is made (one minute with --only "faiss SQ8"). With a
million expect two to three hours there, mostly the graphs (hnswlib, clipserve hnsw: leave them out
with --only) and three indexes of FAISS; 12 GiB of memory and 25 GB of disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

from benchmarks.embedding import processor
from benchmarks.index_data import NUM_QUERIES, SHARES, Data
from benchmarks.index_peers import BATCH, TARGETS

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "index"
RESULTS = Path("benchmarks/results/index.json")
PEERS = {  # contender -> packages for the peers' environment
    "hnswlib": ("hnswlib",),
    "usearch": ("usearch",),
    "milvus-lite": ("milvus-lite", "pymilvus"),
    "qdrant-client": ("qdrant-client",),
}
OURS = "clipserve ivf"
OTHERS = (
    "faiss Flat",
    "faiss SQ8",
    "faiss SQ8 refined",
    "clipserve exact",
    "clipserve rabitq",
    "hnswlib",
    "usearch",
    "clipserve hnsw",
)
SMALL = {"milvus-lite": 100_000, "qdrant-client": 20_000}
"""vectors that it is measured with: of more, filling and searching it takes hours"""
FILTERING = ("faiss Flat", "faiss SQ8", "clipserve exact", "milvus-lite")
"""hnswlib and qdrant-client run Python for every vector, usearch has no filters in Python"""
MODES = ("batch", "single", "callers")
FILTER_TARGET = 0.95
NEW_FILTERS = 20
QUICK = 50_000
"""vectors below which it is a test of the benchmark: fewer queries, shorter timings"""
NOT_QUICK = ("faiss SQ8 refined", "clipserve rabitq", "clipserve hnsw", "usearch")
EQUAL = 0.0005
"""recalls closer than that are equal"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of each timing; 2, or 0.1 below 50,000")
    parser.add_argument("--only", default="", help=", ".join([*OTHERS, *SMALL]).replace("%", "%%"))
    parser.add_argument("--out", type=Path, help=f"{RESULTS}, or in build/index of fewer vectors")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS
    if arguments.out is None and arguments.count < 1_000_000:
        out = BUILD / f"{arguments.count}x{arguments.dim}.json"
    report = Report(out, arguments)
    installed = make_environment()
    report.value["not_installed"] = [name for name, is_in in installed.items() if not is_in]
    wanted = arguments.only.split(",") if arguments.only else [*OTHERS, *SMALL]
    if unknown := set(wanted) - {*OTHERS, *SMALL, OURS}:
        sys.exit(f"--only knows no {', '.join(sorted(unknown))}")
    if not arguments.only and installed["hnswlib"]:
        wanted.remove("usearch")
    if not arguments.only and arguments.count < QUICK:
        wanted = [name for name in wanted if name not in NOT_QUICK]
    wanted = [name for name in wanted if installed.get(name, True)]
    counts = {name: min(arguments.count, SMALL.get(name, arguments.count)) for name in wanted}
    for count in sorted(set(counts.values()), reverse=True):
        names = [name for name in wanted if counts[name] == count]
        run(Bench(report, arguments, count), names)
    report.save()


def run(bench: "Bench", names: list[str]) -> None:
    """All parts for one number of vectors."""
    bench.part("data", bench.data.make)
    for name in (OURS, *(name for name in names if name != OURS)):
        bench.part(f"build {name}", lambda name=name: bench.build(name))
        bench.part(f"memory {name}", lambda name=name: bench.memory(name))
        if name.startswith("clipserve"):
            bench.part(f"tune {name}", lambda name=name: bench.opened(name).ask("tune"))
        if name == OURS:
            bench.part(f"items {name}", bench.with_items)
            continue
        bench.part(f"speed {name}", lambda name=name: bench.speed(name))
        if name in FILTERING:
            bench.part(f"filtered {name}", lambda name=name: bench.filtered(name))
        bench.close(name)
    bench.close(OURS)


class Report:
    """The result file."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        self.path = path
        self.value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if self.value.get("dim", arguments.dim) != arguments.dim:
            sys.exit(f"{path} is of {self.value['dim']} dimensions; give another --out")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.value = {
            "benchmark": "index",
            "unit": "queries per second at recall@10, medians of rounds that take turns; bytes a"
            " vector; milliseconds a query",
            "date": date.today().isoformat(),
            "machine": {
                "processor": processor(),
                "cores": os.cpu_count(),
                "memory_gib": round(memory / 2**30, 1),
            },
            "python": platform.python_version(),
            "dim": arguments.dim,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "batch": BATCH,
            "queries": NUM_QUERIES if arguments.count >= QUICK else 256,
            "runs": self.value.get("runs", {}),
        }

    def save(self) -> None:
        self.value["summary"] = {
            count: summarise(parts) for count, parts in self.value["runs"].items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.value, indent=1) + "\n")
        aside.replace(self.path)


@dataclass
class Process:
    """A contender that was started; `ask` has it carry out a command."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path
    most: int | None = None
    """the largest value of its knob; None if it is tuned by itself, or has none"""
    knob: str = ""

    @classmethod
    def start(cls, name: str, data: Data, threads: int, num_queries: int) -> Self:
        folder = contender_folder(name, data)
        folder.mkdir(parents=True, exist_ok=True)
        python = str(BUILD / "peers" / "bin" / "python") if name in PEERS else sys.executable
        words = [name, str(folder), str(data.count), str(data.dim), str(threads)]
        words.append(str(num_queries))
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
        )
        log = data.folder / f"{folder.name}.log"
        process = subprocess.Popen(
            [python, "-m", "benchmarks.index_peers", *words],
            cwd=ROOT,
            env=os.environ | limits,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
        )
        return cls(name, process, log)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do} | command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ContenderError(f"{self.name} failed at {do} {command}; see {self.log}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class ContenderError(Exception):
    """A contender's process ended."""


class Bench:
    """The parts, for one number of vectors."""

    def __init__(self, report: Report, arguments: argparse.Namespace, count: int) -> None:
        self._report, self._rounds, self._threads = report, arguments.rounds, arguments.threads
        self._seconds = arguments.seconds or (0.1 if count < QUICK else 2.0)
        self._num_queries = 256 if count < QUICK else NUM_QUERIES
        self._processes: dict[str, Process] = {}
        self.data = Data(BUILD / f"{count}x{arguments.dim}", count, arguments.dim)
        self._parts = report.value["runs"].setdefault(str(count), {})

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Unless it is done already. What a contender cannot do is noted, and the rest goes on."""
        if name in self._parts:
            return
        started, load = time.monotonic(), os.getloadavg()[0]
        say(f"{self.data.count:,} vectors: {name} ...")
        try:
            found = measure()
        except ContenderError as error:
            say(f"  {error}")
            for process in [*self._processes]:
                self.close(process)
            return
        seconds = round(time.monotonic() - started, 1)
        self._parts[name] = rounded(found) | {"took_s": seconds, "load_before": round(load, 1)}
        self._report.save()
        say(f"  {seconds} s")

    def build(self, name: str) -> dict[str, Any]:
        folder = contender_folder(name, self.data)
        done = folder / "built.json"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            builder = self._start(name)
            try:
                done.write_text(json.dumps(builder.ask("build")))
            finally:
                builder.close()
        found: dict[str, Any] = json.loads(done.read_text())
        return found

    def opened(self, name: str) -> Process:
        """The contender's process, which stays until `close`."""
        if name not in self._processes:
            process = self._processes[name] = self._start(name)
            answer = process.ask("open")
            process.knob, process.most = answer["knob"], answer["most"]
        return self._processes[name]

    def close(self, name: str) -> None:
        if name in self._processes:
            self._processes.pop(name).close()

    def memory(self, name: str) -> dict[str, Any]:
        """Of a process that has opened the index and searched it once."""
        self.close(name)
        contender = self.opened(name)
        found = contender.ask("recall", knob=32 if contender.most else FILTER_TARGET)
        return contender.ask("memory") | {"recall_meanwhile": found["recall"]}

    def with_items(self) -> dict[str, Any]:
        """Single queries whose answers have caption, source and metadata, too."""
        ours, modes = self.opened(OURS), ("single", "single_items")
        ours.ask("recall", knob=FILTER_TARGET)
        rounds = [
            {mode: self._speed(ours, FILTER_TARGET, mode) for mode in modes}
            for _ in range(self._rounds)
        ]
        return {mode: medians([one[mode] for one in rounds]) for mode in modes}

    def speed(self, name: str) -> dict[str, Any]:
        ours, other = self.opened(OURS), self.opened(name)
        sweep = Sweep(other, other.most) if other.most else None
        found = {}
        for target in TARGETS if other.knob else TARGETS[-1:]:
            mine = Setting.of(ours, target)
            settings: dict[str, Setting | None] = {"ours": mine}
            if sweep is None:
                settings["theirs"] = Setting.of(other, target)
            else:
                settings["theirs"] = sweep.least(target)
                settings["equal"] = sweep.least(mine.recall - EQUAL)
            found[f"{target}"] = self._take_turns(settings, MODES)
            say(f"  at {target}: {brief(found[f'{target}'])}")
        return found

    def filtered(self, name: str) -> dict[str, Any]:
        ours, other = self.opened(OURS), self.opened(name)
        found = {}
        for share in SHARES:
            settings: dict[str, Setting | None] = {"ours": Setting.of(ours, FILTER_TARGET, share)}
            if other.most:
                settings["theirs"] = Sweep(other, other.most, share).least(FILTER_TARGET)
            else:
                settings["theirs"] = Setting.of(other, FILTER_TARGET, share)
            turns = self._take_turns(settings, ("batch", "single"), share)
            for who, setting in settings.items():
                if setting is not None:
                    command = {"knob": setting.knob, "share": share, "number": NEW_FILTERS}
                    turns[who]["new_filter"] = setting.process.ask("new_filters", **command)
            found[f"{share:g}"] = turns
            say(f"  {share:g} of all: {brief(turns)}")
        return found

    def _take_turns(
        self, settings: "dict[str, Setting | None]", modes: tuple[str, ...], share: float = 1
    ) -> dict[str, Any]:
        """The median of each, and ours by the others' (at equal recall, where there is that)."""
        there = {who: setting for who, setting in settings.items() if setting is not None}
        if "equal" in there and "theirs" in there and there["equal"].knob == there["theirs"].knob:
            del there["equal"]
        rounds: dict[str, dict[str, list[dict[str, float]]]]
        rounds = {who: {mode: [] for mode in modes} for who in there}
        for _ in range(self._rounds):
            for mode in modes:
                for who, setting in there.items():
                    speed = self._speed(setting.process, setting.knob, mode, share)
                    rounds[who][mode].append(speed)
        found: dict[str, Any] = {who: None for who in settings if settings[who] is None}
        for who, setting in there.items():
            found[who] = {"knob": setting.knob, "recall": setting.recall}
            found[who] |= {mode: medians(of) for mode, of in rounds[who].items()}
        by = "equal" if "equal" in there else "theirs"
        if by in there and settings.get("equal", there.get(by)) is not None:
            for measure in ("qps", "cpu_ms"):
                for mode in modes:
                    pairs = zip(rounds["ours"][mode], rounds[by][mode], strict=True)
                    if measure in rounds["ours"][mode][0]:
                        each = [mine[measure] / max(his[measure], 1e-9) for mine, his in pairs]
                        found[f"ratio_{mode}_{measure}"] = statistics.median(each)
        return found

    def _speed(
        self, process: Process, knob: float, mode: str, share: float = 1
    ) -> dict[str, float]:
        return process.ask("speed", knob=knob, mode=mode, seconds=self._seconds, share=share)

    def _start(self, name: str) -> Process:
        return Process.start(name, self.data, self._threads, self._num_queries)


@dataclass(frozen=True)
class Setting:
    """A contender at one value of its knob, and the recall that it has there."""

    process: Process
    knob: float
    recall: float

    @classmethod
    def of(cls, process: Process, knob: float, share: float = 1) -> Self:
        return cls(process, knob, process.ask("recall", knob=knob, share=share)["recall"])


class Sweep:
    """Recalls by the knob, which they grow with."""

    def __init__(self, process: Process, most: int, share: float = 1) -> None:
        self._process, self._most, self._share = process, most, share
        self._known: dict[int, float] = {}

    def least(self, target: float) -> Setting | None:
        """The least knob that reaches the target; None if none does."""
        high = 1
        while self._recall(high) < target:
            if high >= self._most or self._is_done(high):
                return None
            high = min(2 * high, self._most)
        low = high // 2  # not enough, or 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._recall(middle) >= target else (middle, high)
        return Setting(self._process, high, self._recall(high))

    def _recall(self, knob: int) -> float:
        if knob not in self._known:
            asked = self._process.ask("recall", knob=knob, share=self._share)
            self._known[knob] = asked["recall"]
        return self._known[knob]

    def _is_done(self, knob: int) -> bool:
        """Four times as much has brought nothing: what is missed is lost in the codes."""
        return knob >= 64 and self._recall(knob) - self._recall(knob // 4) < EQUAL


def contender_folder(name: str, data: Data) -> Path:
    return data.folder / name.replace(" ", "-").replace(",", "-")


def make_environment() -> dict[str, bool]:
    """The peers' own Python, and for each peer whether it could be installed there."""
    folder = BUILD / "peers"
    python, done = folder / "bin" / "python", folder / "installed.json"
    if not done.exists():
        if not python.exists():
            venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        found = {}
        for name, packages in PEERS.items():
            say(f"installing {name} ...")
            failed = subprocess.run([*install, *packages], capture_output=True).returncode
            found[name] = not failed
        done.write_text(json.dumps(found))
    installed: dict[str, bool] = json.loads(done.read_text())
    return installed


def summarise(parts: dict[str, Any]) -> dict[str, Any]:
    """What the issue asks for, in one place: ours by the others at equal recall, filters."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        what, _, who = name.partition(" ")
        if what == "speed":
            found[f"ours / {who}"] = {
                target: {mode: at.get(f"ratio_{mode}_qps") for mode in MODES}
                for target, at in part.items()
                if isinstance(at, dict)
            }
        elif what == "filtered":
            found[f"filtered beside {who}"] = {
                share: {"recall": at["ours"]["recall"], "batch": at.get("ratio_batch_qps")}
                for share, at in part.items()
                if isinstance(at, dict)
            }
    return found


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def brief(found: dict[str, Any]) -> str:
    shown = [
        f"{who} {at['recall']:.3f} {at['batch']['qps']:.0f}/s, one {at['single']['p50_ms']:.2f} ms"
        for who, at in found.items()
        if isinstance(at, dict)
    ]
    return "; ".join(shown) + f"; ratio {found.get('ratio_batch_qps', float('nan')):.2f}"


def rounded(value: Any) -> Any:
    """Four digits that count."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
