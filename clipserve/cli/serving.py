"""Commands of the service: serve, keys; and demo, which ends in it."""

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from clipserve.console import log_to_stderr, note, print_line, print_table
from clipserve.files import hash_ahead

keys = typer.Typer(help="API keys: who may use the service, and for what.")

_KeyFile = Annotated[
    Path,
    typer.Option(
        "--file", envvar="CLIPSERVE_API_KEYS_FILE", help="File of hashed keys, a line for each."
    ),
]


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model directories.")],
    collection: Annotated[
        list[Path] | None, typer.Option(help="Collection directory; may be repeated.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or int8.")] = None,
) -> None:
    """Serve models and collections over REST, with a web page at /. Stop with Ctrl-C."""
    # Now, not after seconds of imports: the first process of a container has no default for it.
    # Not by an exception, which some import or callback would print or swallow.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    log_to_stderr()
    hash_ahead(file for model in models for file in Path(model).glob("*.safetensors"))
    with _without_garbage_collection():
        from service.app import serve as run
        from service.logs import use_format
        from service.settings import load_settings

    settings = load_settings(host=host, port=port, device=device, dtype=dtype)
    use_format(settings.log_format)
    run([Path(model) for model in models], list(collection or []), settings)


def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    serve: Annotated[bool, typer.Option(help="Stay up and serve the web page.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8000,
) -> None:
    """Train a small CLIP on emoji, search and classify with it over HTTP: all of it, in minutes."""
    from clipserve.demo import run

    run(out, stay=serve, port=port)


@keys.command("new")
def new_key(
    file: _KeyFile,
    name: Annotated[str, typer.Option(help="Whose it is; shown in logs.")],
    scope: Annotated[
        str, typer.Option(help="read; write: items, jobs, collections too; admin: everything.")
    ] = "read",
) -> None:
    """Make a key and print it, this once: the file keeps its hash only."""
    from service.keys import add_key, check_scope

    print_line(add_key(file, name, check_scope(scope)))
    note(f"kept in {file}; set CLIPSERVE_API_KEYS_FILE={file} for the service")


@keys.command("list")
def list_keys(file: _KeyFile) -> None:
    """The ids, names and scopes of all keys."""
    from service.keys import read_keys

    known = [[key.id, key.scope, key.created, key.name] for key in read_keys(file)]
    print_table([["id", "scope", "created", "name"], *known])


@keys.command("revoke")
def revoke_key(
    file: _KeyFile, key: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]
) -> None:
    """Take a key away; a running service notices at its next request."""
    from service.keys import revoke_key as revoke

    print_line(f"revoked {key}, the key of {revoke(file, key).name}")


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For imports, which make none and take a fifth less time without; what they made is not
    looked at later either."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
