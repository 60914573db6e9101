"""Their packages are no dependencies: stand-ins here are called as the real ones are."""

import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from small_runs import SMALL

from clipserve.config import Config, load_config
from clipserve.errors import ConfigError
from training import loop, sinks
from training.loop import train
from training.sinks import check_packages, open_sinks

VALUES = {"loss": 1.5, "loss/contrastive": 1.5, "samples": 8}


def config(out: Path, *names: str) -> Config:
    out.mkdir(exist_ok=True)
    given = [f"out={out}", "data.train=nowhere", "train.steps=1"]
    return load_config(None, [*given, f"train.report_to={list(names)}"])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    module = MagicMock()
    module.init.return_value.id = "w1"
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    module = MagicMock()
    module.start_run.return_value = SimpleNamespace(info=SimpleNamespace(run_id="m1"))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_weights_and_biases_takes_the_numbers_of_a_run_that_went_back(
    tmp_path: Path, wandb: MagicMock
) -> None:
    wandb.init.return_value = run = DroppingRun()
    for steps in ((1, 2, 3), (2, 3, 4)):
        _, sink = open_sinks(config(tmp_path, "wandb"), steps[0] - 1)
        for step in steps:
            sink.log(step, VALUES)
        sink.close(True)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 2, 3, 4]


class DroppingRun:
    """As a run of wandb: rows of a `step` below the last one are dropped."""

    id = "w1"

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._last = 0

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._last = max(self._last, step or self._last + 1)
        if step is None or step == self._last:
            self.rows.append(values)

    def finish(self, exit_code: int) -> None:
        pass


def feed(out: Path, name: str, is_finished: bool) -> None:
    for sink in open_sinks(config(out, name), 0):
        sink.log(7, VALUES)
        sink.close(is_finished)


def test_tensorboard_is_always_there(tmp_path: Path) -> None:
    (sink,) = open_sinks(config(tmp_path), 0)
    sink.log(1, VALUES)
    sink.close(True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_weights_and_biases_gets_the_settings_the_numbers_and_the_end(
    tmp_path: Path, wandb: MagicMock
) -> None:
    feed(tmp_path / "my-run", "wandb", True)
    given = wandb.init.call_args.kwargs
    assert (given["name"], given["id"], given["resume"]) == ("my-run", None, None)
    assert given["config"]["train"]["steps"] == 1
    run = wandb.init.return_value
    run.log.assert_called_once_with({"step": 7, **VALUES})  # its own steps only grow
    run.define_metric.assert_called_once_with("*", step_metric="step")
    run.finish.assert_called_once_with(exit_code=0)
    feed(tmp_path / "my-run", "wandb", False)
    given = wandb.init.call_args.kwargs
    assert (given["id"], given["resume"]) == ("w1", "allow")  # goes on in the same run
    run.finish.assert_called_with(exit_code=1)


def test_mlflow_gets_the_settings_the_numbers_and_the_end(
    tmp_path: Path, mlflow: MagicMock
) -> None:
    feed(tmp_path / "my-run", "mlflow", False)
    mlflow.start_run.assert_called_once_with(run_id=None, run_name="my-run")
    numbers = {"loss": 1.5, "loss.contrastive": 1.5, "samples": 8}  # no file and folder `loss`
    mlflow.log_metrics.assert_called_once_with(numbers, step=7)
    text, name = mlflow.log_text.call_args.args
    assert (name, "steps = 1" in text) == ("config.toml", True)
    mlflow.end_run.assert_called_once_with("FAILED")
    feed(tmp_path / "my-run", "mlflow", True)
    mlflow.start_run.assert_called_with(run_id="m1", run_name=None)
    mlflow.end_run.assert_called_with("FINISHED")


def test_a_run_that_a_signal_stopped_is_not_finished(
    captioned: Any, tmp_path: Path, mlflow: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.train_step

    def step(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    given = [f"out={tmp_path / 'run'}", f"data.train={captioned(8)}", *SMALL, "train.steps=2"]
    assert train(load_config(None, [*given, "train.report_to=['mlflow']"])).step == 1
    mlflow.end_run.assert_called_once_with("FAILED")


def test_a_server_that_goes_away_is_told_once_and_ends_no_run(
    tmp_path: Path, mlflow: MagicMock, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.log_metrics.side_effect = ConnectionError("gone")
    _, sink = open_sinks(config(tmp_path, "mlflow"), 0)
    for step in range(3):
        sink.log(step, VALUES)
    sink.close(True)
    assert [r.message for r in caplog.records] == ["mlflow takes no numbers: gone"]
    mlflow.end_run.assert_called_once_with("FINISHED")


def test_a_store_that_cannot_be_opened_is_one_line_and_ends_those_before_it(
    tmp_path: Path, wandb: MagicMock, mlflow: MagicMock
) -> None:
    mlflow.start_run.side_effect = RuntimeError("no such store\ntry another")
    threads = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"mlflow cannot be opened: no such store try another"):
        open_sinks(config(tmp_path, "wandb", "mlflow"), 0)
    wandb.init.return_value.finish.assert_called_once_with(exit_code=1)
    assert set(threading.enumerate()) <= threads  # TensorBoard's writer


def test_a_run_whose_settings_are_not_taken_is_ended(tmp_path: Path, mlflow: MagicMock) -> None:
    mlflow.log_text.side_effect = RuntimeError("no place for artifacts")
    with pytest.raises(ConfigError, match="no place for artifacts"):
        open_sinks(config(tmp_path, "mlflow"), 0)
    mlflow.end_run.assert_called_once_with("FAILED")


def test_a_run_whose_id_cannot_be_kept_is_ended(
    tmp_path: Path, wandb: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = MagicMock(side_effect=OSError(28, "No space left on device"))
    close = sinks.TensorBoard.close

    def close_and_fail(board: sinks.TensorBoard, is_finished: bool) -> None:
        close(board, is_finished)
        full()

    monkeypatch.setattr(sinks, "write_atomic", full)
    monkeypatch.setattr(sinks.TensorBoard, "close", close_and_fail)
    with pytest.raises(OSError, match="No space left"):
        open_sinks(config(tmp_path, "wandb"), 0)
    wandb.init.return_value.finish.assert_called_once_with(exit_code=1)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    reason = rf'train\.report_to = {name} needs the package.*pip install "clipserve\[{name}\]"'
    with pytest.raises(ConfigError, match=reason) as caught:
        train(config(tmp_path, name))
    assert "\n" not in str(caught.value)


def test_a_package_that_is_there_is_enough(wandb: Any) -> None:
    check_packages(("wandb",))
