"""Samples per second in training: ours beside open_clip's own trainer, on the same shards.

    python -m benchmarks.train [--rounds 5] [--only tiny] [--device cuda] [--out FILE.json]

The same architecture, batch, optimizer, number of worker processes and precision (bf16 where the
machine is faster in it, else fp32); each trainer once as it is and once with its towers compiled.
All are started, and stopped (SIGSTOP) when their queues are full and their towers compiled; then
they take turns of some steps each, so that an hour in which the machine is slow is slow for all.
The median of the turns counts, and the median of their ratios. `mfu` is the part of the GPU's bf16
peak that ours computes for the towers.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.embedding import processor
from benchmarks.loader import FASHION, WEBDATASET, make_environment
from clipserve.config import load_config
from clipserve.embed import computes_bf16
from clipserve.model import architecture_config

PACKAGES = ("torch", "open_clip_torch", "numpy")
SHARDS = str(FASHION / "train-{00000..00019}.tar")
ROOT = Path(__file__).parents[1]
RESUMING = 2
"""steps of a turn that do not count: one was cut in two, and one had its batch ready"""
ENDLESS = 100_000


@dataclass(frozen=True)
class Case:
    """One architecture, and how much of it is measured."""

    name: str
    model: str
    """our setting that names it"""
    batch_size: int
    skip: int
    """steps before the first turn"""
    steps: int
    """that count, of a turn"""
    device: str = "cpu"
    workers: int = 1


CASES = (
    Case("tiny, 64 px, batch 128", "model.preset=tiny", 128, 20, 6),
    Case("ViT-B-32, 224 px, batch 32", "model.preset=clip_vit_b32", 32, 4, 3),
    Case("ViT-B-32, 224 px, batch 1024", "model.preset=clip_vit_b32", 1024, 20, 15, "cuda", 3),
    Case("ViT-B-16, 224 px, batch 512", "model.architecture=ViT-B-16", 512, 20, 15, "cuda", 3),
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


class Trainer:
    """A training process, with those that it starts, which runs when it is told to."""

    def __init__(self, name: str, command: list[Any], log: Path, is_ours: bool) -> None:
        self.name, self._is_ours = name, is_ours
        self._printed = log.with_name("printed.log")
        self._log = log if is_ours else self._printed
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def turn(self, steps: int) -> list[dict[str, float]]:
        """What it says of its next steps; then it is stopped again."""
        before = len(self._steps())
        os.killpg(self._process.pid, signal.SIGCONT)
        while len(self._steps()) < before + steps:
            if self._process.poll() is not None:
                sys.exit(f"{self.name} ended:\n{self._printed.read_text()[-3000:]}")
            time.sleep(0.01)
        os.killpg(self._process.pid, signal.SIGSTOP)
        return self._steps()[before : before + steps]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _steps(self) -> list[dict[str, float]]:
        """All that it has logged so far."""
        text = self._log.read_text() if self._log.exists() else ""
        if not self._is_ours:
            speeds = re.findall(r", ([\d.e+]+)/s, ", text)
            return [{"samples_per_second": float(speed)} for speed in speeds]
        steps = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        return [step for step in steps if "samples_per_second" in step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--contenders", default=",".join(one.name for one in CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train.json"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the trainers too
    chosen = [one for one in CONTENDERS if one.name in arguments.contenders.split(",")]
    results: dict[str, Any] = {}
    gpu = {"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    report = {
        "benchmark": "train",
        "unit": "samples per second, median of turns",
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()} | gpu,
        "precision": precision(arguments.device),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "webdataset of open_clip": WEBDATASET},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if case.device == arguments.device and arguments.only in case.name:
            results[case.name] = compare(case, chosen, arguments.rounds)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(case: Case, contenders: list[Contender], rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {one.name: [] for one in contenders}
    mfu: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(started(case, one)) for one in contenders]
        for _ in range(rounds):
            for trainer in trainers:
                steps = trainer.turn(RESUMING + case.steps)[RESUMING:]
                rate = harmonic([step["samples_per_second"] for step in steps])
                found[trainer.name].append(rate)
                if "mfu" in steps[-1]:
                    mfu.setdefault(trainer.name, []).append(harmonic([s["mfu"] for s in steps]))
                tell(f"{case.name:28} {trainer.name:20} {rate:.1f} samples/s")
    medians = {name: round(statistics.median(rates), 1) for name, rates in found.items()}
    summary: dict[str, Any] = {"samples_per_s": medians, "each_round": found}
    if mfu:
        summary["mfu"] = {name: round(statistics.median(m), 3) for name, m in mfu.items()}
    ours = [one.name for one in contenders if one.is_ours]
    theirs = [one.name for one in contenders if not one.is_ours]
    if ours and theirs:
        best, rival = (max(names, key=medians.__getitem__) for names in (ours, theirs))
        ratios = [a / b for a, b in zip(found[best], found[rival], strict=True)]
        summary |= {"best": best, "rival": rival, "ratio": round(statistics.median(ratios), 2)}
    return summary


def precision(device: str) -> str:
    """What all of them compute in."""
    return "bf16" if computes_bf16(torch.device(device)) else "fp32"


def harmonic(speeds: list[float]) -> float:
    """What steps of equal size make together."""
    return len(speeds) / sum(1 / speed for speed in speeds)


@contextlib.contextmanager
def started(case: Case, contender: Contender) -> Iterator[Trainer]:
    """A trainer that has done its first steps and is stopped."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = (
            ours(case, contender, folder)
            if contender.is_ours
            else open_clip(case, contender, folder)
        )
        log = folder / "run" / "metrics.jsonl" if contender.is_ours else folder / "log"
        log.parent.mkdir(exist_ok=True)
        trainer = Trainer(contender.name, command, log, contender.is_ours)
        try:
            began = time.perf_counter()
            trainer.turn(case.skip)
            tell(f"{case.name:28} {contender.name:20} ready {time.perf_counter() - began:.0f} s")
            yield trainer
        finally:
            trainer.end()


def settings_of(case: Case, out: Path) -> list[str]:
    return [
        f"out={out}",
        f"data.train={SHARDS}",
        case.model,
        f"data.batch_size={case.batch_size}",
        f"train.steps={ENDLESS}",
        f"data.workers={case.workers}",
        "train.log_every=1",
        f"train.precision={precision(case.device)}",
        f"train.device={case.device}",
    ]


def ours(case: Case, contender: Contender, folder: Path) -> list[Any]:
    compiled = f"train.compile={'on' if contender.compiled else 'off'}"
    words = ["-m", "clipserve", "train", *settings_of(case, folder / "run"), compiled]
    return [sys.executable, *words]


def open_clip(case: Case, contender: Contender, folder: Path) -> list[Any]:
    config = load_config(None, settings_of(case, Path("none")))
    architecture = config.model.architecture
    assert architecture is not None
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    optim = config.optim
    (folder / "benchmarked.json").write_text(json.dumps(table))
    options = {
        "train-data": SHARDS,
        "dataset-type": "webdataset",
        "train-num-samples": case.batch_size * ENDLESS,
        "batch-size": case.batch_size,
        "workers": config.data.workers,
        "epochs": 1,
        "precision": {"bf16": "amp_bf16", "fp32": "fp32"}[precision(case.device)],
        "lr": optim.lr,
        "wd": optim.weight_decay,
        "warmup": optim.warmup_steps,
        "log-every-n-steps": 1,
        "save-frequency": 0,
        "logs": folder,
        "device": case.device,
    }
    if optim.betas is not None:  # else its own rule, which is ours
        options |= {"beta1": optim.betas[0], "beta2": optim.betas[1]}
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--torchcompile"] if contender.compiled else []
    words += ["--grad-clip-norm", str(optim.grad_clip)] if optim.grad_clip is not None else []
    script = ["-m", "benchmarks.train_open_clip", folder / "benchmarked.json"]
    return [make_environment(), *script, *words]


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
