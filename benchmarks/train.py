"""Samples per second in training: ours beside open_clip's own trainer, on the same shards.

    python -m benchmarks.train [--rounds 5] [--only tiny] [--out FILE.json]

The same architecture, batch, optimizer and number of worker processes; each trainer once as it is
and once with its towers compiled. A run is a process of its own; its first steps, in which queues
fill and towers compile, do not count. Runs take turns, and the median counts.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.embedding import processor
from benchmarks.loader import FASHION, WEBDATASET, make_environment
from clipserve.config import load_config
from clipserve.model import architecture_config

PACKAGES = ("torch", "open_clip_torch", "numpy")
SHARDS = str(FASHION / "train-{00000..00019}.tar")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One architecture, and how much of it is measured."""

    name: str
    model: str
    """our setting that names it"""
    batch_size: int
    skip: int
    """steps before counting"""
    steps: int


CASES = (
    Case("tiny, 64 px, batch 128", "model.preset=tiny", 128, 20, 30),
    Case("ViT-B-32, 224 px, batch 32", "model.preset=clip_vit_b32", 32, 3, 6),
)


@dataclass(frozen=True)
class Contender:
    name: str
    is_ours: bool
    compiled: bool


CONTENDERS = (
    Contender("clipserve", is_ours=True, compiled=False),
    Contender("clipserve compiled", is_ours=True, compiled=True),
    Contender("open_clip", is_ours=False, compiled=False),
    Contender("open_clip compiled", is_ours=False, compiled=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--contenders", default=",".join(one.name for one in CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train.json"))
    arguments = parser.parse_args()
    python = make_environment()
    cases = [case for case in CASES if arguments.only in case.name]
    chosen = [one for one in CONTENDERS if one.name in arguments.contenders.split(",")]
    report = {
        "benchmark": "train",
        "unit": "samples per second, median of rounds that take turns",
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "webdataset of open_clip": WEBDATASET},
        "results": {case.name: compare(case, chosen, python, arguments.rounds) for case in cases},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(case: Case, contenders: list[Contender], python: Path, rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for one in contenders:
            speeds = run_ours(case, one) if one.is_ours else run_open_clip(case, one, python)
            rate = harmonic(speeds[case.skip :])
            found[one.name].append(rate)
            sys.stdout.write(f"{case.name:28} {one.name:20} {rate:.1f} samples/s\n")
            sys.stdout.flush()
    medians = {name: round(statistics.median(rates), 1) for name, rates in found.items()}
    summary: dict[str, Any] = {"samples_per_s": medians, "each_round": found}
    ours = [one.name for one in contenders if one.is_ours]
    theirs = [one.name for one in contenders if not one.is_ours]
    if ours and theirs:
        best, rival = (max(names, key=medians.__getitem__) for names in (ours, theirs))
        ratios = [a / b for a, b in zip(found[best], found[rival], strict=True)]
        summary |= {"best": best, "rival": rival, "ratio": round(statistics.median(ratios), 2)}
    return summary


def harmonic(speeds: list[float]) -> float:
    """What steps of equal size make together."""
    return len(speeds) / sum(1 / speed for speed in speeds)


def settings_of(case: Case, out: Path) -> list[str]:
    return [
        f"out={out}",
        f"data.train={SHARDS}",
        case.model,
        f"data.batch_size={case.batch_size}",
        f"train.steps={case.skip + case.steps}",
        "data.workers=1",
        "train.log_every=1",
        "train.precision=bf16",
        "train.device=cpu",
    ]


def run_ours(case: Case, contender: Contender) -> list[float]:
    """Samples per second of each step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        compiled = f"train.compile={'on' if contender.compiled else 'off'}"
        words = ["-m", "clipserve", "train", *settings_of(case, out), compiled]
        run([sys.executable, *words])
        lines = (out / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return [step["samples_per_second"] for step in steps if "samples_per_second" in step]


def run_open_clip(case: Case, contender: Contender, python: Path) -> list[float]:
    """The same of open_clip, as its log says it."""
    config = load_config(None, settings_of(case, Path("none")))
    architecture = config.model.architecture
    assert architecture is not None
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    optim, folder = config.optim, Path(tempfile.mkdtemp())
    (folder / "benchmarked.json").write_text(json.dumps(table))
    options = {
        "train-data": SHARDS,
        "dataset-type": "webdataset",
        "train-num-samples": case.batch_size * (case.skip + case.steps),
        "batch-size": case.batch_size,
        "workers": config.data.workers,
        "epochs": 1,
        "precision": "amp_bf16",
        "lr": optim.lr,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "wd": optim.weight_decay,
        "warmup": optim.warmup_steps,
        "log-every-n-steps": 1,
        "save-frequency": 0,
        "logs": folder,
        "device": "cpu",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--torchcompile"] if contender.compiled else []
    words += ["--grad-clip-norm", str(optim.grad_clip)] if optim.grad_clip is not None else []
    log = run(
        [str(python), "-m", "benchmarks.train_open_clip", folder / "benchmarked.json", *words]
    )
    shutil.rmtree(folder)
    return [float(speed) for speed in re.findall(r", ([\d.e+]+)/s, ", log)]


def run(command: list[Any]) -> str:
    """All that it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
