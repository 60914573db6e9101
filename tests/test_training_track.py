"""What becomes of a run whose numbers cannot be written."""

import io
from pathlib import Path
from typing import Any, TextIO

import pytest
from rich.console import Console

from clipserve.errors import CheckpointError
from clipserve.files import link_atomic
from clipserve.shards import BadSample
from training.run_directory import RunDirectory
from training.track import Tracker


class Ear:
    """A sink that hears the end."""

    def __init__(self) -> None:
        self.ends: list[bool] = []

    def log(self, step: int, values: Any) -> None:
        pass

    def close(self, is_finished: bool) -> None:
        self.ends.append(is_finished)


def make_tracker(out: Path, *sinks: Ear) -> Tracker:
    (out / "checkpoints" / "step-000000003").mkdir(parents=True)
    link_atomic(out / "latest", "checkpoints/step-000000003")
    return Tracker(RunDirectory(out, 1), 3, 9, Console(file=io.StringIO()), sinks)


def full_disk(buffering: int = 1) -> TextIO:
    return Path("/dev/full").open("a", buffering)


WHOLE = r"cannot be written into: No space left on device; .*step-000000003 is whole"


def test_a_full_disk_that_a_number_finds_first_names_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ear = Ear()
    tracker = make_tracker(tmp_path, ear)
    tracker._metrics.close()
    tracker._metrics = full_disk()
    with pytest.raises(CheckpointError, match=WHOLE), tracker:
        tracker.log(4, {"loss": 1.0})
    assert "No space left" in caplog.text  # at the end again, where it is only logged
    assert ear.ends == [False]


def test_a_full_disk_that_a_bad_sample_finds_first_names_the_checkpoint(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker._bad.close()
    tracker._bad = full_disk()
    with pytest.raises(CheckpointError, match=WHOLE), tracker:
        tracker.bad_sample(4, BadSample("a", "b", "c", "d"))


def test_at_the_end_of_a_sound_run_a_full_disk_is_an_error(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker._bad.close()
    tracker._bad = full_disk(buffering=-1)
    with pytest.raises(CheckpointError, match=WHOLE), tracker:
        tracker._bad.write("x")


@pytest.mark.parametrize("is_finished", [True, False])
def test_sinks_hear_whether_a_run_was_stopped(tmp_path: Path, is_finished: bool) -> None:
    ear = Ear()
    with make_tracker(tmp_path, ear) as tracker:
        tracker.is_finished = is_finished
    assert ear.ends == [is_finished]
