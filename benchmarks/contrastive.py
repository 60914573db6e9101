"""Memory and time of the contrastive loss: by tiles, dense, and open_clip's ClipLoss.

    python -m benchmarks.contrastive [--sizes 2048 4096 ...] [--tile-size 2048] [--out FILE.json]

Forward and backward on random unit vectors of 512 numbers. Memory is the peak above what the
process held just before: without the features, with their gradients. Each measurement is a process
of its own. On a CPU that is resident memory, on a GPU what torch allocated. What would not fit into
free memory is not run: the table then says four times the peak of half the rows, and which are such
estimates. Times are medians; the variants take turns in one process.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import Tensor

from benchmarks.embedding import processor
from training.objectives.contrastive import contrastive_loss

PACKAGES = ("torch", "open_clip_torch")
WIDTH = 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("tiled", "dense", "open_clip")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 12288, 16384, 24576, 32768]
    )
    parser.add_argument("--time-size", type=int, default=8192)
    parser.add_argument("--tile-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/contrastive.json"))
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:  # one measurement, in a process started by `measure_memory`
        loss = losses(arguments.tile_size)[arguments.peak_of]
        sys.stdout.write(json.dumps(peak_bytes(loss, arguments.sizes[0])))
        return
    report = {
        "benchmark": "contrastive",
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        },
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "embedding": WIDTH,
        "tile_size": arguments.tile_size,
        "peak_mb": measure_memory(arguments.sizes, arguments.tile_size),
        "seconds": measure_time(arguments.time_size, arguments.tile_size, arguments.rounds),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def losses(tile_size: int) -> dict[str, Loss]:
    return {
        "tiled": partial(contrastive_loss, tile_size=tile_size),
        "dense": contrastive_loss,
        "open_clip": ClipLoss(),
    }


def measure_memory(sizes: list[int], tile_size: int) -> dict[str, dict[str, Any]]:
    """Peak megabytes by number of rows and variant, and the part of the dense one's by tiles."""
    table: dict[str, dict[str, Any]] = {}
    measured: dict[tuple[str, int], float] = {}
    for size in sorted(sizes):
        row: dict[str, Any] = {"estimated": []}
        for name in VARIANTS:
            estimate = 4 * measured.get((name, size // 2), 0)
            if estimate > free_bytes():
                measured[name, size] = estimate
                row["estimated"].append(name)
            else:
                measured[name, size] = measure_peak(name, size, tile_size)
            row[name] = round(measured[name, size] / 1e6, 1)
        row["tiled / dense"] = round(measured["tiled", size] / measured["dense", size], 4)
        table[str(size)] = row
    return table


def measure_peak(name: str, size: int, tile_size: int) -> float:
    command = [sys.executable, "-m", "benchmarks.contrastive", "--peak-of", name]
    command += ["--sizes", str(size), "--tile-size", str(tile_size)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout))


def peak_bytes(loss: Loss, size: int) -> int:
    """Most bytes in use during one forward and backward, above those before."""
    run(loss, features(64))  # what is set up once
    inputs = features(size)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present, proc(5)
    before = status_bytes("VmHWM")
    run(loss, inputs)
    return status_bytes("VmHWM") - before


def measure_time(size: int, tile_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of forward and backward, the median of rounds, and the ratios to ours by tiles."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    inputs = features(size)
    for number in range(rounds + 1):
        for name, loss in losses(tile_size).items():
            started = time.perf_counter()
            run(loss, inputs)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "rows": size,
        "rounds": rounds,
        **{name: round(value, 4) for name, value in median.items()},
        "range": {name: [round(f(v), 4) for f in (min, max)] for name, v in seconds.items()},
        "tiled / dense": round(median["tiled"] / median["dense"], 3),
        "tiled / open_clip": round(median["tiled"] / median["open_clip"], 3),
    }


def features(size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(size, WIDTH, device=DEVICE), dim=1) for _ in "it")
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    return image.requires_grad_(), text.requires_grad_(), scale


def run(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward; the gradients are dropped."""
    torch.autograd.grad(loss(*inputs), inputs)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def status_bytes(field: str) -> int:
    """A size from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def free_bytes() -> float:
    if DEVICE == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * float(line.split()[1])
    raise KeyError("MemAvailable")


if __name__ == "__main__":
    main()
