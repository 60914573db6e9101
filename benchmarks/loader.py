"""Training batches per second: ours beside open_clip's own webdataset pipeline.

    python -m benchmarks.loader [--rounds 5] [--only fashion] [--out FILE.json]

The same shards, one worker process each, the same crop of 90-100 % of the area, and the same
output: normalised float32 pixels and token ids of 77 places, in the training process. open_clip
normalises in its worker; ours hands over bytes, and the training process, with one thread, turns
them into floats: that time counts. Each measurement is a process of its own and counts from a batch
on at which both are under way; they take turns and the median counts. The limit is `decode_crop`
alone over the same bytes, in one process. Where other programs run, the ratios by processor time
say more than those by the clock.

open_clip_train 3.3 was written for webdataset 0.2: it runs in an environment under build/ that has
webdataset 0.2.86 and borrows the rest from this one. Its pixels are Pillow's; ours differ from
these by the tolerance in training/decoding.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decoding import photo
from benchmarks.embedding import processor
from benchmarks.steady import measure
from clipserve.images import ImageTransform, TrainTransform
from clipserve.shards import ShardSet
from clipserve.text import Tokenizer
from training.decoding import decode_crop
from training.mixture import Mixture, WeightedShards
from training.order import OrderSettings, Position
from training.shards import pack
from training.streaming import SampleSettings, Stream

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pillow", "simplejpeg", "numpy")
ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "loader"
FASHION = ROOT.parent / "shared" / "data" / "fashion"
_FASHION_TRAIN = str(FASHION / "train-{00000..00019}.tar")
WEBDATASET = "webdataset==0.2.86"


@dataclass(frozen=True)
class Case:
    """One set of pictures, and how much of it is measured."""

    name: str
    shards: str
    size: int
    """side of the pixels that come out"""
    batch_size: int
    batches: int
    goal: float
    """times as many samples per second as open_clip"""
    skip: int
    """batches before counting: the worker starts, queues and buffers fill"""


@dataclass(frozen=True)
class Photos:
    """Pictures of one size that the benchmark makes."""

    width: int
    height: int
    distinct: int
    samples: int

    @property
    def folder(self) -> Path:
        return BUILD / f"{self.width}x{self.height}"

    @property
    def shards(self) -> str:
        return str(self.folder / "shards" / "000000.tar")


PHOTOS = (Photos(640, 480, 100, 2000), Photos(1920, 1080, 40, 600))
CASES = (
    # Until 4,000 samples are out, open_clip reads two for each, to fill a shuffle buffer of 5,000.
    Case("fashion, 60x80 to 64", _FASHION_TRAIN, 64, 128, 60, 2.0, skip=34),
    Case("fashion, 60x80 to 224", _FASHION_TRAIN, 224, 128, 20, 2.0, skip=34),
    Case("photos, 640x480 to 224", PHOTOS[0].shards, 224, 32, 40, 2.0, skip=4),
    Case("photos, 1920x1080 to 224", PHOTOS[1].shards, 224, 32, 12, 2.5, skip=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        measure_ours(Case(**json.loads(arguments.ours)))
        return
    cases = [case for case in CASES if arguments.only in case.name]
    if not FASHION.is_dir():
        cases = [case for case in cases if "fashion" not in case.name]
    python = make_environment()
    for made in PHOTOS:
        if any(case.shards == made.shards for case in cases):
            make_shards(made)
    results = {case.name: compare(case, python, arguments.rounds) for case in cases}
    report = {
        "benchmark": "loader",
        "unit": "samples per second with one worker, median of rounds",
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "webdataset of open_clip": "0.2.86"},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(case: Case, python: Path, rounds: int) -> dict[str, Any]:
    measurements: dict[str, Callable[[], dict[str, float]]] = {
        "clipserve": lambda: run_ours(case),
        "open_clip": lambda: run_open_clip(case, python),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, run in measurements.items():
            found[name].append(run())
    median = {
        name: {key: round(statistics.median(one[key] for one in runs), 2) for key in runs[0]}
        for name, runs in found.items()
    }
    ratios = [
        ours["samples_per_s"] / theirs["samples_per_s"]
        for ours, theirs in zip(found["clipserve"], found["open_clip"], strict=True)
    ]
    cpu = "worker_cpu_ms_per_sample"
    fractions = [one["samples_per_s"] / one["decode_only_per_s"] for one in found["clipserve"]]
    return {
        "pixels": case.size,
        "batch_size": case.batch_size,
        "goal": case.goal,
        "ratio": round(statistics.median(ratios), 2),
        "ratio_of_each_round": [round(ratio, 2) for ratio in ratios],
        "ratio_of_worker_cpu": round(median["open_clip"][cpu] / median["clipserve"][cpu], 2),
        "fraction_of_decode_only": round(statistics.median(fractions), 2),
        "fraction_of_decode_only_by_cpu": round(
            median["clipserve"]["decode_only_cpu_ms_per_sample"] / median["clipserve"][cpu], 2
        ),
        **median,
    }


def run_ours(case: Case) -> dict[str, float]:
    return _run([sys.executable, "-m", "benchmarks.loader", "--ours", json.dumps(asdict(case))])


def run_open_clip(case: Case, python: Path) -> dict[str, float]:
    options = {"size": case.size, "batch-size": case.batch_size}
    options |= {"skip": case.skip, "batches": case.batches}
    words = [f"--{name}={value}" for name, value in options.items()]
    return _run([str(python), "-m", "benchmarks.loader_open_clip", case.shards, *words])


def measure_ours(case: Case) -> None:
    """In a process of its own; prints one line of JSON."""
    torch.set_num_threads(1)
    shards = ShardSet.open(case.shards)
    transform = TrainTransform(ImageTransform((case.size, case.size)), (0.9, 1.0), (0.75, 4 / 3))
    stream = Stream(
        Mixture([WeightedShards(shards)]),
        SampleSettings(transform),
        Tokenizer({"context_length": 77}),
        OrderSettings(case.batch_size),
        text_multiple=0,
    )
    batches = stream.batches(Position(), case.skip + case.batches + 8, workers=1)
    output = ((transform.inference.normalize(batch.pixels), batch.ids) for batch in batches)
    found = measure(output, case.batch_size, case.skip, case.batches)
    sys.stdout.write(json.dumps(found | decode_only(shards, transform)) + "\n")


def decode_only(shards: ShardSet, transform: TrainTransform) -> dict[str, float]:
    """`decode_crop` over bytes in memory, for about two seconds."""
    places = np.random.default_rng(0).choice(len(shards), min(len(shards), 300), replace=False)
    files = [shards.read(int(place)).image for place in places]
    random = np.random.default_rng(0)
    count, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < 2:
        decode_crop(files[count % len(files)], transform, random)
        count += 1
    return {
        "decode_only_per_s": count / (time.perf_counter() - started),
        "decode_only_cpu_ms_per_sample": 1000 * (time.process_time() - cpu_started) / count,
    }


def make_environment() -> Path:
    """The Python of an environment with webdataset 0.2.86 before this one's packages."""
    folder = BUILD / "open_clip"
    python = folder / "bin" / "python"
    done = folder / "done"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([str(python), *install, WEBDATASET], check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return python


def make_shards(made: Photos) -> None:
    """Pack `samples` rows over `distinct` pictures, once."""
    if (made.folder / "shards" / "manifest.json").exists():
        return
    made.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(made.distinct):
        (made.folder / f"{seed}.jpg").write_bytes(photo(made.width, made.height, seed))
    rows = [
        f"{number % made.distinct}.jpg,a photo of number {number} beside a house in the rain"
        for number in range(made.samples)
    ]
    table = made.folder / "captions.csv"
    table.write_text("\n".join(["image,caption", *rows]) + "\n")
    pack(table, made.folder / "shards")


def _run(command: list[str]) -> dict[str, float]:
    environment = os.environ | {"CLIPSERVE_CACHE": str(BUILD / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
