"""Runs of seconds: what they train, their settings, and what they leave."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clipserve import checkpoint
from clipserve.config import Config, load_config
from training.loop import TrainResult, train
from training.shards import PackOptions, pack

SMALL = [
    "model.preset=tiny",
    "model.architecture.embed_dim=16",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.patch_size=16",
    "model.architecture.vision_cfg.width=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.vision_cfg.head_width=16",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.heads=2",
    "model.architecture.text_cfg.layers=1",
    "optim.warmup_steps=2",
    "data.batch_size=8",
    "data.workers=0",
    "train.precision=fp32",
    "train.compile=off",
    "train.log_every=1",
]


EASY = [
    "optim.lr=1e-2",
    "data.crop_scale=[1,1]",
    "model.architecture.vision_cfg.patch_dropout=0",
]


def packed(captioned: Any, folder: Path) -> Path:
    """The folder of shards to train on and of some to validate with; `captioned` is the fixture."""
    pack(captioned(24, "a"), folder / "data" / "train", PackOptions(samples_per_shard=10))
    pack(captioned(10, "b"), folder / "data" / "val")
    return folder / "data"


def config(data: Path, out: Path, *more: str) -> Config:
    given = [f"out={out}", f"data.train={data / 'train'}", f"data.val={data / 'val'}"]
    length = [] if any(m.startswith("train.steps") for m in more) else ["train.epochs=3"]
    return load_config(None, [*given, *SMALL, *length, *more])


def run(settings: Config, resume: str = "auto") -> tuple[TrainResult, str]:
    console = Console(file=io.StringIO(), width=200)
    result = train(settings, resume, console)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load_for_training(folder).network.state_dict())
