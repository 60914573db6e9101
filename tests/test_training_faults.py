"""What goes wrong while a run trains: it says so, and what it had is not lost."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, config, losses, packed, run, weights

from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.errors import (
    CheckpointError,
    DataError,
    TooManyBadSamples,
    TooManySkippedSteps,
)
from clipserve.shards import ShardSet
from training import loop, saver
from training.distributed import World
from training.mixture import Mixture
from training.state import State, verify_state


@pytest.fixture
def data(captioned: Any, tmp_path: Path) -> Path:
    return packed(captioned, tmp_path)


def test_a_diverged_run_ends_with_its_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.train_step

    def step(prepared: Any, *rest: Any) -> Any:
        found = real(prepared, *rest)
        if prepared.state.counters.step + 1 == 5:
            for parameter in prepared.state.model.parameters():
                parameter.data *= 1e30
        return found

    monkeypatch.setattr(loop, "train_step", step)
    out = tmp_path / "run"
    more = ("train.keep_checkpoints=1", "train.max_skipped=3", "train.steps=30")
    for _ in range(2):  # the same command again finds the same
        with pytest.raises(TooManySkippedSteps, match="the loss is nan.*optim.lr") as caught:
            run(config(data, out, *more))
        (note,) = caught.value.__notes__
        aside = out / "checkpoints" / "skipped-step-000000009"
        assert f"kept as {aside} for --resume" in note
        assert note.endswith(f"goes on from {(out / 'latest').resolve()}")
        assert aside.exists()
        assert (out / "latest").resolve().name == "step-000000003"
        assert all(value.abs().max() < 1e3 for value in weights(out / "latest").values())
    checkpoint.verify(aside)


def test_a_failed_validation_leaves_a_checkpoint_and_is_made_up_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, (shard,) = loop.train_step, (data / "val").glob("*.tar")

    def step(prepared: Any, *rest: Any) -> Any:
        if prepared.state.counters.step == 4:
            shard.rename(data / "away.tar")
            prepared.val.close()
        return real(prepared, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", step)
        with pytest.raises(DataError, match=r"^shard .*000000\.tar"):
            run(config(data, out))
    assert (out / "latest").resolve().name == "step-000000006"
    (data / "away.tar").rename(shard)
    run(config(data, out))
    run(config(data, tmp_path / "whole"))
    assert validations(out) == validations(tmp_path / "whole")
    assert (out / "best").resolve().name == (tmp_path / "whole" / "best").resolve().name


@pytest.mark.parametrize("is_full", [False, True])
def test_a_gpu_without_room_for_validation_loses_no_epoch(
    is_full: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    out = tmp_path / "run"
    monkeypatch.setattr(saver, "evaluate_retrieval", fail)
    if is_full:
        monkeypatch.setattr(State, "save", fail)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(config(data, out))
    if is_full:
        (note,) = caught.value.__notes__
        assert note == "and no checkpoint could be written: CUDA out of memory."
    else:
        assert (out / "latest").resolve().name == "step-000000003"


FULL = "CUDA out of memory.\nTried to allocate 2 GiB"


@pytest.mark.parametrize(("owner", "name"), [(torch.Tensor, "backward"), (Mixture, "read")])
def test_whatever_fails_before_the_weights_change_loses_no_step(
    owner: type, name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tracked = getattr(owner, name), []
    wanted = 5 if owner is torch.Tensor else 4 * 8 + 1  # in step 5, of 8 samples

    def fail(*arguments: Any) -> Any:
        tracked.append(1)
        if len(tracked) == wanted:
            raise torch.OutOfMemoryError(FULL)
        return real(*arguments)

    out, settings = tmp_path / "run", ("train.steps=6", "data.last_batch=keep")
    given = config(data, out, *settings)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(torch.OutOfMemoryError):
            run(given)
    assert (out / "latest").resolve().name == "step-000000004"
    run(given)
    run(config(data, tmp_path / "whole", *settings))
    assert losses(out) == losses(tmp_path / "whole")


def test_weights_that_a_step_was_changing_are_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.optim.AdamW.step, []

    def step(optimizer: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError(FULL)
        return real(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    out = tmp_path / "run"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(config(data, out))
    (before,) = (out / "checkpoints").iterdir()
    assert before.name == "step-000000003"
    assert caught.value.__notes__ == [
        "and no checkpoint could be written: the step was changing the weights",
        f"the last one is {before}",
    ]


def validations(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val/mean_r1"] for line in lines if "val/mean_r1" in line}


def test_damaged_state_is_found_by_verify_and_by_resuming(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "run"))
    state = (tmp_path / "run" / "latest").resolve() / "state"
    for name in ("state.json", "optimizer.safetensors"):
        original = (state / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        (state / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            verify_state(state.parent)
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            run(config(data, tmp_path / "run", "train.epochs=9"))
        (state / name).write_bytes(original)
    verify_state(state.parent)


def test_a_link_that_leads_nowhere_is_not_a_fresh_start(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="latest leads nowhere"):
        run(config(data, tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_missing_shard_stops_the_run_with_a_checkpoint_of_its_last_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.train_step

    def step(prepared: Any, *rest: Any) -> Any:
        if prepared.state.counters.step == 3:
            for shard in (data / "train").glob("*.tar"):
                shard.unlink(missing_ok=True)
            for part in prepared.stream.data.parts:
                part.shards.close()
        return real(prepared, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(DataError, match=r"^shard .*00000\d\.tar") as caught:
        run(config(data, tmp_path / "run"))
    assert "\n" not in str(caught.value)
    last = int((tmp_path / "run" / "latest").resolve().name.removeprefix("step-"))
    assert last == 4
    assert max(losses(tmp_path / "run")) == last
    checkpoint.verify(tmp_path / "run" / "latest")


def test_a_full_disk_leaves_the_checkpoint_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = State.save

    def save(self: State, folder: Path, world: World) -> None:
        if self.counters.step > 3:  # no file may grow beyond this: as on a full disk, a write fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        real(self, folder, world)

    monkeypatch.setattr(State, "save", save)
    whole = r"step-000000006 cannot be written: File too large; .*step-000000003 is whole"
    try:
        with pytest.raises(CheckpointError, match=whole):
            run(config(data, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(State, "save", real)
    assert (tmp_path / "run" / "latest").resolve().name == "step-000000003"
    checkpoint.verify(tmp_path / "run" / "latest")
    run(config(data, tmp_path / "run"))
    run(config(data, tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_pack_killed_at_its_very_end_is_finished_by_training(
    captioned: Any, tmp_path: Path
) -> None:
    table = captioned(30)
    settings = [f"out={tmp_path / 'run'}", f"data.train={table}", "train.steps=1", *SMALL]
    run(load_config(None, settings))
    packed = tmp_path / "run" / "shards" / "train-0"
    before = (packed / "manifest.json").read_text()
    (packed.parent / "train-0.source.json").unlink()  # killed before it was written
    run(load_config(None, [*settings, "train.steps=2"]))
    assert (packed / "manifest.json").read_text() == before
    assert (packed.parent / "train-0.source.json").exists()


@pytest.fixture
def half_broken(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other training picture is cut when it is read."""
    real = ShardSet.read

    def read(self: ShardSet, i: int) -> Any:
        sample = real(self, i)
        if i % 2 and len(self) == 24:
            object.__setattr__(sample, "image", sample.image[:60])
        return sample

    monkeypatch.setattr(ShardSet, "read", read)


@pytest.mark.usefixtures("half_broken")
def test_too_many_bad_samples_stop_the_run_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TooManyBadSamples, match=r"of \d+ samples were bad.*max_bad_fraction"):
        run(config(data, tmp_path / "run"))
    listed = bad_lines(tmp_path / "run")
    assert len(listed) > 10
    assert {"step", "shard", "key", "kind", "reason"} == set(listed[0])
    assert (tmp_path / "run" / "latest").exists()


@pytest.mark.usefixtures("half_broken")
def test_bad_samples_are_counted_once_however_often_one_resumes(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["data.max_bad_fraction=0.9", "train.keep_checkpoints=9"]
    run(config(data, tmp_path / "run", *more))
    whole = bad_lines(tmp_path / "run")
    assert len(whole) == 36  # 12 of 24 in each of 3 epochs
    assert len([r for r in caplog.records if "bad sample" in r.message]) == 12  # once each
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-2])["samples"] == 36
    start = str(tmp_path / "run" / "checkpoints" / "step-000000006")
    run(config(data, tmp_path / "run", *more), resume=start)
    assert bad_lines(tmp_path / "run") == whole


def bad_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
