"""Options together: two steps, a new start and two more are four steps, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL
from test_training_fine_tuning import check_equal

from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.model import create
from training.loop import train
from training.shards import PackOptions, pack

EMA = ["train.ema=0.9"]
LORA = ["lora.rank=2", "lora.dropout=0.3", "lora.whole=['logit_scale']", "optim.lr=1e-2"]
PARTS = ["train.accum_freq=3"]
THAWING = ["optim.freeze=['image.*']", "optim.unfreeze_after_steps=3"]
HALF = ["train.precision=fp16"]
CHECKPOINTED = ["train.grad_checkpointing=true"]
QUEUE = ["objectives=[{name='contrastive'}, {name='momentum_contrast', queue_size=13}]"]
VIEWS = ["objectives=[{name='contrastive'}, {name='simclr', hidden_size=8, output_size=4}]"]
RESNET = ["model.architecture.vision_cfg={image_size=32, width=8, layers=[1, 1, 1, 1]}"]
COMBINATIONS = {
    "adapters, average, micro-batches": LORA + EMA + PARTS,
    "adapters, fp16, checkpointed layers": LORA + HALF + CHECKPOINTED,
    "thawing, micro-batches, checkpointed layers": THAWING + PARTS + CHECKPOINTED,
    "thawing, average, queue": THAWING + EMA + QUEUE,
    "average, queue, micro-batches, fp16": EMA + QUEUE + PARTS + HALF,
    "thawing, heads, micro-batches": THAWING + VIEWS + PARTS,
    "batch norm, average, thawing": RESNET + EMA + THAWING,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a model to begin from."""
    from conftest import encode, make_picture, tiny_architecture

    folder = tmp_path_factory.mktemp("data")
    lines = ["image,caption"]
    for i in range(20):
        (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
        lines.append(f"{i}.png,picture number {i}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    pack(folder / "captions.csv", folder / "shards", PackOptions(samples_per_shard=10))
    table = tiny_architecture()
    table["vision_cfg"]["patch_dropout"] = 0.5
    checkpoint.save(create(table), folder / "base", name="base", objective=("contrastive",))
    return folder


@pytest.mark.parametrize("name", COMBINATIONS)
def test_two_steps_and_two_more_are_four(name: str, data: Path, tmp_path: Path) -> None:
    options = COMBINATIONS[name]
    sizes: list[Any] = [s for s in SMALL if options[0] != LORA[0] or not s.startswith("model.")]
    start = [f"model.pretrained={data / 'base'}"] if options[0] == LORA[0] else []

    def run(out: Path, resume: str = "auto") -> Path:
        shards = data / "shards"
        given = [f"out={out}", f"data.train={shards}", f"data.val={shards}", "data.last_batch=keep"]
        saving = ["train.steps=4", "train.checkpoint_every_steps=2", "train.keep_checkpoints=9"]
        train(load_config(None, [*given, *sizes, *start, *saving, *options]), resume)
        return out / "checkpoints"

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", resume=str(whole / "step-000000002"))
    check_equal(whole / "step-000000004", again / "step-000000004")
