"""Whole runs that train a part, average, stop early; each goes on as if it had never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, config, run, weights
from test_training_continuation import check_same_but_for_rounding, read_trace, run_ranks
from test_training_continuation import run as run_alone

from clipserve import checkpoint
from clipserve.errors import CheckpointError, ConfigError
from training.loop import train
from training.momentum import Twin, ramped
from training.shards import PackOptions, pack
from training.state import Counters


@pytest.fixture
def data(captioned: Any, tmp_path: Path) -> Path:
    pack(captioned(24, "a"), tmp_path / "data" / "train", PackOptions(samples_per_shard=10))
    pack(captioned(10, "b"), tmp_path / "data" / "val")
    return tmp_path / "data"


def state_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("state/*.safetensors"))}


def check_equal(one: Path, other: Path) -> None:
    """Model and state of two checkpoints, to the last bit."""
    first, second = state_files(one), state_files(other)
    assert first.keys() == second.keys()
    pairs = [(first[name], second[name]) for name in first]
    for mine, theirs in [*pairs, (weights(one), weights(other))]:
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


FINE = [
    "train.ema=0.9",
    "optim.freeze=['image.*','!image.proj']",
    "optim.unfreeze_after_steps=4",
    "optim.layer_decay=0.5",
    "optim.text.lr=1e-4",
    "optim.heads.lr=1e-4",
    "optim.schedule=wsd",
    "optim.decay_steps=3",
    "optim.grad_clip=1.0",
    'objectives=[{name="contrastive"},{name="simclr",hidden_size=8,output_size=4}]',
    "train.keep_checkpoints=99",
    "train.checkpoint_every_steps=1",
    "train.early_stop={patience=9}",
]


@pytest.mark.parametrize("name", ["adamw", "stableadamw", "lion", "muon", "nadamw", "adopt"])
def test_a_fine_tuning_goes_on_to_the_last_bit(name: str, data: Path, tmp_path: Path) -> None:
    more = [*FINE, f"optim.name={name}"]
    run(config(data, tmp_path / "whole", *more))
    for step in (2, 5):  # before and after the picture's tower begins to learn
        start = tmp_path / "whole" / "checkpoints" / f"step-{step:09d}"
        run(config(data, tmp_path / f"from-{step}", *more), resume=str(start))
        check_equal(tmp_path / "whole" / "latest", tmp_path / f"from-{step}" / "latest")


def test_frozen_weights_are_the_same_to_the_last_bit_and_the_others_learn(
    data: Path, tmp_path: Path
) -> None:
    run(config(data, tmp_path / "base", "train.steps=1"))
    base = tmp_path / "base" / "latest"
    lit = ["model.pretrained=" + str(base.resolve()), "optim.freeze=['image.*']"]
    settings = [s for s in SMALL if "architecture" not in s and "preset" not in s]
    from clipserve.config import load_config

    out = tmp_path / "lit"
    given = [f"out={out}", f"data.train={data / 'train'}", "train.epochs=2", *lit, *settings]
    run(load_config(None, given))
    before, after = weights(base), weights(out / "latest")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("visual.")}
    moments = load_file(out / "latest" / "state" / "optimizer.safetensors")
    assert not any("visual." in name for name in moments)


def test_weights_thaw_after_the_steps_that_were_said(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ["train.checkpoint_every_steps=1", "train.keep_checkpoints=99"]
    freeze = ["optim.freeze=['image.*']", "optim.unfreeze_after_steps=3", "train.steps=5"]
    run(config(data, out, *every, *freeze))
    seen = [weights(out / "checkpoints" / f"step-{step:09d}") for step in range(1, 6)]
    proj = [found["visual.proj"] for found in seen]
    assert torch.equal(proj[0], proj[2])
    assert not torch.equal(proj[2], proj[3])
    text = [found["text_projection"] for found in seen]
    assert not torch.equal(text[0], text[1])


def test_an_average_is_that_of_the_weights_of_every_step(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ["train.checkpoint_every_steps=1", "train.keep_checkpoints=99", "train.steps=12"]
    run(config(data, out, *every, "train.ema=0.5"))
    folders = [out / "checkpoints" / f"step-{step:09d}" for step in range(1, 13)]
    trained = [load_file(folder / "state" / "network.safetensors") for folder in folders]
    name = "visual.proj"
    first = weights(folders[0])[name]
    average = first.clone()
    for step, folder in enumerate(folders[1:], start=1):
        keep = min(0.5, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * trained[step][name]
        assert torch.allclose(weights(folder)[name], average, atol=1e-7), step
    assert not torch.equal(weights(folders[-1])[name], trained[-1][name])
    checkpoint.verify(out / "best")


def test_the_first_weights_of_an_average_fade_at_once() -> None:
    assert [ramped(0.999, step) for step in (0, 2, 10**6)] == [0.1, 0.25, 0.999]
    network = torch.nn.Linear(1, 1, bias=False)
    twin = Twin(network, 0.999)
    with torch.no_grad():
        network.weight.add_(1.0)
    before = twin.network.weight.item()
    twin.update(network, ramped(twin.momentum, 0))
    assert twin.network.weight.item() == pytest.approx(before + 0.9)


def test_the_average_is_what_is_validated(data: Path, tmp_path: Path) -> None:
    from clipserve.shards import ShardSet
    from training.evaluate.retrieval import evaluate_retrieval

    result, _ = run(config(data, tmp_path / "run", "train.ema=0.9", "train.steps=6"))
    model = checkpoint.load(tmp_path / "run" / "latest", device="cpu")
    expected = evaluate_retrieval(model, ShardSet.open(data / "val"), prefix="val/")
    assert result.metrics == expected


def test_a_run_with_an_average_does_not_go_on_without_it(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, "train.ema=0.9", "train.steps=1"))
    with pytest.raises(CheckpointError, match=r"holds network\.safetensors.*train\.ema"):
        train(config(data, out, "train.steps=2"))


def test_another_optimizer_does_not_take_over_the_moments(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, "train.steps=1"))
    with pytest.raises(CheckpointError, match=r"written by AdamW.*Lion; change optim\.name back"):
        train(config(data, out, "train.steps=2", "optim.name=lion"))


# No learning at all: no validation is better than the first.
STALE = ["optim.lr=1e-30", "train.epochs=9", "data.crop_scale=[1,1]"]


def test_a_run_stops_early_and_stays_stopped(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = config_of(data, out, *STALE, "train.early_stop={patience=2}")
    result, _ = run(settings)
    assert (result.step, result.stopped_early) == (9, True)  # the first and two more epochs of 3
    assert (out / "latest").resolve().name == "step-000000009"
    before = (out / "metrics.jsonl").read_text()
    again, _ = run(settings)
    assert (again.step, again.stopped_early) == (9, True)
    assert (out / "metrics.jsonl").read_text() == before
    more, _ = run(config_of(data, out, *STALE, "train.early_stop={patience=4}"))
    assert more.step == 15


def test_what_is_watched_counts_validations_without_a_better_value() -> None:
    counters = Counters()
    seen = []
    for value in (0.1, 0.1, 0.2, 0.0, 0.2, 0.3):
        counters.watch(value)
        seen.append((counters.watched, counters.stale))
    assert seen == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1), (0.2, 2), (0.3, 0)]


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one_does_and_stop_together(data: Path, tmp_path: Path) -> None:
    more = [
        f"data.val={data / 'val'}",
        "optim.freeze=['image.*']",
        "optim.unfreeze_after_steps=5",
        "optim.name=muon",
        "train.ema=0.9",
        "train.early_stop={patience=1,metric='val/mean_r10'}",
        "model.architecture.vision_cfg.patch_dropout=0",
    ]
    shards = data / "train"
    run_alone(shards, tmp_path / "alone", more=more)
    run_ranks(shards, tmp_path / "two", 2, more)
    alone, two = read_trace(tmp_path / "alone"), read_trace(tmp_path / "two", ranks=2)
    check_same_but_for_rounding(two, alone)
    assert len(alone) == 6  # ten pictures are always among the first ten
    for name, value in weights(tmp_path / "alone" / "latest").items():
        other = weights(tmp_path / "two" / "latest")[name]
        # The first steps of an optimiser are as long for a gradient that is but rounding.
        assert (other - value).float().norm() <= 0.02 * value.float().norm() + 1e-3, name


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "train.early_stop={patience=1,metric='val/loss'}",
            r"early_stop\.metric 'val/loss' is not",
        ),
        ("optim.freeze=['imge.*']", r"did you mean 'image\.\*'"),
        ("optim.fusion.lr=1", r"optim\.fusion has no effect"),
    ],
)
def test_what_cannot_have_an_effect_is_refused_before_anything_is_trained(
    setting: str, words: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(data, tmp_path / "run", setting))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_norm_of_the_gradient_is_logged_as_it_was_before_clipping(
    data: Path, tmp_path: Path
) -> None:
    for name, more in (("free", []), ("clipped", ["optim.grad_clip=1e-3"])):
        run(config(data, tmp_path / name, "train.steps=1", *more))
    free, clipped = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"]
        for name in ("free", "clipped")
    )
    assert free == clipped > 1e-3


def config_of(data: Path, out: Path, *more: str) -> Any:
    from clipserve.config import load_config

    given = [f"out={out}", f"data.train={data / 'train'}", f"data.val={data / 'val'}"]
    return load_config(None, [*given, *SMALL, *more])
