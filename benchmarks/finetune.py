"""Fine-tuning and what it forgets: a model of fashion photos learns aerial pictures.

    python -m benchmarks.finetune MODEL SCRATCH [--data ../shared/data] [--methods full LoRA LiT]
        [--steps 100] [--out FILE.json]

Each method trains MODEL on the same batches of the new task (ucm); then retrieval is measured on
the validation pictures of both tasks, also at alphas between MODEL and what it became (WiSE-FT).
Runs in SCRATCH that were cut short go on, and finished ones are only measured.
"""

import argparse
import json
import os
import platform
import tarfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.embedding import processor
from clipserve.checkpoint import read_description
from clipserve.config import load_config
from clipserve.console import print_line
from clipserve.interpolate import load_pair
from clipserve.shards import ShardSet
from training.evaluate.sweep import sweep
from training.loop import train
from training.shards import pack

PACKAGES = ("torch", "open_clip_torch", "numpy")
COMMON = [
    "data.batch_size=128",
    "data.workers=0",
    "optim.betas=[0.9,0.98]",
    "optim.weight_decay=0.1",
    "optim.warmup_steps=15",
    "optim.grad_clip=1.0",
    "train.device=cpu",
    "train.keep_checkpoints=1",
]
METHODS = {
    "full": ["optim.lr=3e-4"],
    "LoRA": ["optim.lr=5e-4", "lora.rank=4", "lora.alpha=8"],
    "LiT": ["optim.lr=3e-4", "optim.freeze=['image.*']"],
}
TASKS = ("old", "new")


def main() -> None:
    arguments = read_arguments()
    new = pack_ucm(arguments.data / "ucm", arguments.scratch / "ucm")
    sets = [ShardSet.open(f"{arguments.data}/fashion/val-*.tar"), ShardSet.open(new / "val")]
    methods: dict[str, Any] = {}
    result = {
        "benchmark": "finetune",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "model": read_description(arguments.model)["training"],
        "steps": arguments.steps,
        "common": COMMON,
        "methods": methods,
    }
    for name in arguments.methods:
        methods[name] = measure(name, new / "train", sets, arguments)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def pack_ucm(source: Path, out: Path) -> Path:
    """Shards of its train and validation pictures, each with one of its five captions a time."""
    if (out / "val").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source / "images.tar") as archive:
        archive.extractall(out, filter="data")
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    for split in ("train", "val"):
        lines = [json.dumps(row) for row in rows if row["split"] == split]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        pack(out / f"{split}.jsonl", out / split)
    return out


def measure(
    name: str, shards: Path, sets: Sequence[ShardSet], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train by one method, then recall on both tasks along the way from the start to the end."""
    out = arguments.scratch / name
    given = [f"out={out}", f"model.pretrained={arguments.model}", f"data.train={shards}"]
    settings = [*COMMON, *METHODS[name], f"train.steps={arguments.steps}"]
    began = time.process_time()
    outcome = train(load_config(None, [*given, *settings]))
    spent = time.process_time() - began
    rows = sweep(*load_pair(arguments.model, out / "latest"), arguments.alphas, sets, device="cpu")[
        "rows"
    ]
    found: dict[str, Any] = {
        "settings": METHODS[name],
        "step": outcome.step,
        "processor_s": spent,
        "alphas": [
            {"alpha": r["alpha"], **dict(zip(TASKS, r["recall"], strict=True))} for r in rows
        ],
    }
    for row in found["alphas"]:
        row |= judged(row, found["alphas"][0], found["alphas"][-1])
        numbers = "  ".join(f"{row[task]['mean_r10']:.3f}" for task in TASKS)
        print_line(f"{name:5} {row['alpha']:.2f}  {numbers}  {row['kept']:.3f} {row['gained']:.3f}")
    return found


def judged(row: dict[str, Any], start: dict[str, Any], tuned: dict[str, Any]) -> dict[str, float]:
    """The part of the old task's recall@10 that is kept, and of the gain on the new one."""
    old, new = ([at[task]["mean_r10"] for at in (start, row, tuned)] for task in TASKS)
    return {"kept": old[1] / old[0], "gained": (new[1] - new[0]) / (new[2] - new[0])}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    parser.add_argument("--alphas", type=float, nargs="+", default=alphas, help="from 0 to 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
