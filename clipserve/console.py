"""What the command prints, and where: answers to stdout, progress and errors to stderr."""

import json
import sys
from typing import NoReturn, Self

import typer


def print_line(text: str) -> None:
    typer.echo(text)


def print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"clipserve: {message}", err=True)
    sys.exit(code)


class Counter:
    """A line that counts up on a terminal; silent elsewhere."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import (
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn(what),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total)
