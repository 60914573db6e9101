"""`clipserve train --processes`: what it says, how it ends, when it begins again."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import EASY, SMALL, losses

from clipserve.errors import ConfigError, TooManyBadSamples, TooManySkippedSteps
from training import launch
from training.launch import ProcessFailed
from training.shards import PackOptions, pack

GONE = "clipserve: another process of this run is gone; its own message says why"


def failures(**codes: int) -> dict[int, Any]:
    return {int(rank[1:]): SimpleNamespace(exitcode=code) for rank, code in codes.items()}


@pytest.mark.parametrize(
    ("codes", "said", "words", "code"),
    [
        ({"r1": -9}, {1: ""}, "process 1 of this run was killed by SIGKILL", 1),
        ({"r0": 1, "r2": -11}, {1: GONE}, "process 2 of this run was killed by SIGSEGV", 1),
        ({"r0": 1, "r1": 2}, {1: "clipserve: no such shard"}, "process 1 .* ended: no such", 2),
        ({"r1": 1, "r2": 1}, {1: GONE, 2: "ValueError: odd"}, "process 2 .* ended: ValueError", 1),
        ({"r0": 2}, {}, "process 0 of this run ended: its own message says why", 2),
        # What torch's launcher ended itself, at once, in order, or after 30 seconds:
        ({"r0": 2, "r1": -15}, {}, "process 0 of this run ended: its own message says why", 2),
        ({"r0": -15, "r1": 2}, {1: "clipserve: no such shard"}, "process 1 .* ended: no such", 2),
        ({"r1": -9, "r0": 143}, {}, "process 1 of this run was killed by SIGKILL", 1),
        ({"r1": 2, "r0": -9}, {1: "clipserve: no such shard"}, "process 1 .* ended: no such", 2),
        ({"r1": -15}, {}, "process 1 of this run was killed by SIGTERM", 1),
    ],
)
def test_the_process_that_failed_first_is_named(
    codes: dict[str, int], said: dict[int, str], words: str, code: int
) -> None:
    error = launch._explain(failures(**codes), said)
    assert error.exit_code == code
    with pytest.raises(ProcessFailed, match=words):
        raise error


@pytest.mark.parametrize(
    ("codes", "tries", "ends"),
    [
        ([1, 1, 0], 3, 0),
        ([1, 1, 1, 1], 3, 1),
        ([2], 1, 2),
        ([TooManySkippedSteps.exit_code], 1, 3),
        ([TooManyBadSamples.exit_code], 1, 3),
        ([143], 1, 143),
        ([0], 1, 0),
    ],
)
def test_what_would_come_again_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], tries: int, ends: int
) -> None:
    seen = []

    def run(arguments: list[str], processes: int) -> int:
        seen.append(arguments)
        code = codes[len(seen) - 1]
        if code:
            raise ProcessFailed("a process ended", code)
        return 0

    monkeypatch.setattr(launch, "_run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        code = launch.launch(["out=a"], "no", processes=2, max_restarts=2)
    except ProcessFailed as error:
        code = error.exit_code
    assert (len(seen), code) == (tries, ends)
    assert seen[0] == ["out=a", "--resume", "no"]
    assert all(again == ["out=a", "--resume", "auto"] for again in seen[1:])


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--processes 3 needs as many GPUs, and there are 2"):
        launch.launch([], "auto", processes=3, max_restarts=0)


def test_under_torchrun_no_other_launcher_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--processes and --max-restarts .* leave them out"):
        launch.launch([], "auto", processes=2, max_restarts=0)


def test_a_process_that_does_not_listen_yet_is_not_asked_for_a_checkpoint() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:  # which SIGUSR1 would end
        launch._pass_on(signal.SIGUSR1, None)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_listens_is_asked_for_a_checkpoint() -> None:
    script = "trap 'echo asked; exit' USR1; echo ready; while :; do read -t 1 < /dev/zero; done"
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        launch._pass_on(signal.SIGUSR1, None)
        assert process.stdout.readline() == "asked\n"


def test_a_stopped_run_has_minutes_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def elastic_launch(config: Any, program: str) -> Any:
        seen.append(config.shutdown_timeout)
        return lambda *arguments: None

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert launch.launch([], "auto", processes=2, max_restarts=0) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [600]


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> Path:
    pack(captioned(33), tmp_path / "shards", PackOptions(samples_per_shard=5))
    return tmp_path / "shards"


def start(shards: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    given = [f"out={out}", f"data.train={shards}", *SMALL, *EASY, "train.device=cpu", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "clipserve", "train", *given],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_lost_process_is_named_and_the_run_goes_on_from_its_checkpoint(
    shards: Path, tmp_path: Path
) -> None:
    steps = ["train.steps=40", "train.checkpoint_every_steps=3"]
    launched = start(shards, tmp_path / "run", *steps, "--processes=2", "--max-restarts=1")
    assert launched.stdout is not None
    while "step 5/40" not in launched.stdout.readline():
        assert launched.poll() is None
    kill_rank(launched.pid, 1)
    said, errors = launched.communicate(timeout=600)
    assert launched.returncode == 0, errors
    assert "process 1 of this run was killed by SIGKILL; restart 1 of 1" in errors
    assert said.count("trained 40 steps") == 1  # by process 0 alone
    whole = start(shards, tmp_path / "whole", *steps, "--processes=2")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def kill_rank(launcher: int, rank: int) -> None:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
def test_a_users_mistake_of_the_processes_keeps_its_exit_code(tmp_path: Path) -> None:
    launched = start(tmp_path / "nothing", tmp_path / "run", "train.steps=2", "--processes=2")
    _, errors = launched.communicate(timeout=300)
    assert launched.returncode == 2, errors
    assert "Traceback" not in errors
