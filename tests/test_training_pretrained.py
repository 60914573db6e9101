"""Runs that start from the weights of other programs, of other sizes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import CAPTIONS, tiny_albef

from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.convert import export_model, import_model
from clipserve.convert.fitting import resize_text
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import create
from training.loop import train
from training.shards import pack

FEW_STEPS = [
    "optim.warmup_steps=1",
    "data.batch_size=8",
    "data.workers=0",
    "train.precision=fp32",
    "train.compile=off",
    "train.steps=3",
]
COLOURS = ["red", "green", "blue", "black", "white", "pink", "orange", "purple"]


@pytest.fixture
def start(architecture: dict[str, Any], tmp_path: Path) -> Path:
    """transformers' CLIP with a text context of 77."""
    torch.manual_seed(0)
    text = architecture["text_cfg"] | {"context_length": 77}
    checkpoint.save(create(architecture | {"text_cfg": text}), tmp_path / "model", name="clip")
    export_model(tmp_path / "model", tmp_path / "start", "transformers")
    return tmp_path / "start"


def write_captions(table: Path, captions: list[str]) -> None:
    rows = [f"{number}.png,{caption}" for number, caption in enumerate(captions)]
    table.write_text("\n".join(["image,caption", *rows]) + "\n")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_a_text_context_of_128_trains_from_weights_of_77(
    start: Path, captioned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Of 128 tokens, the first 81 of which are all the same.
    captions = [" ".join(["very"] * 80 + [colour] * 46) for colour in COLOURS]
    table = captioned(len(captions))
    write_captions(table, captions)
    pack(table, tmp_path / "shards")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}"]
    given = [f"model.pretrained={start}", "model.architecture.text_cfg.context_length=128"]
    longer = ["train.steps=30", "train.log_every=1", "optim.lr=3e-3"]
    train(load_config(None, [*where, *given, *FEW_STEPS, *longer]))
    assert "text positions 77 -> 128: the first 20 stay" in caplog.text

    trained = checkpoint.load_for_training(tmp_path / "run" / "latest")
    assert trained.tokenizer(captions).lengths == [128] * len(captions)
    assert not any(trained.tokenizer(captions).truncated)
    before = checkpoint.load_for_training(tmp_path / "model").network.state_dict()
    now = trained.network.state_dict()
    assert torch.allclose(now["ln_final.weight"], before["ln_final.weight"], atol=0.2)
    stretched = resize_text(before["positional_embedding"], 128)
    assert (now["positional_embedding"] != stretched).any(dim=1)[77:].all()
    # Who reads 77 tokens of captions that agree in 81 cannot tell them apart: ln 8.
    first, *_, last = losses(tmp_path / "run")
    assert last < 0.8 * math.log(len(COLOURS)) < first


def test_an_albef_trains_with_a_longer_context_within_its_positions(
    captioned: Any, tmp_path: Path
) -> None:
    albef = tiny_albef(tmp_path / "vocabulary", positions=40)
    checkpoint.save(albef, tmp_path / "model", name="albef")
    table = captioned(6)
    long = [" ".join(CAPTIONS[first:] + CAPTIONS[:first]) for first in range(6)]  # over 30 tokens
    write_captions(table, long)
    pack(table, tmp_path / "shards")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}"]
    given = [f"model.pretrained={tmp_path / 'model'}"]
    given += ["model.architecture.text_cfg.context_length=24"]
    train(load_config(None, [*where, *given, *FEW_STEPS, "data.batch_size=6"]))
    trained = checkpoint.load_for_training(tmp_path / "run" / "latest")
    name = "text.embeddings.positions.weight"
    changed = trained.network.state_dict()[name] != albef.network.state_dict()[name]
    assert trained.context_length == 24
    assert changed.any(dim=1).tolist() == [True] * 24 + [False] * 16


def test_a_run_says_what_it_was_tuned_from_and_goes_on_from_nothing_else(
    start: Path, captioned: Any, tmp_path: Path
) -> None:
    pack(captioned(16), tmp_path / "shards")
    fingerprint, _ = import_model(start, tmp_path / "imported")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}", *FEW_STEPS]
    train(load_config(None, [*where, f"model.pretrained={start}"]))
    told = checkpoint.verify((tmp_path / "run" / "latest").resolve())["training"]
    assert (told["start"], told["start_fingerprint"]) == ("start", fingerprint)
    more = [*where, "train.steps=4"]
    train(load_config(None, [*more, f"model.pretrained={tmp_path / 'imported'}"]))  # is the same
    other = checkpoint.load_for_training(tmp_path / "imported")
    with torch.no_grad():
        other.network.visual.proj.add_(1)
    checkpoint.save(other, tmp_path / "other", name="other")
    with pytest.raises(CheckpointError, match=r"model\.pretrained now means the weights"):
        train(load_config(None, [*more, f"model.pretrained={tmp_path / 'other'}"]))


def test_another_architecture_than_that_of_the_weights_is_refused(
    start: Path, captioned: Any, tmp_path: Path
) -> None:
    pack(captioned(16), tmp_path / "shards")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}"]
    given = [f"model.pretrained={start}", "model.architecture.text_cfg.layers=2"]
    with pytest.raises(ConfigError, match=r"not that of model\.pretrained"):
        train(load_config(None, [*where, *given, *FEW_STEPS]))
