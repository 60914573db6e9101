"""Broken samples and spikes do not break a run, and a continuation sees the same."""

import json
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL
from torch import Tensor, nn

from clipserve import checkpoint
from clipserve import objectives as kinds
from clipserve.cli.training import _rest
from clipserve.config import Config, TrainConfig, load_config
from clipserve.errors import TrainingError
from clipserve.transforms import ImageTransform
from training import guard, loop, terms
from training.guard import SkippedStep, check_step, find_end, keeping_statistics
from training.loop import train
from training.shards import PackOptions, pack
from training.state import Counters

Lines = list[dict[str, Any]]
STEPS = 12
SPIKE = 9


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> Path:
    pack(captioned(40), tmp_path / "shards", PackOptions(samples_per_shard=20))
    return tmp_path / "shards"


def config(shards: Path, out: Path, *more: str) -> Config:
    steps = [] if any(item.startswith("train.steps") for item in more) else [f"train.steps={STEPS}"]
    return load_config(None, [f"out={out}", f"data.train={shards}", *SMALL, *steps, *more])


def read(out: Path, name: str) -> Lines:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def tensors(out: Path, step: int) -> dict[str, Tensor]:
    """All that a checkpoint's files hold, by file and name."""
    folder = out / "checkpoints" / f"step-{step:09d}"
    return {
        f"{file.relative_to(folder)}/{name}": value
        for file in folder.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Step -> the samples that it was given."""
    seen: dict[int, list[int]] = {}
    real = loop.train_step

    def step(run: Any, batch: Any, counts: Any) -> Any:
        seen[run.state.counters.step + 1] = list(batch.samples)
        return real(run, batch, counts)

    monkeypatch.setattr(loop, "train_step", step)
    return seen


@dataclass
class Disturbance:
    """The steps in which something goes wrong."""

    nan: set[int] = field(default_factory=set)
    """one picture of the batch becomes not a number on its way into the model"""
    spike: set[int] = field(default_factory=set)
    """the loss is fifty times what it should be"""
    crash: set[int] = field(default_factory=set)
    now: int = 0


class Crash(BaseException):
    """After which nothing is saved, as by a kill."""


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Disturbance:
    """Disturbs what is trained in this test."""
    steps = Disturbance()
    real_step, real_normalize = loop.train_step, ImageTransform.normalize
    real_loss = terms._TERMS[kinds.Contrastive]

    def step(run: Any, batch: Any, counts: Any) -> Any:
        steps.now = run.state.counters.step + 1
        if steps.now in steps.crash:
            raise Crash
        return real_step(run, batch, counts)

    def normalize(self: ImageTransform, pixels: Tensor) -> Tensor:
        values = real_normalize(self, pixels)
        if steps.now in steps.nan:
            values[1] = math.nan
        return values

    def loss(objective: Any, seen: Any) -> Tensor:
        return real_loss(objective, seen) * (50 if steps.now in steps.spike else 1)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(ImageTransform, "normalize", normalize)
    monkeypatch.setitem(terms._TERMS, kinds.Contrastive, loss)
    monkeypatch.setattr(guard, "_FEWEST", 4)
    return steps


EVERYTHING = [
    "objectives=[{name='contrastive'}, {name='momentum_contrast', queue_size=13, momentum=0.9},"
    " {name='simclr', hidden_size=8, output_size=6}]",
    "train.ema=0.9",
    "train.checkpoint_every_steps=1",
    "train.keep_checkpoints=99",
]


def test_a_step_with_one_broken_sample_changes_nothing_and_the_run_goes_on(
    shards: Path, tmp_path: Path, disturbed: Disturbance, trained_on: dict[int, list[int]]
) -> None:
    out = tmp_path / "run"
    disturbed.nan.update({3, 5})
    result = train(config(shards, out, *EVERYTHING, "train.steps=5"))
    assert result.step == 5
    names = tensors(out, 4)
    files = {name.split("/")[1] for name in names if name.startswith("state/")}
    kinds_of_memory = ("heads", "momentum", "network", "optimizer", "queue")
    assert files == {f"{kind}.safetensors" for kind in kinds_of_memory}
    assert same(tensors(out, 5), names)
    assert not same(tensors(out, 4), tensors(out, 2))
    assert not (out / "checkpoints" / "step-000000003").exists()  # not yet, where all may be broken
    lines = read(out, "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2]
    assert ["loss" in line for line in lines] == [True, True, False, True, False]
    skipped = read(out, "skipped_samples.jsonl")
    assert {line["step"] for line in skipped} == {3, 5}
    first = [line for line in skipped if line["step"] == 3]
    assert len(first) == len(trained_on[3]) == 8
    assert all(line["reason"] == "the loss is nan" for line in first)
    assert {"step", "shard", "key", "reason"} == set(first[0])


def test_too_many_skipped_steps_end_the_run_with_a_checkpoint_and_the_reason(
    shards: Path, tmp_path: Path, disturbed: Disturbance
) -> None:
    out = tmp_path / "run"
    disturbed.nan.update({2, 4, 5, 6})
    settings = config(shards, out, "train.max_skipped=2", "train.checkpoint_every_steps=1")
    reason = r"3 of the last 5 steps were skipped, more than train\.max_skipped = 2; at step 5 the"
    with pytest.raises(TrainingError, match=reason) as caught:
        train(settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert (out / "latest").resolve().name == "step-000000003"
    aside = out / "checkpoints" / "skipped-step-000000005"
    checkpoint.verify(aside)
    note = json.loads((out / "run.json").read_text())
    assert (note["state"], note["reason"]) == ("stopped", str(caught.value))
    further = config(shards, out, "train.max_skipped=4")  # 6 is skipped, too
    assert train(further, resume=str(aside)).step == STEPS
    assert read(out, "metrics.jsonl")[-1]["skipped_steps"] == 4  # the three before are known


def test_a_run_whose_last_steps_were_all_skipped_is_no_success(
    shards: Path, tmp_path: Path, disturbed: Disturbance
) -> None:
    disturbed.nan.update({4, 5, 6})
    with pytest.raises(TrainingError, match="the last 3 steps of the run were skipped"):
        train(config(shards, tmp_path / "run", "train.steps=6"))


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> dict[int, signal.Signals]:
    """Step -> the signal that comes in it, once."""
    signals: dict[int, signal.Signals] = {}
    real = loop.train_step

    def step(run: Any, batch: Any, counts: Any) -> Any:
        if number := signals.pop(run.state.counters.step + 1, None):
            signal.raise_signal(number)
        return real(run, batch, counts)

    monkeypatch.setattr(loop, "train_step", step)
    return signals


def test_a_run_that_is_stopped_in_a_skipped_step_replaces_no_good_checkpoint(
    shards: Path,
    tmp_path: Path,
    disturbed: Disturbance,
    signalled: dict[int, signal.Signals],
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    disturbed.nan.add(7)
    train(config(shards, whole))
    signalled[7] = signal.SIGINT
    result = train(config(shards, out, "train.keep_checkpoints=1"))
    assert result.stopped_by == signal.SIGINT
    assert (out / "latest").resolve().name == "step-000000005"
    assert result.aside == out / "checkpoints" / "skipped-step-000000007"
    checkpoint.verify(result.aside)
    assert f"are kept as {result.aside} for --resume" in _rest(result)
    train(config(shards, out))
    assert logged_losses(out) == logged_losses(whole)
    assert same(tensors(out, STEPS), tensors(whole, STEPS))


def test_a_checkpoint_that_is_asked_for_in_a_skipped_step_comes_after_the_next(
    shards: Path, tmp_path: Path, disturbed: Disturbance, signalled: dict[int, signal.Signals]
) -> None:
    disturbed.nan.update({2, 3})
    signalled[2] = signal.SIGUSR1
    train(config(shards, tmp_path / "run", "train.keep_checkpoints=9", "train.steps=5"))
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000005"]


def test_a_validation_that_a_skipped_step_put_off_outlives_a_stop(
    shards: Path, tmp_path: Path, disturbed: Disturbance, signalled: dict[int, signal.Signals]
) -> None:
    out = tmp_path / "run"
    disturbed.nan.add(5)  # the end of the first epoch
    signalled[5] = signal.SIGTERM
    settings = config(shards, out, f"data.val={shards}", "train.steps=7")
    stopped = train(settings)
    assert stopped.aside is not None
    train(settings, resume=str(stopped.aside))
    lines = read(out, "metrics.jsonl")
    assert [line["step"] for line in lines if "val/mean_r1" in line] == [6, 7]


@pytest.mark.parametrize("is_spike", [True, False])
def test_a_run_that_ends_at_a_spike_is_told_of_the_setting(is_spike: bool, tmp_path: Path) -> None:
    counters = Counters(step=9, skipped=2, skipped_at=[8, 9])
    end = find_end(counters, 1, SkippedStep("the loss is 9", {}, is_spike), False, tmp_path)
    assert ("raise train.spike, or set it to 0" in str(end)) == is_spike


def logged_losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read(out, "metrics.jsonl") if "loss" in line}


SPIKED = ["train.checkpoint_every_steps=2", "train.keep_checkpoints=99"]


def test_a_spike_is_skipped_and_what_is_only_a_little_worse_is_not(
    shards: Path, tmp_path: Path, disturbed: Disturbance
) -> None:
    out = tmp_path / "run"
    disturbed.spike.update({2, SPIKE})  # at step 2 nothing is known yet
    train(config(shards, out, *SPIKED, f"train.steps={SPIKE}"))
    assert same(tensors(out, SPIKE), tensors(out, SPIKE - 1))
    assert {line["step"] for line in read(out, "skipped_samples.jsonl")} == {SPIKE}
    assert "a spike above" in read(out, "skipped_samples.jsonl")[0]["reason"]
    kept = {step: loss for step, loss in logged_losses(out).items() if step < SPIKE}
    state = json.loads((out / "latest" / "state" / "state.json").read_text())
    assert state["counters"]["losses"] == list(kept.values())
    assert state["counters"]["skipped_at"] == [SPIKE]


def test_a_roll_back_takes_the_checkpoints_weights_and_the_next_samples(
    shards: Path, tmp_path: Path, disturbed: Disturbance, trained_on: dict[int, list[int]]
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "run"
    train(config(shards, plain, *SPIKED))
    expected = dict(trained_on)
    disturbed.spike.add(SPIKE)
    every = [*EVERYTHING, "train.checkpoint_every_steps=4", "train.roll_back=true"]
    train(config(shards, out, *every, f"train.steps={SPIKE}", "optim.schedule=constant"))
    assert same(tensors(out, SPIKE), tensors(out, 8))
    train(config(shards, out, *every, "optim.schedule=constant"))
    assert trained_on == expected  # the order went on, past the bad batch
    state = json.loads((out / "latest" / "state" / "state.json").read_text())
    assert state["counters"]["rolled_back"] == 1


def test_a_run_killed_after_a_roll_back_goes_on_exactly(
    shards: Path, tmp_path: Path, disturbed: Disturbance
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    disturbed.spike.add(SPIKE)
    every = [*EVERYTHING, "train.checkpoint_every_steps=3", "train.roll_back=true"]
    train(config(shards, whole, *every))
    for crash in (SPIKE + 1, SPIKE + 2):  # before and after the next checkpoint, of step 10
        disturbed.crash.add(crash)
        with pytest.raises(Crash):
            train(config(shards, killed, *every))
        disturbed.crash.clear()
    train(config(shards, killed, *every))
    assert logged_losses(killed) == logged_losses(whole)
    assert same(tensors(killed, STEPS), tensors(whole, STEPS))
    assert read(killed, "skipped_samples.jsonl") == read(whole, "skipped_samples.jsonl")


def test_a_spike_before_the_first_checkpoint_is_only_skipped(
    shards: Path, tmp_path: Path, disturbed: Disturbance, caplog: pytest.LogCaptureFixture
) -> None:
    disturbed.spike.add(5)
    train(
        config(
            shards, tmp_path / "run", "train.steps=6", "train.roll_back=true", "data.batch_size=4"
        )
    )
    assert "step 5 skipped: the loss is" in caplog.text
    assert "no checkpoint yet to go back to" in caplog.text


@pytest.mark.parametrize("stop", [None, 6])
def test_a_loss_that_rises_for_good_when_weights_are_released_is_no_spike(
    shards: Path,
    tmp_path: Path,
    disturbed: Disturbance,
    signalled: dict[int, signal.Signals],
    stop: int | None,
) -> None:
    out, rest = tmp_path / "run", set(range(7, STEPS + 1))
    disturbed.spike.update(rest)
    if stop is not None:
        signalled[stop] = signal.SIGTERM
    thaw = ["optim.freeze=['image.*']", "optim.unfreeze_after_steps=6", "train.max_skipped=2"]
    for _ in range(2 if stop else 1):
        train(config(shards, out, *thaw))
    assert logged_losses(out).keys() == set(range(1, STEPS + 1))
    assert not (out / "skipped_samples.jsonl").exists()
    state = json.loads((out / "latest" / "state" / "state.json").read_text())
    assert len(state["counters"]["losses"]) == len(rest)


def test_a_roll_back_to_before_the_release_does_not_bring_its_losses_back(
    shards: Path, tmp_path: Path, disturbed: Disturbance
) -> None:
    out = tmp_path / "run"
    disturbed.spike.update(range(7, STEPS + 1))
    disturbed.nan.update({8, 9, 10})  # the third in a row goes back
    thaw = ["optim.freeze=['image.*']", "optim.unfreeze_after_steps=6", "train.roll_back=true"]
    train(config(shards, out, *thaw, "train.checkpoint_every_steps=6"))
    assert {line["step"] for line in read(out, "skipped_samples.jsonl")} == {8, 9, 10}
    state = json.loads((out / "latest" / "state" / "state.json").read_text())
    assert state["counters"]["rolled_back"] == 1


def settings(**given: Any) -> TrainConfig:
    return TrainConfig(steps=1, **given)


@pytest.mark.parametrize(
    ("before", "loss", "is_spike"),
    [
        ([2.0] * 31, 99.0, False),  # too few to tell
        ([2.0] * 32, 2.51, True),  # ten times the least deviation
        ([2.0] * 32, 2.49, False),
        ([1.0, 3.0] * 16, 11.9, False),  # median 2, deviation 1
        ([1.0, 3.0] * 16, 12.1, True),
        ([-0.9] * 32, -0.3, True),  # a loss may be negative
    ],
)
def test_a_spike_is_measured_by_the_usual_deviations_from_the_median(
    before: list[float], loss: float, is_spike: bool
) -> None:
    counters = Counters(losses=list(before))
    given = {"loss": torch.tensor(loss)}
    if is_spike:
        with pytest.raises(SkippedStep, match="a spike above"):
            check_step(counters, settings(), given, torch.tensor(1.0))
        assert counters.losses == before
    else:
        check_step(counters, settings(), given, torch.tensor(1.0))
        assert len(counters.losses) == len(before) + 1
    check_step(Counters(losses=list(before)), settings(spike=0), given, torch.tensor(1.0))


def test_a_gradient_that_is_not_finite_is_a_fault_of_its_own() -> None:
    with pytest.raises(SkippedStep, match="the gradient's norm is inf"):
        check_step(Counters(), settings(), {"loss": torch.tensor(1.0)}, torch.tensor(math.inf))


def test_the_last_losses_are_remembered_and_no_more() -> None:
    counters = Counters()
    for step in range(200):
        check_step(counters, settings(), {"loss": torch.tensor(float(-step))}, torch.tensor(0.0))
    assert counters.losses == [float(-step) for step in range(72, 200)]


@pytest.mark.parametrize(
    "fault",
    [SkippedStep("", {}, is_spike=False), TrainingError("a rank is gone"), KeyboardInterrupt()],
)
def test_running_statistics_are_as_before_after_a_step_that_was_not_taken(
    fault: BaseException,
) -> None:
    norm = nn.BatchNorm1d(2)

    def step() -> None:
        with keeping_statistics(norm):
            norm(torch.full((3, 2), math.nan))
            raise fault

    with pytest.raises(type(fault)):
        step()
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.num_batches_tracked == torch.tensor(0)
