"""Commands that stay up: serve, demo."""

from pathlib import Path
from typing import Annotated

import typer

from clipserve.console import log_to_stderr


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model directories.")],
    collection: Annotated[
        list[Path] | None, typer.Option(help="Collection directory; may be repeated.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.")] = None,
) -> None:
    """Serve models and collections over REST, with a web page at /. Stop with Ctrl-C."""
    log_to_stderr()
    from service.app import serve as run
    from service.settings import load_settings

    settings = load_settings(host=host, port=port)
    run([Path(model) for model in models], list(collection or []), settings)


def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    serve: Annotated[bool, typer.Option(help="Stay up and serve the web page.")] = True,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the service.")] = 8000,
) -> None:
    """Train a small CLIP on emoji, search and classify with it over HTTP: all of it, in minutes."""
    from clipserve.demo import run

    run(out, stay=serve, port=port)
