"""Where the time of a training step goes, on this machine, before and after what was done about it.

    python -m benchmarks.train_profile [--steps 4] [--out FILE.json]

Each way is a process of its own, on the shards and with the settings of benchmarks.train: `naive`
has torch's fused attention kernel and texts of full length, as most trainers have; `as it is` has
the plain kernel and texts cut to the longest of the batch; `compiled` compiles the towers too.
Shares are of the time on the main thread, by torch's profiler, in steps after the first ones.
`peak` is what a large matrix product of the same precision reaches right before and after; `mfu` is
the part of it that the towers' FLOPs make, in steps that are not profiled.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.embedding import processor
from benchmarks.train import CASES, Case, precision, settings_of
from clipserve.config import load_config
from clipserve.embed import DTYPES
from clipserve.model import Model
from training import loop
from training.recipe import Run
from training.streaming import Batch

WAYS = ("naive", "as it is", "compiled")
KINDS: Mapping[str, Sequence[str]] = {
    "attention": ("bmm", "softmax", "dot_product", "isneginf", "::all", "::where", "::eq"),
    "matrix products": ("::mm", "addmm", "linear", "convolution", "mkldnn", "mkl_"),
    "casts and copies": ("copy", "::cat", "fill", "zero", "clone", "contiguous"),
    "norms and activations": ("layer_norm", "gelu", "sigmoid", "::sum", "::add", "::mul", "::div"),
    "compiled kernels": ("cpp_fused", "compiled", "Compiled"),
    "optimizer and clipping": ("adam", "foreach", "vector_norm"),
    "waiting for data": ("DataLoader",),
}
"""Parts of operators' names, the first that fits."""


def main() -> None:
    arguments = read_arguments()
    if arguments.way:
        print_found(arguments)
        return
    case = CASES[arguments.case]
    ways = {}
    for way in arguments.ways:
        words = ["--case", str(arguments.case), "--way", way, "--steps", str(arguments.steps)]
        command = [sys.executable, "-m", "benchmarks.train_profile", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        ways[way] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"{way}: {json.dumps(ways[way], indent=2)}\n")
    report = {
        "benchmark": "train_profile",
        "case": case.name,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "precision": precision("cpu"),
        "bf16_product_gflops": round(matmul_flops(torch.bfloat16) / 1e9),
        "ways": ways,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def print_found(arguments: argparse.Namespace) -> None:
    case, steps = CASES[arguments.case], arguments.steps
    dtype = DTYPES[precision("cpu")]
    before = matmul_flops(dtype)
    with contextlib.ExitStack() as stack:
        if arguments.way == "naive":
            for module in ("step", "precision"):
                name = f"training.{module}.attention_kernel"
                patched = mock.patch(name, return_value=contextlib.nullcontext())
                stack.enter_context(patched)
            stack.enter_context(mock.patch.object(Model, "can_cut_text", False))
        watch = Watch(case, steps)
        stack.enter_context(mock.patch.object(loop, "train_step", watch.step))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        compiled = f"train.compile={'on' if arguments.way == 'compiled' else 'off'}"
        config = load_config(None, [*settings_of(case, folder / "run"), compiled])
        with contextlib.suppress(Enough):
            loop.train(config)
    peak = (before + matmul_flops(dtype)) / 2
    found = watch.summary()
    found |= {"peak_gflops": round(peak / 1e9), "mfu": round(watch.flops_per_s / peak, 3)}
    sys.stdout.write(json.dumps(found) + "\n")


class Enough(Exception):
    pass


class Watch:
    """In place of the loop's step: the first ones pass, some are timed, some profiled."""

    def __init__(self, case: Case, steps: int) -> None:
        self._case, self._steps, self._taken = case, steps, 0
        self._real, self._last = loop.train_step, 0.0
        self._seconds: list[float] = []
        self._flops: list[float] = []
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def step(self, run: Run, batch: Batch, counts: list[int]) -> dict[str, Tensor]:
        past = self._taken - self._case.skip
        if past == self._steps:
            self._profile.__enter__()
        if past == 2 * self._steps:
            self._profile.__exit__(None, None, None)
            raise Enough
        result = self._real(run, batch, counts)
        now = time.perf_counter()
        if 0 < past < self._steps:
            assert run.work is not None
            self._seconds.append(now - self._last)
            self._flops.append(run.work.of(batch))
        self._last = now
        self._taken += 1
        return result

    @property
    def flops_per_s(self) -> float:
        return sum(self._flops) / sum(self._seconds)

    def summary(self) -> dict[str, Any]:
        spent = dict.fromkeys([*KINDS, "else"], 0.0)
        for event in self._profile.key_averages():
            spent[kind_of(event.key)] += event.self_cpu_time_total
        total = sum(spent.values())
        return {
            "samples_per_s": round(self._case.batch_size / median(self._seconds), 1),
            "shares": {kind: round(time / total, 3) for kind, time in spent.items()},
        }


def kind_of(operator: str) -> str:
    fitting = (kind for kind, parts in KINDS.items() if any(part in operator for part in parts))
    return next(fitting, "else")


def matmul_flops(dtype: torch.dtype, size: int = 2048, times: int = 8) -> float:
    """FLOP/s of a matrix product of torch's; the best of a few."""
    left, right = torch.randn(2, size, size, dtype=dtype)
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        left @ right
        spent.append(time.perf_counter() - began)
    return 2 * size**3 / min(spent)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, default=0, help="of benchmarks.train, from 0")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_profile.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
