"""The command on two models: interpolate."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipserve.cli.options import Device, Dtype
from clipserve.console import print_line, print_table
from clipserve.errors import ConfigError

_SHOWN = {"R@1": "mean_r1", "R@10": "mean_r10"}


def interpolate(
    start: Annotated[Path, typer.Argument(metavar="START", help="The model before.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="What was trained from it.")],
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="How far to go: 0 is START, 1 TUNED.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Model directory to write, absent: TUNED-alpha-ALPHA; of --sweep a JSON file."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Several alphas, comma separated: measure, write no model.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="With --sweep: shards to measure on; repeat it.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make a model between two of one kind (WiSE-FT), or measure several on old and new data."""
    if (alpha is None) == (sweep is None):
        raise ConfigError("give either --alpha, to write a model, or --sweep, to measure several")
    if alpha is not None:
        if data or (device, dtype) != ("auto", "auto"):
            raise ConfigError(
                "--data, --device and --dtype are for --sweep; measure one model with clipserve"
                " evaluate"
            )
        from clipserve.interpolate import interpolate as run

        out = out or tuned.parent / f"{tuned.absolute().name}-alpha-{alpha:g}"
        print_line(f"model: {out} ({run(start, tuned, alpha, out)[:12]})")
        return
    assert sweep is not None
    _sweep(start, tuned, _read_alphas(sweep), data or [], out, device, dtype)


def _sweep(
    start: Path,
    tuned: Path,
    alphas: list[float],
    data: list[str],
    out: Path | None,
    device: str,
    dtype: str,
) -> None:
    if not data:
        raise ConfigError("--sweep needs --data, the shards to measure on; once for each task")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} is there already; with --sweep name a new JSON file")
    from clipserve.files import write_atomic
    from clipserve.interpolate import load_pair
    from clipserve.shards import ShardSet
    from training.evaluate.sweep import sweep

    sets = [ShardSet.open(location) for location in data]
    report = sweep(*load_pair(start, tuned), alphas, sets, device, dtype)
    report["data"] = [shards.location for shards in sets]  # without credentials
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, json.dumps(report, indent=2) + "\n")
    print_table(_table(report))


def _table(report: dict[str, Any]) -> list[list[str]]:
    head = ["alpha", *(f"{name} {rate}" for name in report["data"] for rate in _SHOWN)]
    return [head] + [
        [
            f"{row['alpha']:g}",
            *(f"{recall[key]:.1%}" for recall in row["recall"] for key in _SHOWN.values()),
        ]
        for row in report["rows"]
    ]


def _read_alphas(text: str) -> list[float]:
    try:
        alphas = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        alphas = []
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ConfigError(f"--sweep {text!r} is not a list of numbers from 0 to 1, as 0,0.5,1")
    return alphas
