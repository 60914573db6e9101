"""Fine-tuning and what it forgets: a model of fashion photos learns aerial pictures.

    clipserve train out=FASHION model.preset=tiny data.batch_size=128 train.steps=2400 \\
        'data.train=../shared/data/fashion/train-*.tar' 'data.val=../shared/data/fashion/val-*.tar'
    python -m benchmarks.finetune FASHION/best SCRATCH [--data ../shared/data]
        [--methods full LoRA LiT] [--steps 100] [--alphas 0 0.5 1] [--out FILE.json]

Each method trains the model on the same pictures of the new task (ucm), rehearsal on as many of the
old one beside them; then retrieval is measured on the validation pictures of both tasks, also at
alphas between it and what it became (WiSE-FT). Runs in SCRATCH that were cut short go on, and
finished ones are only measured.
"""

import argparse
import json
import os
import platform
import tarfile
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.embedding import processor
from clipserve.checkpoint import read_description
from clipserve.config import Config, load_config
from clipserve.console import print_line
from clipserve.interpolate import load_pair
from clipserve.shards import ShardSet
from clipserve.sources import SourceOptions
from training.data import open_data
from training.distributed import ALONE
from training.evaluate.sweep import sweep
from training.loop import train
from training.recipe import prepare
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack

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
    "LoRA": ["optim.lr=1e-3", "lora.rank=16", "lora.alpha=32", "lora.whole=['logit_scale']"],
    "LiT": ["optim.lr=3e-4", "optim.freeze=['image.*']"],
    "word vectors": ["optim.lr=1e-3", "optim.freeze=['*','!text.token_embedding.weight']"],
    "rehearsal": ["optim.lr=3e-4", "data.batch_size=256"],
}
OLD_WEIGHT = 0.1  # passes over the old task's 17,000 pictures for each over the new one's 1,680
TASKS = ("old", "new")
ALPHAS = [number / 10 for number in range(11)]


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
        judge(methods.values())
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    show(methods)


def pack_ucm(source: Path, out: Path) -> Path:
    """Shards of its train and validation pictures, each with one of its five captions a time."""
    if (out / "val").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source / "images.tar") as archive:
        archive.extractall(out, filter="data")
    for split in ("train", "val"):
        options = PackOptions(SourceOptions(split=split, image_folder=out))
        pack(source / "captions.jsonl", out / split, options)
    return out


def measure(
    name: str, shards: Path, sets: Sequence[ShardSet], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train by one method, then recall on both tasks along the way from the start to the end."""
    out = arguments.scratch / name.replace(" ", "-")
    old = f"{arguments.data}/fashion/train-*.tar" if name == "rehearsal" else None
    given = [f"out={out}", f"model.pretrained={arguments.model}", train_data(shards, old)]
    settings = [*COMMON, *METHODS[name], f"train.steps={arguments.steps}"]
    config = load_config(None, [*given, *settings])
    share = trained_share(config)
    outcome = train(config)
    pair = load_pair(arguments.model, out / "latest")
    rows = sweep(*pair, arguments.alphas, sets, device="cpu")["rows"]
    return {
        "settings": METHODS[name],
        "trained_share": share,
        "step": outcome.step,
        "train_s": outcome.seconds,
        "alphas": [
            {"alpha": r["alpha"], **dict(zip(TASKS, r["recall"], strict=True))} for r in rows
        ],
    }


def train_data(new: Path, old: str | None) -> str:
    """The setting data.train."""
    sets = [f"{{path='{new}'}}"]
    if old is not None:
        sets.append(f"{{path='{old}',weight={OLD_WEIGHT}}}")
    return f"data.train=[{','.join(sets)}]"


def trained_share(config: Config) -> float:
    """The part of the model's numbers, adapters counted in their place, that is trained."""
    run = prepare(config, open_data(config, RunDirectory(Path(config.out), 1)), ALONE)
    groups = run.state.optimizer.param_groups
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    return trained / sum(parameter.numel() for parameter in run.state.model.parameters())


def judge(methods: Iterable[dict[str, Any]]) -> None:
    """Say of each row, in place, which part of the old task's recall@10 it keeps, and which it has
    of the gain on the new one: of its method's at alpha 1, and of the largest of any row."""
    tables = [method["alphas"] for method in methods]
    largest = max(recall(row)[1] - recall(at(0, rows))[1] for rows in tables for row in rows)
    for rows in tables:
        old, new = recall(at(0, rows))
        for row in rows:
            gain = recall(row)[1] - new
            row["kept"] = part(recall(row)[0], old)
            row["gained"] = part(gain, recall(at(1, rows))[1] - new)
            row["of_largest"] = part(gain, largest)


def at(alpha: float, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    (row,) = (row for row in rows if row["alpha"] == alpha)
    return row


def recall(row: dict[str, Any]) -> list[float]:
    """Recall@10 on the old and the new task, of both directions."""
    return [row[task]["mean_r10"] for task in TASKS]


def part(value: float, whole: float) -> float | None:
    """None where there is no whole: nothing was known, or nothing gained."""
    return value / whole if whole > 0 else None


def show(methods: dict[str, Any]) -> None:
    for name, method in methods.items():
        print_line(f"{name}: {method['trained_share']:.2%} trained, {method['train_s']:.0f} s")
        for row in method["alphas"]:
            parts = [row[key] for key in ("kept", "gained", "of_largest")]
            cells = ["-" if value is None else f"{value:.1%}" for value in parts]
            print_line(
                "  ".join([f"{row['alpha']:.2f}", *map("{:.1%}".format, recall(row)), *cells])
            )


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, help="from 0 to 1")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune.json"))
    arguments = parser.parse_args(given)
    if not {0, 1} <= set(arguments.alphas) or not all(0 <= a <= 1 for a in arguments.alphas):
        parser.error("--alphas must hold 0, the model before, 1, what it became, and none beyond")
    return arguments


if __name__ == "__main__":
    main()
