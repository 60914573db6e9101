"""Going back, what is kept aside, and what several processes must see alike."""

import io
import json
from pathlib import Path
from typing import Any

import forked
import pytest
from rich.console import Console
from small_runs import SMALL

from clipserve.config import load_config
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import link_atomic
from training.distributed import World
from training.loop import train
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack

# Nothing is learnt, so that no validation is better than the one before.
STILL = [*SMALL, "optim.lr=1e-30", "optim.schedule=constant", "train.keep_checkpoints=9"]


@pytest.fixture
def given(captioned: Any, tmp_path: Path) -> list[str]:
    """Settings without `out`; an epoch is three steps."""
    pack(captioned(24, "a"), tmp_path / "train", PackOptions(samples_per_shard=10))
    pack(captioned(10, "b"), tmp_path / "val")
    return [f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}", *STILL]


def run(given: list[str], out: Path, *more: str, resume: str = "auto") -> None:
    train(load_config(None, [f"out={out}", *given, *more]), resume, Console(file=io.StringIO()))


@pytest.fixture
def begun(given: list[str], tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 6, and the latter is said to be the best."""
    run(given, tmp_path / "run", "train.steps=6")
    link_atomic(tmp_path / "run" / "best", "checkpoints/step-000000006")
    return tmp_path / "run"


def test_what_is_no_place_for_a_run_is_refused_and_left_alone(
    given: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for out, words in (("file", "file is no folder"), ("val", "val holds shards; name a folder")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=words):
            run(given, tmp_path / out, "train.steps=1")
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match=r"/dev/null is no folder"):
        run(given, Path("/dev/null"), "train.steps=1")


def best(out: Path) -> tuple[str, float | None]:
    """What is linked, and what the newest checkpoint holds for the best value."""
    state = json.loads((out / "latest" / "state" / "state.json").read_text())
    return (out / "best").resolve().name, state["counters"]["best"]


@pytest.mark.parametrize("size", [1, 2])
def test_going_back_past_the_best_forgets_it_on_any_number_of_processes(
    begun: Path, given: list[str], tmp_path: Path, size: int
) -> None:
    start = begun / "checkpoints" / "step-000000003"
    arguments = [f"out={begun}", *given, "train.steps=4", "--resume", str(start)]
    for rank in forked.train(size, tmp_path / "logs", arguments):
        assert rank.code == 0, rank.said
    assert {folder.name for folder in (begun / "checkpoints").iterdir()} == {
        "step-000000003",
        "step-000000004",
        "left-step-000000006",
    }
    name, value = best(begun)
    assert (name, value is None) == ("step-000000004", False)


def test_a_run_killed_right_after_going_back_knows_of_no_best_either(
    begun: Path, given: list[str]
) -> None:
    RunDirectory(begun, 9).go_back_to(begun / "checkpoints" / "step-000000003", 3)
    run(given, begun, "train.steps=4")
    assert best(begun)[0] == "step-000000004"


def test_every_course_that_was_left_is_kept(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, 9)
    start, later = (directory.folder_of(step) for step in (3, 6))
    start.mkdir(parents=True)
    for course in ("first", "second", "third"):
        later.mkdir()
        (later / "course").write_text(course)
        link_atomic(tmp_path / "latest", f"checkpoints/{later.name}")
        directory.go_back_to(start, 3)
    kept = {file.parent.name: file.read_text() for file in tmp_path.glob("checkpoints/*/course")}
    assert kept == {
        "left-step-000000006": "first",
        "left-step-000000006-2": "second",
        "left-step-000000006-3": "third",
    }


def test_a_run_begun_from_anothers_checkpoint_has_a_best_of_its_own(
    begun: Path, given: list[str], tmp_path: Path
) -> None:
    run(given, tmp_path / "other", "train.steps=9", resume=str(begun / "latest"))
    assert best(tmp_path / "other")[0] == "step-000000009"


def test_a_checkpoint_whose_replacement_was_killed_is_there_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, 9)
    replaced = directory.folder_of(3).with_name(".step-000000003.ab_12.old") / "replaced"
    replaced.mkdir(parents=True)
    (replaced.parent.with_name(".step-000000003.cd.tmp") / "step-000000003").mkdir(parents=True)
    link_atomic(tmp_path / "latest", "checkpoints/step-000000003")
    with directory.lock():
        assert directory.find_start("auto") == directory.folder_of(3)
    assert list((tmp_path / "checkpoints").iterdir()) == [directory.folder_of(3)]


def check_ranks(world: World, folder: Path) -> None:
    shared, own = (RunDirectory(folder / name, 1) for name in ("shared", str(world.rank)))
    assert shared.find_latest(world) == shared.path / "checkpoints" / "step-000000001"
    with pytest.raises(CheckpointError, match="not find the same checkpoint step-000000001 in"):
        own.find_latest(world)
    assert RunDirectory(folder / "none", 1).find_latest(world) is None


def test_the_checkpoint_to_roll_back_to_is_the_same_on_all_processes_or_none(
    tmp_path: Path,
) -> None:
    for name in ("shared", "0", "1"):
        state = tmp_path / name / "checkpoints" / "step-000000001" / "state"
        state.mkdir(parents=True)
        (state / "state.json").write_text(f"of {name}")
        link_atomic(tmp_path / name / "latest", "checkpoints/step-000000001")
    forked.call(2, check_ranks, tmp_path)
