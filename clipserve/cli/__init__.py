"""The `clipserve` command: parse, call one function, print.

Nothing heavy is imported before a subcommand runs. A user's mistake ends with one line and exit
code 2. `--json` prints what a program may read.

    options.py    options that several commands take
    data.py       pack, verify
    training.py   train, runs, evaluate
    interpolate.py  interpolate
    embed.py      embed
    search.py     search
    index.py      index build, info, check, compact, snapshot
    transfer.py   index export, import
    models.py     classify, import, export, doctor
    serving.py    serve, keys new, list, revoke, demo
"""

import importlib.metadata
import re
import sys
from typing import NoReturn

import typer

from clipserve.cli import (
    data,
    embed,
    index,
    interpolate,
    models,
    search,
    serving,
    training,
    transfer,
)
from clipserve.console import fail
from clipserve.errors import ClipserveError, ConfigError

app = typer.Typer(
    name="clipserve",
    help="Captioned pictures in, a zero-shot classifier and an image-text search service out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(data.pack)
app.command()(data.verify)
app.command()(training.train)
app.command()(training.runs)
app.command()(training.evaluate)
app.command()(interpolate.interpolate)
app.command()(embed.embed)
app.command()(search.search)
app.command()(models.classify)
app.command("import")(models.import_model)
app.command("export")(models.export_model)
app.command()(serving.serve)
app.command()(serving.demo)
app.command()(models.doctor)

index_app = typer.Typer(
    help="Collections as a whole: their search index, checks, copies, formats of others."
)
index_app.command()(index.build)
index_app.command()(index.info)
index_app.command()(index.check)
index_app.command()(index.compact)
index_app.command()(index.snapshot)
index_app.command("export")(transfer.export)
index_app.command("import")(transfer.import_vectors)
app.add_typer(index_app, name="index", no_args_is_help=True)
app.add_typer(serving.keys, name="keys", no_args_is_help=True)

_INTERRUPTED = 130
_OWN_PACKAGES = ("clipserve", "training", "service", "index")
# A name in a top_level.txt, or a Python file in a RECORD.
_OWNED = re.compile(rf"\n({'|'.join(_OWN_PACKAGES)})(?=\r?\n|(?:/[^\n,]*)?\.py,)")


def main() -> NoReturn:
    """Entry point: errors of the user become one line and their exit code."""
    try:
        if "--help" not in sys.argv:  # which should answer at once
            _check_ownership()
        code = app(standalone_mode=False)
    except ClipserveError as error:
        fail("; ".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", _INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", code=2)
    except Exception as error:
        _exit_for_click(error)
        raise
    if code == _INTERRUPTED:  # typer's answer to Ctrl-C
        fail("interrupted", code)
    sys.exit(code or 0)


def _exit_for_click(error: Exception) -> None:
    """Usage errors, in one line too, and explicit exits of the parser."""
    code, show = getattr(error, "exit_code", None), getattr(error, "show", None)
    if code is None:
        return
    if show is None:
        sys.exit(code)
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked for: that is answered
        show()
        sys.exit(code)
    context = getattr(error, "ctx", None)
    hint = f"; see: {context.command_path} --help" if context is not None else ""
    fail(f"{error.format_message().rstrip('.')}{hint}", code)  # type: ignore[attr-defined]


def _check_ownership() -> None:
    """Refuse to start when another distribution owns one of our generic package names.

    importlib.metadata.packages_distributions() knows as well, but takes a quarter of a second: it
    parses the path of every installed file.
    """
    owners: dict[str, set[str]] = {package: set() for package in _OWN_PACKAGES}
    for distribution in importlib.metadata.distributions():
        names = distribution.read_text("top_level.txt") or distribution.read_text("RECORD") or ""
        for package in set(_OWNED.findall(f"\n{names}\n")):
            owners[package].add(distribution.name)
    for package, found in owners.items():
        if others := found - {"clipserve"}:
            raise ConfigError(
                f"{', '.join(sorted(others))} also installs a module named {package!r};"
                " give clipserve an environment of its own"
            )
