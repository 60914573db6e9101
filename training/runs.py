"""How runs stand: run.json, which a run keeps about itself, and the table of many.

    run.json    {"state", "total_steps", "reason"}

Start at `list_runs`.
"""

import contextlib
import fcntl
import json
import logging
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clipserve.errors import ConfigError
from clipserve.files import write_atomic

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped"]
LOCK = ".lock"
"""the file that a run holds a lock of"""
_METRICS = "metrics.jsonl"
_DEPTH = 3


@dataclass
class Standing:
    """What a run says of itself; the last word is written when it ends."""

    state: State
    total_steps: int
    reason: str | None = None
    """why it stopped"""


@dataclass(frozen=True)
class RunSummary:
    """One row of the table."""

    path: str
    state: State
    step: int
    total_steps: int | None
    loss: float | None
    metric: str
    best: float | None
    """the best value of `metric`, and where"""
    best_step: int | None
    samples_per_second: float | None
    skipped_steps: int
    reason: str | None


@contextlib.contextmanager
def noting(folder: Path, total_steps: int) -> Iterator[Standing]:
    """Keep run.json while the block runs; an error is noted as why it stopped."""
    standing = Standing("running", total_steps)
    _write(folder, standing)
    standing.state = "finished"
    try:
        yield standing
    except BaseException as error:
        standing.state, standing.reason = "stopped", str(error) or type(error).__name__
        try:
            _write(folder, standing)
        except OSError as another:  # a full disk, say: `error` is what is to be told
            logger.warning("run.json cannot be written: %s", another.strerror or another)
        raise
    _write(folder, standing)


def list_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The runs in these folders and, a few levels down, below them, by name.

    Raises ConfigError for a folder that is not there, and if there is no run at all.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder; name run directories, or one that holds them"
            )
    found = {run.resolve(): run for folder in folders for run in _find(folder, _DEPTH)}
    if not found:
        names = ", ".join(map(str, folders))
        raise ConfigError(f"no run in {names}: a run directory holds {_METRICS} and config.toml")
    return [summarise(found[path]) for path in sorted(found)]


def summarise(folder: Path) -> RunSummary:
    """A run as its files tell of it."""
    lines = read_metrics(folder)
    metric = _best_metric(folder)
    scores = [(line[metric], -line["step"]) for line in lines if metric in line]
    best, first = max(scores, default=(None, None))
    standing = _read(folder)
    return RunSummary(
        path=str(folder),
        state=standing.state,
        step=max((line["step"] for line in lines), default=0),
        total_steps=standing.total_steps or None,
        loss=_last(lines, "loss"),
        metric=metric,
        best=best,
        best_step=None if first is None else -first,
        samples_per_second=_last(lines, "samples_per_second"),
        skipped_steps=int(_last(lines, "skipped_steps") or 0),
        reason=standing.reason,
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; not one that is being written just now."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (folder / _METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / _METRICS).is_file() and (folder / "config.toml").is_file():
        yield folder
        return
    if depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink():
                yield from _find(child, depth - 1)


def _best_metric(folder: Path) -> str:
    try:
        return str(tomllib.loads((folder / "config.toml").read_text())["train"]["best_metric"])
    except (OSError, ValueError, KeyError):
        return "val/mean_r1"


def _last(lines: list[dict[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


def _write(folder: Path, standing: Standing) -> None:
    write_atomic(folder / "run.json", json.dumps(asdict(standing), indent=1) + "\n")


def _read(folder: Path) -> Standing:
    """What is noted; a run that says it is running but holds no lock was killed."""
    try:
        standing = Standing(**json.loads((folder / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        standing = Standing("stopped", 0)
    if _is_locked(folder / LOCK):
        standing.state, standing.reason = "running", None
    elif standing.state == "running":
        standing.state, standing.reason = "stopped", "killed"
    return standing


def _is_locked(file: Path) -> bool:
    """Whether a process on this machine, or on one that shares its locks, trains here."""
    try:
        with file.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
