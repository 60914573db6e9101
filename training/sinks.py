"""Other places that a run's numbers go to: TensorBoard, Weights & Biases, MLflow.

Each is a `Sink`. The latter two are no dependencies: `train.report_to` names them, and their
packages are imported here alone. A continued run goes on in the same place, by the id that is kept
in the run directory. Start at `open_sinks`.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from clipserve.config import Config, dump_toml
from clipserve.errors import ConfigError
from clipserve.files import write_atomic

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes numbers while a run goes on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All that is known of a step, or some more of it."""
        ...

    def close(self, is_finished: bool) -> None:
        """The last call; `is_finished` is False after an error, or a signal to stop."""
        ...


def check_packages(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a package of `train.report_to` that is not there."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"train.report_to = {name} needs the package {name} ({error});"
                f' pip install "clipserve[{name}]", or leave it out'
            ) from None


def open_sinks(config: Config, start_step: int) -> list[Sink]:
    """TensorBoard, and what `train.report_to` names."""
    out = Path(config.out)
    sinks: list[Sink] = []
    with ExitStack() as on_error:

        def keep(sink: Sink) -> None:
            sinks.append(sink)
            on_error.callback(sink.close, is_finished=False)

        keep(TensorBoard(out, start_step))
        for name in config.train.report_to:
            file = out / f"{name}.id"
            sink = _open(name, out, config, file.read_text() if file.exists() else None)
            keep(_Remote(name, sink))
            write_atomic(file, sink.id)
        on_error.pop_all()
    return sinks


def _open(name: str, out: Path, config: Config, before: str | None) -> "WeightsAndBiases | MLflow":
    kinds: dict[str, type[WeightsAndBiases | MLflow]]
    kinds = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    try:
        return kinds[name](out, config, before)
    except Exception as error:  # of any kind: a server, an account, a store
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"train.report_to = {name} cannot be opened: {reason}") from error


class _Remote:
    """A sink whose server may be away: that is told once, and ends no run."""

    def __init__(self, name: str, sink: Sink) -> None:
        self._name, self._sink = name, sink
        self._has_failed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._sink.log(step, values))

    def close(self, is_finished: bool) -> None:
        self._try(lambda: self._sink.close(is_finished))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._has_failed:
                logger.warning("%s takes no numbers: %s", self._name, error)
            self._has_failed = True


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, out: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self, is_finished: bool) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, under the project and the account of its own settings."""

    def __init__(self, out: Path, config: Config, before: str | None) -> None:
        wandb = import_module("wandb")
        self._run: Any = wandb.init(
            id=before,
            resume="allow" if before else None,
            name=out.resolve().name,
            dir=str(out),
            config=config.model_dump(mode="json"),
        )
        self.id = str(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # As its own `step` wandb drops what is below the last one, all of it after going back.
        self._run.log({"step": step, **values})

    def close(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


class MLflow:
    """A run of MLflow, in the store and the experiment of its own settings."""

    def __init__(self, out: Path, config: Config, before: str | None) -> None:
        self._mlflow: Any = import_module("mlflow")
        name = out.resolve().name
        run = self._mlflow.start_run(run_id=before, run_name=None if before else name)
        self.id = str(run.info.run_id)
        try:
            self._mlflow.log_text(dump_toml(config), "config.toml")
        except Exception:
            self.close(is_finished=False)
            raise

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Its file store makes folders of slashes, where `loss` is a file already.
        numbers = {name.replace("/", "."): value for name, value in values.items()}
        self._mlflow.log_metrics(numbers, step=step)

    def close(self, is_finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if is_finished else "FAILED")
