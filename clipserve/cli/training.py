"""Commands on runs: train, runs, evaluate."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from clipserve.cli.options import Device, Dtype, Json, ModelDir, pick
from clipserve.console import fail, log_to_stderr, print_json, print_line, print_table
from clipserve.errors import ConfigError

if TYPE_CHECKING:
    from training.loop import TrainResult


def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: continue the run in `out`; no; or a checkpoint directory.")
    ] = "auto",
    processes: Annotated[
        int, typer.Option(min=1, help="Training processes on this machine, one to a GPU.")
    ] = 1,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="How often a run that lost a process goes on from its checkpoint."
        ),
    ] = 0,
    help_config: Annotated[bool, typer.Option("--help-config", help="List every setting.")] = False,
) -> None:
    """Train a model. The config file may be left out when overrides say enough."""
    from clipserve.config import describe_fields, load_config

    if help_config:
        for name, default, meaning in describe_fields():
            print_line(f"{name} (default {default})\n    {meaning}")
        return
    given = list(overrides or [])
    is_override = config is not None and "=" in str(config) and config.suffix != ".toml"
    if is_override:
        given, config = [str(config), *given], None
    settings = load_config(config, given)
    log_to_stderr()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end what does not listen yet
    if processes > 1 or max_restarts:
        from training.launch import launch

        arguments = [*([str(config)] if config else []), *given]
        raise typer.Exit(launch(arguments, resume, processes, max_restarts))
    from training.loop import train as run

    result = run(settings, resume)
    if result.stopped_by is not None:
        fail(f"stopped by {result.stopped_by.name} {_rest(result)}", code=128 + result.stopped_by)
    rates = "  ".join(
        f"{key.removeprefix('val/')} {value:.1%}"
        for key, value in result.metrics.items()
        if key.endswith(("_r1", "_r10"))
    )
    if result.stopped_early:
        assert settings.train.early_stop is not None
        rule = settings.train.early_stop
        print_line(f"{rule.metric} did not rise in {rule.patience} validations: stopped early")
    speed = f"{result.samples_per_second:.0f} samples/s"
    print_line(f"trained {result.step} steps in {result.seconds:.0f} s ({speed})  {rates}")
    print_line(f"model: {result.best}")


def _rest(result: "TrainResult") -> str:
    """Where a run was stopped, and how it goes on."""
    if result.aside is not None:
        return (
            f"after step {result.step}, which was skipped: the weights may be broken, and are kept"
            f" as {result.aside} for --resume; the same command goes on from the checkpoint before"
        )
    saved = f"after step {result.step}, which is saved" if result.step else "before any step"
    return f"{saved}; the same command goes on from there"


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR ...]", help="Run directories, or what holds them; else runs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: how far they are, their loss, best metric and speed, and why they stopped."""
    from dataclasses import asdict

    from training.runs import list_runs

    found = list_runs(folders or [Path("runs")])
    if as_json:
        print_json([asdict(run) for run in found])
        return
    head = ["run", "state", "step", "of", "loss", "metric", "best", "at", "samples/s", "skipped"]
    rows = [
        [
            run.path,
            run.state,
            str(run.step),
            _cell(run.total_steps, "d"),
            _cell(run.loss, ".4f"),
            run.metric,
            _cell(run.best, ".1%"),
            _cell(run.best_step, "d"),
            _cell(run.samples_per_second, ".0f"),
            str(run.skipped_steps),
        ]
        for run in found
    ]
    print_table([head, *rows])
    for run in found:
        if run.reason:
            print_line(f"{run.path} {run.state}: {run.reason}")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def evaluate(
    model: ModelDir,
    data: Annotated[
        str, typer.Option(help="Shards to evaluate on: a folder, a .tar, a pattern, or a URL.")
    ],
    tasks: Annotated[str, typer.Option(help="Comma-separated: retrieval, zeroshot.")] = "retrieval",
    label_field: Annotated[
        str, typer.Option(help="zeroshot: the JSON field with the class; `caption` for the text.")
    ] = "caption",
    templates: Annotated[str, typer.Option(help="zeroshot: template set or file.")] = "none",
    rerank: Annotated[
        int, typer.Option(min=0, help="retrieval: candidates that ALBEF's matching orders again.")
    ] = 0,
    rerank_score: Annotated[
        str, typer.Option(help="matching, matching+cosine, or matching+contrastive.")
    ] = "matching",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure a model on shards; prints JSON, rates as fractions of one."""
    from clipserve.checkpoint import load
    from clipserve.config import RerankScore
    from clipserve.shards import ShardSet
    from training.evaluate.report import evaluate as run

    wanted = [task.strip() for task in tasks.split(",") if task.strip()]
    if rerank and "retrieval" not in wanted:
        raise ConfigError("--rerank is for the task retrieval; add it to --tasks")
    score = pick(rerank_score, get_args(RerankScore), "--rerank-score")
    if score != "matching" and not rerank:
        raise ConfigError("--rerank-score needs --rerank K, the number of candidates")
    shards = ShardSet.open(data)
    loaded = load(model, device, dtype)
    print_json(run(loaded, shards, wanted, label_field, templates, rerank, score))
