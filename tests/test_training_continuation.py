"""Killed runs, resumed runs, runs of several processes: all see what one uninterrupted run sees."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL

from clipserve.checkpoint import verify
from clipserve.config import load_config
from clipserve.errors import ClipserveError
from clipserve.shards import ShardSet
from training.loop import train
from training.shards import PackOptions, pack

STEPS = 17
SCRIPT = Path(__file__).with_name("traced.py")
Steps = dict[int, dict[str, Any]]


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> Path:
    """Seven shards of five samples, the last of three."""
    pack(captioned(33), tmp_path / "shards", PackOptions(samples_per_shard=5))
    return tmp_path / "shards"


def command(shards: Path | str, out: Path, signals: str, more: Sequence[str]) -> list[str]:
    settings = [f"out={out}", f"data.train={shards}", f"train.steps={STEPS}", *SMALL, *more]
    return [sys.executable, str(SCRIPT), str(out) + ".trace", signals, *settings]


def start(
    shards: Path | str,
    out: Path,
    signals: str = "",
    more: Sequence[str] = (),
    rank: int = 0,
    **env: str,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(shards, out, signals, more),
        cwd=SCRIPT.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "RANK": str(rank), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0, within_s: float = 300) -> str:
    _, errors = process.communicate(timeout=within_s)
    assert process.returncode == code, errors
    return errors


def run(*args: Any, code: int = 0, **kwargs: Any) -> str:
    return finish(start(*args, **kwargs), code)


def start_ranks(
    shards: Path,
    out: Path,
    signals: Sequence[str],
    more: Sequence[str] = (),
    outs: Sequence[Path | None] = (),
) -> list[subprocess.Popen[str]]:
    """One process for each of `signals`, each into `out` or its own of `outs`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"WORLD_SIZE": str(len(signals)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(shards, (outs and outs[rank]) or out, wanted, more, rank, **env)
        for rank, wanted in enumerate(signals)
    ]


def run_ranks(shards: Path, out: Path, size: int, more: Sequence[str] = ()) -> None:
    for process in start_ranks(shards, out, [""] * size, more):
        finish(process)


def read_trace(out: Path, ranks: int = 1) -> Steps:
    """Step -> keys, pixels and loss of the global batch; a step done twice must be done equally."""
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    for text in Path(f"{out}.trace").read_text().splitlines():
        line = json.loads(text)
        place = (line["step"], line.pop("rank"))
        assert seen.setdefault(place, line) == line
    steps: Steps = {}
    for step, rank in sorted(seen):
        line = seen[step, rank]
        whole = steps.setdefault(step, {"keys": [], "pixels": [], "loss": line["loss"]})
        assert whole["loss"] == line["loss"]  # every rank has the global one
        whole["keys"] += line["keys"]
        whole["pixels"] += line["pixels"]
    assert len(seen) == ranks * len(steps)
    return steps


def logged_losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


# Random layers and workers: what is hardest to continue.
HARD = [
    "data.workers=2",
    "data.last_batch=keep",
    "data.crop_scale=[0.5,1]",
    "model.architecture.vision_cfg.patch_dropout=0.5",
]


def test_three_kills_change_no_sample_no_pixel_and_no_loss(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "whole", more=HARD)
    at = sorted(random.Random(os.urandom(8)).sample(range(3, STEPS), 3))
    every = [*HARD, "train.checkpoint_every_steps=2"]
    kills = ",".join(f"SIGKILL:{step}" for step in at)
    for _ in at:
        run(shards, tmp_path / "killed", kills, every, code=-signal.SIGKILL)
    run(shards, tmp_path / "killed", kills, every)
    assert read_trace(tmp_path / "killed") == read_trace(tmp_path / "whole"), f"killed at {at}"
    assert logged_losses(tmp_path / "killed") == logged_losses(tmp_path / "whole")
    assert len(read_trace(tmp_path / "whole")) == STEPS


# All that remembers: a momentum copy, a queue that no batch size divides, and every random layer.
ALBEF = [
    "model.preset=albef_tiny",
    "model.architecture.text_cfg.vocab_size=200",
    "model.architecture.text_cfg.dropout=0.1",
    "model.architecture.vision_cfg.patch_dropout=0.5",
    "model.architecture.fusion_cfg.layers=1",
    "objectives=[{name='momentum_contrast', queue_size=13, momentum=0.9}, {name='matching'},"
    " {name='masked_language'}]",
    "data.last_batch=keep",
]


@pytest.mark.slow
def test_a_killed_albef_goes_on_with_its_momentum_copy_and_its_queue(
    shards: Path, tmp_path: Path
) -> None:
    run(shards, tmp_path / "whole", more=ALBEF)
    at = random.Random(os.urandom(8)).randrange(4, STEPS)
    every = [*ALBEF, "train.checkpoint_every_steps=3"]
    run(shards, tmp_path / "killed", f"SIGKILL:{at}", every, code=-signal.SIGKILL)
    run(shards, tmp_path / "killed", f"SIGKILL:{at}", every)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert read_trace(killed) == read_trace(whole), f"killed at {at}"
    assert logged_terms(killed) == logged_terms(whole)
    names = ["towers.safetensors", "fusion.safetensors"]
    names += [f"state/{name}.safetensors" for name in ("momentum", "queue", "optimizer")]
    for name in names:
        one, other = (load_file(out / "latest" / name) for out in (whole, killed))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), (name, at)
    # 17 steps of 8, 8, 8, 8 and 1 samples
    assert load_file(killed / "latest/state/queue.safetensors")["_extra_state"] == 3 * 33 + 16


def logged_terms(out: Path) -> list[dict[str, float]]:
    """Every loss and report of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    terms = [{name: value for name, value in line.items() if "/" in name} for line in lines]
    assert {"loss/momentum_contrast", "matching/accuracy"} < terms[0].keys()
    return terms


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        (
            "{name='contrastive'}",
            "{name='contrastive'}, {name='momentum_contrast', queue_size=13}",
            r"step-000000002 lacks momentum\.safetensors, queue\.safetensors, which this run's",
        ),
        (
            "{name='momentum_contrast', queue_size=13}",
            "{name='momentum_contrast', queue_size=12}",
            r"the saved queue has stored_image of \(13, 16\), this run's has \(12, 16\)",
        ),
    ],
)
def test_a_run_that_wants_to_remember_something_else_is_refused(
    shards: Path, tmp_path: Path, before: str, now: str, reason: str
) -> None:
    given = [f"out={tmp_path / 'run'}", f"data.train={shards}", *SMALL]
    train(load_config(None, [*given, "train.steps=2", f"objectives=[{before}]"]))
    with pytest.raises(ClipserveError, match=reason) as caught:
        train(load_config(None, [*given, "train.steps=3", f"objectives=[{now}]"]))
    assert "\n" not in str(caught.value)
    assert "start anew in another `out`" in str(caught.value)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_stop_signal_leaves_a_checkpoint_of_that_very_step(
    shards: Path, tmp_path: Path, name: str
) -> None:
    number = signal.Signals[name]
    out = tmp_path / "stopped"
    errors = run(shards, out, f"{name}:6", HARD, code=128 + number)
    assert f"stopped by {name} after step 6, which is saved" in errors
    assert (out / "latest").resolve().name == "step-000000006"
    verify(out / "latest")
    run(shards, out, f"{name}:6", HARD)
    run(shards, tmp_path / "whole", more=HARD)
    assert read_trace(out) == read_trace(tmp_path / "whole")


def test_sigusr1_saves_and_goes_on(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", "SIGUSR1:3", ["train.keep_checkpoints=99"])
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "step-000000003" in names
    assert f"step-{STEPS:09d}" in names


def test_workers_and_ranks_see_the_same_global_batches(shards: Path, tmp_path: Path) -> None:
    more = ["data.last_batch=keep", "data.crop_scale=[0.5,1]", still()]
    run(shards, tmp_path / "alone", more=[*more, "data.workers=0"])
    alone = read_trace(tmp_path / "alone")
    for workers in (1, 2, 4):
        out = tmp_path / f"workers-{workers}"
        run(shards, out, more=[*more, f"data.workers={workers}"])
        assert read_trace(out) == alone
    run_ranks(shards, tmp_path / "two", 2, [*more, "data.workers=4"])
    two = read_trace(tmp_path / "two", ranks=2)
    check_same_but_for_rounding(two, alone)
    # 7 shards, 4 workers, 2 ranks: an epoch is exactly one pass.
    keys = ["/".join(ShardSet.open(shards).key(i)) for i in range(33)]
    assert sorted(key for step in range(1, 6) for key in two[step]["keys"]) == sorted(keys)


def test_a_run_begun_on_two_ranks_goes_on_on_one(shards: Path, tmp_path: Path) -> None:
    more = ["data.last_batch=keep", still(), "data.workers=1", "optim.schedule=constant"]
    run(shards, tmp_path / "alone", more=more)
    run_ranks(shards, tmp_path / "elastic", 2, [*more, "train.steps=7"])  # in the second epoch
    first = read_trace(tmp_path / "elastic", ranks=2)
    assert sorted(first) == list(range(1, 8))
    Path(f"{tmp_path / 'elastic'}.trace").unlink()
    run(shards, tmp_path / "elastic", more=more)
    rest = read_trace(tmp_path / "elastic")
    assert sorted(rest) == list(range(8, STEPS + 1))
    alone = read_trace(tmp_path / "alone")
    check_same_but_for_rounding(first | rest, alone)
    second_epoch = [key for step in range(6, 11) for key in (first | rest)[step]["keys"]]
    assert len(second_epoch) == len(set(second_epoch)) == 33


def test_a_signal_to_one_rank_stops_and_saves_all(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = start_ranks(shards, out, ["", "SIGTERM:4"])
    for process in ranks:
        assert "stopped by SIGTERM after step 4" in finish(process, 128 + signal.SIGTERM)
    assert (out / "latest").resolve().name == "step-000000004"


def test_a_rank_that_dies_leaves_the_others_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = start_ranks(shards, out, ["", "SIGKILL:4"])
    finish(second, -signal.SIGKILL)
    errors = finish(first, 1, within_s=30)
    assert "another process of this run is gone" in errors
    assert "Traceback" not in errors
    assert (out / "latest").resolve().name == "step-000000003"


@pytest.mark.parametrize("full", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_whose_memory_is_full_ends_all_with_a_checkpoint(
    shards: Path, tmp_path: Path, full: int
) -> None:
    out = tmp_path / "run"
    ranks = start_ranks(shards, out, ["FULL:4" if rank == full else "" for rank in range(2)])
    assert "CUDA out of memory" in finish(ranks[full], 1)
    assert "another process of this run is gone" in finish(ranks[1 - full], 1, within_s=30)
    assert (out / "latest").resolve().name == "step-000000003"


@pytest.mark.slow
def test_ranks_that_find_different_checkpoints_are_stopped(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "a", more=["train.steps=2"])
    first, second = start_ranks(shards, tmp_path / "a", ["", ""], outs=[None, tmp_path / "b"])
    for process in (first, second):
        assert "do not find the same checkpoint" in finish(process, 2)


@pytest.mark.slow
def test_ranks_without_a_common_disk_are_stopped_before_they_begin(
    shards: Path, tmp_path: Path
) -> None:
    for process in start_ranks(shards, tmp_path, ["", ""], outs=[tmp_path / "a", tmp_path / "b"]):
        assert "do not find the same config.toml" in finish(process, 2)


@pytest.mark.slow
def test_three_ranks_share_a_table(captioned: Any, tmp_path: Path) -> None:
    for process in start_ranks(captioned(30, "table"), tmp_path / "run", ["", "", ""]):
        finish(process)
    assert len(read_trace(tmp_path / "run", ranks=3)) == STEPS


def still() -> str:
    """Without random layers, whose draws belong to a rank."""
    return "model.architecture.vision_cfg.patch_dropout=0"


def check_same_but_for_rounding(one: Steps, other: Steps) -> None:
    assert sorted(one) == sorted(other)
    for step, seen in one.items():
        assert seen["keys"] == other[step]["keys"]
        assert seen["pixels"] == other[step]["pixels"]
        loss, expected = float.fromhex(seen["loss"]), float.fromhex(other[step]["loss"])
        assert loss == pytest.approx(expected, rel=1e-4), step
