"""Where a run's numbers go: metrics.jsonl, curves.png, a line or a bar for the person watching.

On a terminal a progress bar with ETA and samples/s; elsewhere a plain line at every log step.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clipserve.errors import CheckpointError
from clipserve.files import write_atomic
from clipserve.shards import BadSample
from training.curves import draw_curves
from training.run_directory import RunDirectory
from training.sinks import Sink

logger = logging.getLogger(__name__)


class Tracker:
    """Appends to the run directory and `sinks`; close it, or use it as a context manager.

    Resuming at `start_step` drops the lines that a killed run wrote beyond its checkpoint. Without
    a console, in a process that is not the main one, only bad and skipped samples are written.
    Where they cannot be written, CheckpointError names what is saved.
    """

    is_finished = True
    """what the sinks are told at the end, if it is no error: False of a run that was stopped"""

    def __init__(
        self,
        directory: RunDirectory,
        start_step: int,
        total_steps: int,
        console: Console | None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._is_main = console is not None
        self._sinks = sinks
        self._directory = directory
        self._out = out = directory.path
        console = console or Console(quiet=True)
        out.mkdir(parents=True, exist_ok=True)  # another machine's own disk is refused after this
        if self._is_main:
            for name in ("metrics.jsonl", "bad_samples.jsonl", "skipped_samples.jsonl"):
                _drop_lines_after(out / name, start_step)
            self._metrics = (out / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._bad = (out / "bad_samples.jsonl").open("a", encoding="utf-8", buffering=1)
        self._warned: set[tuple[str, str]] = set()
        self._warned_of_truncation = False
        self._total = total_steps
        self._start_step, self._started = start_step, time.monotonic()
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=total_steps, completed=start_step, numbers=""
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        try:
            with self._writing():
                self._close(error is None and self.is_finished)
        except CheckpointError as another:
            if error is None:
                raise
            logger.warning("%s", another)  # the first one is what is to be told

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._progress.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same to the sinks, and the person's line.

        What is not finite is left out: JSON has no word for it, and a curve no place.
        """
        if not self._is_main:
            return
        values = {
            key: value
            for key, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._warn_of_truncation(values.get("truncated_fraction", 0.0))
        with self._writing():
            self._metrics.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            for sink in self._sinks:
                sink.log(step, values)
            if "loss" not in values:  # an evaluation
                draw_curves(self._out)
        text = _summary(values)
        self._progress.update(self._task, completed=step, numbers=text)
        if not self._console.is_terminal or "loss" not in values:
            eta = "" if self._console.is_terminal else f"  ETA {self._eta(step)}"
            self._console.print(f"step {step}/{self._total}  {text}{eta}", highlight=False)

    def bad_sample(self, step: int, bad: BadSample) -> None:
        """One line of bad_samples.jsonl; a warning the first time that sample is seen."""
        with self._writing():
            self._bad.write(json.dumps({"step": step, **asdict(bad)}) + "\n")
        if (bad.shard, bad.key) not in self._warned:
            self._warned.add((bad.shard, bad.key))
            logger.warning("bad sample %s:%s: %s", bad.shard, bad.key, bad.reason)

    def skipped_samples(self, step: int, keys: list[tuple[str, str]], reason: str) -> None:
        """A line of skipped_samples.jsonl for each sample of a batch whose step was not taken."""
        lines = [
            json.dumps({"step": step, "shard": shard, "key": key, "reason": reason}) + "\n"
            for shard, key in keys
        ]
        # At once: other processes write into the same file.
        with self._writing(), (self._out / "skipped_samples.jsonl").open("ab", buffering=0) as file:
            file.write("".join(lines).encode())

    def _close(self, is_finished: bool) -> None:
        with contextlib.ExitStack() as rest:  # of which each has its turn, whatever fails
            for sink in self._sinks:
                rest.callback(sink.close, is_finished)
            if self._is_main:
                rest.callback(draw_curves, self._out)
                rest.callback(self._metrics.close)
            rest.callback(self._bad.close)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._out} cannot be written into: {error.strerror or error};"
                f" {self._directory.name_whole()}: put that right and run the same command again"
            ) from error

    def _warn_of_truncation(self, fraction: float) -> None:
        if fraction > 0 and not self._warned_of_truncation:
            self._warned_of_truncation = True
            logger.warning(
                "%.1f%% of the captions are longer than the text context and were cut;"
                " metrics.jsonl has truncated_fraction",
                100 * fraction,
            )

    def _eta(self, step: int) -> str:
        done = step - self._start_step
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        minutes, seconds = divmod(math.ceil(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours}:{minutes:02.0f}:{seconds:02.0f}"
            if hours
            else f"{minutes:.0f}:{seconds:02.0f}"
        )


def _summary(values: dict[str, Any]) -> str:
    wanted = {
        "loss": "loss {:.4f}",
        "samples_per_second": "{:.0f} samples/s",
        "lr": "lr {:.2e}",
        "logit_scale": "scale {:.1f}",
        "val/i2t_r1": "i2t R@1 {:.1%}",
        "val/t2i_r1": "t2i R@1 {:.1%}",
        "val/mean_r10": "mean R@10 {:.1%}",
    }
    return "  ".join(form.format(values[key]) for key, form in wanted.items() if key in values)


def _drop_lines_after(file: Path, step: int) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the last line of a killed process may be half written
    write_atomic(file, "".join(f"{line}\n" for line in kept))
