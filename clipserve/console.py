"""What the command prints, and where: answers to stdout, progress, notes and errors to stderr."""

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import NoReturn, Self

import typer

LINE_EVERY_S = 60.0
"""between two lines of progress where no terminal is"""


def print_line(text: str) -> None:
    typer.echo(text)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(rows: list[list[str]]) -> None:
    """Columns to the right, under the names in the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def note(message: str) -> None:
    """What is no part of the answer."""
    typer.echo(message, err=True)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    note(f"clipserve: {message}")
    sys.exit(code)


def log_to_stderr() -> None:
    """For commands that run for long: what the modules log, with the time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # The latter log whole addresses, signatures and all.
    for name in ("faiss.loader", "httpx", "httpcore", "fsspec", "aiohttp", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Counter:
    """Counts up, with the rate and the time left: in place on a terminal, else a line a minute."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import (
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._what = what
        self._clock = clock
        self._shown = (clock(), 0)
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(what),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None, rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int | None = None) -> None:
        if self._progress.disable:
            self._write_line(done, total)
            return
        speed = self._progress.tasks[self._task].speed  # of the last 30 s
        rate = f"{speed:,.0f}/s" if speed else ""
        self._progress.update(self._task, completed=done, total=total, rate=rate)

    def _write_line(self, done: int, total: int | None) -> None:
        now, (then, before) = self._clock(), self._shown
        if now - then < LINE_EVERY_S:
            return
        self._shown = (now, done)
        rate = (done - before) / (now - then)
        line = f"{self._what}: {done:,}"
        if total is not None:
            line += f" of {total:,}"
        line += f", {rate:,.1f}/s"
        if total is not None and rate > 0:
            line += f", {_duration((total - done) / rate)} left"
        note(line)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
