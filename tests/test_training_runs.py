import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clipserve.errors import CheckpointError, ConfigError
from training.runs import LOCK, RunSummary, list_runs, noting, read_metrics, summarise


def make_run(folder: Path, metric: str = "val/mean_r1") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[train]\nbest_metric = "{metric}"\n')
    lines: list[dict[str, Any]] = [
        {"step": 10, "loss": 2.0, "samples_per_second": 50.0, "skipped_steps": 0},
        {"step": 10, "val/mean_r1": 0.5},
        {"step": 20, "loss": 1.0, "samples_per_second": 70.0, "skipped_steps": 3},
        {"step": 20, "val/mean_r1": 0.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 30, "lo')  # just being written
    return folder


def test_a_run_is_summed_up_from_its_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with noting(folder, 20):
        pass
    assert summarise(folder) == RunSummary(
        path=str(folder),
        state="finished",
        step=20,
        total_steps=20,
        loss=1.0,
        metric="val/mean_r1",
        best=0.5,
        best_step=10,
        samples_per_second=70.0,
        skipped_steps=3,
        reason=None,
    )


def test_a_run_that_fails_says_why_it_stopped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="because"), noting(folder, 30):
        raise ValueError("because")
    found = summarise(folder)
    assert (found.state, found.reason) == ("stopped", "because")


def test_the_error_that_ended_a_run_is_told_though_nothing_more_can_be_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run(tmp_path / "run")

    def fail() -> None:
        shutil.rmtree(folder)
        raise CheckpointError("step 3 is whole")

    with pytest.raises(CheckpointError, match="step 3 is whole"), noting(folder, 30):
        fail()
    assert "run.json cannot be written: No such file" in caplog.text


def test_a_killed_run_is_told_from_a_running_one_by_its_lock(tmp_path: Path) -> None:
    import fcntl

    folder = make_run(tmp_path / "run")
    (folder / "run.json").write_text('{"state": "running", "total_steps": 30, "reason": null}')
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert summarise(folder).state == "running"
    assert (summarise(folder).state, summarise(folder).reason) == ("stopped", "killed")


def test_a_run_without_validation_or_note_is_listed_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", metric="val/other")
    found = summarise(folder)
    assert (found.best, found.best_step, found.total_steps) == (None, None, None)
    assert found.state == "stopped"


def test_runs_are_found_below_folders_and_each_once(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "runs" / "sweep" / "b")
    make_run(one / "checkpoints" / "inner")  # a part of the run is no run of its own
    assert [run.path for run in list_runs([tmp_path / "runs", other])] == [str(one), str(other)]


def test_a_folder_without_runs_is_an_error_that_says_what_a_run_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run in .*metrics\.jsonl"):
        list_runs([tmp_path])
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        list_runs([tmp_path / "nowhere"])


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    assert len(read_metrics(make_run(tmp_path / "run"))) == 4
    assert read_metrics(tmp_path) == []
