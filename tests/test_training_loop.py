import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import EASY, SMALL, config, losses, packed, run, weights

import clipserve
from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TooManyBadSamples,
)
from clipserve.shards import ShardSet, write_manifest
from clipserve.shards.scan import scan
from training.evaluate.retrieval import evaluate_retrieval
from training.loop import train
from training.saver import Saver
from training.shards import pack


@pytest.fixture
def data(captioned: Any, tmp_path: Path) -> Path:
    return packed(captioned, tmp_path)


def test_a_run_leaves_all_it_promises(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result, printed = run(config(data, out))
    assert result.step == 9
    assert (out / "latest").resolve().name == "step-000000009"
    assert result.best == out / "best"
    assert list((out / "tensorboard").iterdir())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line["step"] for line in lines if "val/mean_r1" in line] == [3, 6, 9]
    assert {"epoch", "samples", "lr", "logit_scale", "samples_per_second"} <= set(lines[0])
    assert "step 9/9" in printed
    assert "samples/s" in printed
    assert "ETA" in printed
    assert load_config(out / "config.toml").data.batch_size == 8
    description = checkpoint.verify(out / "best")
    assert description["training"]["val/mean_r1"] >= result.metrics["val/mean_r1"]
    assert description["objective"] == ["contrastive"]
    assert description["data_fingerprint"] == ShardSet.open(data / "train").manifest.fingerprint


def test_the_loss_falls(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, *EASY, "train.steps=21"))
    seen = losses(out)
    assert seen[21] < 0.8 * seen[1]


def test_the_best_checkpoint_is_the_one_with_the_best_metric(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, "train.steps=15"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val/mean_r1"] for line in lines if "val/mean_r1" in line}
    top = max(scores.values())
    first = min(step for step, score in scores.items() if score == top)
    assert (out / "best").resolve().name == f"step-{first:09d}"
    described = checkpoint.read_description((out / "best").resolve())["training"]
    assert described["val/mean_r1"] == top


def test_two_and_two_epochs_equal_four_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config(data, whole))
    stopped = config(data, parts)

    class Stop(Exception):
        pass

    real = Saver._write

    def save_then_stop(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        if len(list((parts / "checkpoints").iterdir())) == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_write", save_then_stop)
        with pytest.raises(Stop):
            run(stopped)
    with (parts / "metrics.jsonl").open("a") as file:  # what a killed process may leave
        file.write('{"step": 8, "loss": 123.0}\n{"step": 9, "lo')
    run(stopped)
    assert losses(parts) == losses(whole)
    one, other = weights(whole / "latest"), weights(parts / "latest")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_not_run_again(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "run")
    run(settings)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    result, _ = run(settings)
    assert result.step == 9
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_directory_with_a_run_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path / "run")
    run(settings, resume="no")
    with pytest.raises(ConfigError, match="already holds a run"):
        run(settings, resume="no")
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        run(settings, resume=str(tmp_path))


def test_changed_shards_are_not_resumed_on(data: Path, tmp_path: Path, captioned: Any) -> None:
    run(config(data, tmp_path / "run"))
    pack(captioned(24, "c"), tmp_path / "other")
    changed = config(data, tmp_path / "run", f"data.train={tmp_path / 'other'}")
    # Same pictures in one shard instead of three: another manifest.
    with pytest.raises(CheckpointError, match="training shards or their weights changed"):
        run(changed)


def test_another_architecture_is_not_resumed_on(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="another architecture"):
        run(config(data, tmp_path / "run", "model.architecture.text_cfg.layers=2"))


def test_old_checkpoints_go_but_the_linked_stay(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, "train.steps=12", "train.keep_checkpoints=1"))
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {(out / "latest").resolve().name, (out / "best").resolve().name}
    for link in ("latest", "best"):
        checkpoint.verify(out / link)


def test_checkpoints_between_epochs(data: Path, tmp_path: Path) -> None:
    more = ("train.steps=4", "train.checkpoint_every_steps=2", "train.keep_checkpoints=9")
    run(config(data, tmp_path / "run", *more))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000002", "step-000000003", "step-000000004"]


def test_validation_equals_the_served_models_retrieval(data: Path, tmp_path: Path) -> None:
    result, _ = run(config(data, tmp_path / "run", "train.steps=3"))
    served = clipserve.load(tmp_path / "run" / "latest")
    scores = evaluate_retrieval(served, ShardSet.open(data / "val"), prefix="val/")
    assert scores == result.metrics


def test_training_continues_from_pretrained_weights(
    data: Path, tmp_path: Path, architecture: Any
) -> None:
    run(config(data, tmp_path / "first", "train.steps=3"))
    start = weights(tmp_path / "first" / "latest")
    pretrained = f"model.pretrained={tmp_path / 'first' / 'latest'}"
    run(config(data, tmp_path / "second", "train.steps=1", "optim.lr=1e-30", pretrained))
    for name, value in weights(tmp_path / "second" / "latest").items():
        assert torch.allclose(value, start[name], atol=1e-6)
    with pytest.raises(ConfigError, match=r"it is a training run: name .*first/latest"):
        run(config(data, tmp_path / "other", f"model.pretrained={tmp_path / 'first'}"))
    with pytest.raises(ConfigError, match=r"nowhere.*not a clipserve model directory"):
        run(config(data, tmp_path / "third", "model.pretrained=nowhere"))
    other = (pretrained, "model.architecture.embed_dim=32")
    with pytest.raises(ConfigError, match="not that of model.pretrained"):
        run(config(data, tmp_path / "third", *other))
    bare = [f"out={tmp_path / 'fourth'}", f"data.train={data / 'train'}", "train.steps=1"]
    rest = [s for s in SMALL if not s.startswith("model.")]
    run(load_config(None, [*bare, *rest, pretrained]))
    assert weights(tmp_path / "fourth" / "latest").keys() == start.keys()


def test_what_would_fail_after_an_epoch_is_refused_before_the_first(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"val/r1.*val/mean_r1"):
        run(config(data, tmp_path / "run", "train.best_metric=val/r1"))
    (tmp_path / "none").mkdir()
    write_manifest(tmp_path / "none", *scan(tmp_path / "none", []))
    with pytest.raises(DataError, match="holds no samples"):
        run(config(data, tmp_path / "run", f"data.val={tmp_path / 'none'}"))
    assert not (tmp_path / "run").exists()


def test_another_order_of_samples_is_not_resumed_on(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "run"))
    for change in ("data.batch_size=4", "train.seed=1"):
        with pytest.raises(CheckpointError, match="changed since step-000000009 was written"):
            run(config(data, tmp_path / "run", change, "train.epochs=9"))


def test_two_processes_do_not_train_into_one_directory(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training"):
            run(config(data, tmp_path / "run"))


def test_going_back_leaves_the_other_course_aside(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    every = ("train.keep_checkpoints=9", "optim.schedule=constant")
    run(config(data, out, *every))  # steps 3, 6 and 9
    start = str(out / "checkpoints" / "step-000000003")
    run(config(data, out, *every, "train.steps=5"), resume=start)
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {
        "step-000000003",
        "step-000000005",
        "left-step-000000006",
        "left-step-000000009",
    }
    assert (out / "latest").resolve().name == "step-000000005"
    assert (out / "best").resolve().name in ("step-000000003", "step-000000005")
    assert list(losses(out)) == [1, 2, 3, 4, 5]
    run(config(data, out, *every))  # a continuation follows the new course
    assert list(losses(out)) == list(range(1, 10))
    run(config(data, tmp_path / "other", *every))
    with pytest.raises(ConfigError, match="holds a run of its own"):
        run(config(data, tmp_path / "other", *every, "train.epochs=4"), resume=start)


def test_a_refused_start_changes_nothing(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(config(data, out, "train.steps=2"))
    before = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    with pytest.raises(CheckpointError, match="batch_size changed"):
        run(config(data, out, "data.batch_size=4"))
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config(data, out, "train.seed=7"), resume="no")
    assert {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()} == before


def test_settings_that_mean_nothing_here_are_named(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config(data, tmp_path / "run", "train.steps=1", "data.image_column=x"))
    assert "data.image_column is not used" in caplog.text
    with pytest.raises(TooManyBadSamples, match=r"none of the 8 samples of step 1 .*any of colr"):
        run(config(data, tmp_path / "b", "train.steps=1", "data.caption_fields={colr=1}"))


def test_minutes_ask_for_checkpoints_too(data: Path, tmp_path: Path) -> None:
    more = ("train.steps=5", "train.checkpoint_every_minutes=1e-9", "train.keep_checkpoints=9")
    run(config(data, tmp_path / "run", *more))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:09d}" for step in range(1, 6)]


def test_a_table_is_trained_on_as_it_is(captioned: Any, tmp_path: Path) -> None:
    table = captioned(40)
    table.write_text(table.read_text() + "missing.png,a picture that is not there,red\n")
    settings = [
        f"out={tmp_path / 'run'}",
        f"data.train={table}",
        "data.val_fraction=0.3",
        "data.caption_template={colour} thing: {caption}",
        "train.steps=2",
        *SMALL,
    ]
    result, _ = run(load_config(None, settings))
    assert "val/mean_r1" in result.metrics
    packed = tmp_path / "run" / "shards" / "train-0"
    sets = [ShardSet.open(packed / name) for name in ("train", "val")]
    assert sum(map(len, sets)) == 40
    assert sets[0].read(0).captions[0].split(" thing: picture number ")[0] in ("red", "blue")
    before = sorted((file.name, file.stat().st_mtime_ns) for file in packed.rglob("*.tar"))
    run(load_config(None, [*settings, "train.steps=3"]))
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in packed.rglob("*.tar"))
    table.write_text(table.read_text().replace("number 3,", "number three,"))
    with pytest.raises(DataError, match=r"changed since .* was packed"):
        run(load_config(None, [*settings, "train.steps=4"]))


def test_shards_and_weights_are_listed(data: Path, tmp_path: Path) -> None:
    sets = f'data.train=[{{path="{data / "train"}"}}, {{path="{data / "val"}", weight=2}}]'
    run(config(data, tmp_path / "run", sets, "train.epochs=1", "data.last_batch=keep"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-2])["samples"] == 24 + 2 * 10
    with pytest.raises(CheckpointError, match="or their weights changed"):
        run(config(data, tmp_path / "run", sets.replace("weight=2", "weight=3"), "train.epochs=2"))


def test_truncated_captions_are_counted(data: Path, tmp_path: Path) -> None:
    short = "model.architecture.text_cfg.context_length=4"
    run(config(data, tmp_path / "run", "train.steps=1", short))
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:1]
    assert json.loads(line)["truncated_fraction"] == 1.0


def test_bf16_training_stays_near_fp32(data: Path, tmp_path: Path) -> None:
    still = "model.architecture.vision_cfg.patch_dropout=0"
    run(config(data, tmp_path / "a", "train.steps=6", still))
    run(config(data, tmp_path / "b", "train.steps=6", still, "train.precision=bf16"))
    full, half = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert full != half
    assert all(abs(full[step] - half[step]) < 0.05 for step in full)


def test_gradient_clipping_bounds_the_first_step(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "a", "train.steps=2", "optim.grad_clip=1e-8", "optim.eps=1e-3"))
    run(config(data, tmp_path / "b", "train.steps=2", "optim.eps=1e-3"))
    assert losses(tmp_path / "a")[1] == losses(tmp_path / "b")[1]
    assert losses(tmp_path / "a")[2] != losses(tmp_path / "b")[2]


@pytest.mark.slow
def test_compiled_towers_learn_the_same(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "a", "train.steps=3"))
    run(config(data, tmp_path / "b", "train.steps=3", "train.compile=on"))
    eager, compiled = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(abs(eager[step] - compiled[step]) < 1e-3 for step in eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_gpu_trains_as_the_cpu_does(data: Path, tmp_path: Path) -> None:
    run(config(data, tmp_path / "a", "train.steps=4", "train.device=cpu"))
    run(config(data, tmp_path / "b", "train.steps=4", "train.device=cuda"))
    cpu, gpu = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(abs(cpu[step] - gpu[step]) < 1e-3 for step in cpu)


def test_a_field_that_no_sample_has_is_refused_with_those_there_are(
    data: Path, tmp_path: Path
) -> None:
    labels = 'objectives=[{name="contrastive", positives=["label"]}]'
    with pytest.raises(DataError, match="color.*they have .*colour"):
        train(config(data, tmp_path / "run", labels, "data.label_field=color"))
    run(config(data, tmp_path / "run", labels, "data.label_field=colour", "train.steps=1"))


def test_a_field_that_no_objective_asks_for_is_told(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config(data, tmp_path / "run", "data.label_field=colour", "train.steps=1"))
    assert "data.label_field is not used" in caplog.text
    assert "data.picture_field" not in caplog.text


@pytest.mark.parametrize("setting", ["train.rerank=4", "train.rerank_score=matching+cosine"])
def test_reranking_is_refused_before_anything_is_trained(
    setting: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="train.rerank"):
        train(config(data, tmp_path / "run", setting))
