"""The lines of docs/api.md and docs/service.md, run as shown, against services on loopback."""

import contextlib
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from albefs import tiny_albef
from conftest import encode, make_picture, tiny_architecture
from served import fill

from clipserve import checkpoint
from clipserve.model import create
from service.app import create_app
from service.keys import add_key
from service.registry import Registry
from service.settings import load_settings

DOCS = Path(__file__).parent.parent / "docs"
TAGS = {"embeddings", "classify", "match", "search", "collections", "items", "jobs", "models"}
TAGS |= {"health"}


def shown_lines(page: str) -> list[str]:
    """Whole commands, in the order of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    lines: list[str] = []
    for line in "".join(blocks).splitlines():
        if line.startswith(" "):
            lines[-1] += f"\n{line}"
        else:
            lines.append(line)
    return lines


@contextlib.contextmanager
def running(registry: Registry) -> Iterator[tuple[str, Any]]:
    """The address of a service, and its app."""
    app = create_app(registry.settings, registry)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", app
        server.should_exit = True
        thread.join()
    registry.close()


def run_line(line: str, address: str, folder: Path, before: Sequence[str] = ()) -> str:
    """What it prints; a curl fails where the service refuses, and goes through no proxy."""
    script = [
        "set -e -o pipefail",
        "curl() { command curl --fail-with-body -S --noproxy '*' \"$@\"; }",
        *before,
        line.replace("localhost:8000", address),
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """Its address and its app."""
    torch.manual_seed(0)
    models = tmp_path / "models"
    tiny = create(tiny_architecture())
    checkpoint.save(tiny, models / "tiny", name="tiny", objective=("contrastive",))
    albef = tiny_albef(tmp_path / "vocabulary")
    checkpoint.save(albef, models / "albef", name="albef", objective=("matching",))
    (tmp_path / "sets.toml").write_text('clothes = ["shoe", "hat", "shirt"]')
    settings = load_settings(
        collections_root=tmp_path / "collections",
        jobs_dir=tmp_path / "jobs",
        label_sets=tmp_path / "sets.toml",
        model_roots=[models],
    )
    registry = Registry(settings)
    served = registry.load_model(models / "tiny")
    registry.load_model(models / "albef")
    fill(tmp_path / "collections" / "toys", served.model)
    registry.add_collection(tmp_path / "collections" / "toys")
    with running(registry) as found:
        yield found


def test_every_line_works_and_every_route_has_one(service: tuple[str, Any], tmp_path: Path):
    address, app = service
    (tmp_path / "shoe.jpg").write_bytes(encode(make_picture(seed=1), "JPEG"))
    (tmp_path / "hat.png").write_bytes(encode(make_picture(seed=2)))
    variables: list[str] = []
    for line in shown_lines("api.md"):
        is_variable = line.startswith("JOB=")
        shown = f'{line}\necho "$JOB"' if is_variable else line
        printed = run_line(shown, address, tmp_path, variables)
        if is_variable:
            variables = [f"JOB={printed.strip()}"]
            assert re.fullmatch(r"JOB=job-[0-9a-f]+", variables[0])
    asked = set(
        re.findall(
            r'clipserve_requests_total\{method="(\w+)",route="([^"]+)",status="20\d"\}',
            app.state.registry.telemetry.render().decode(),
        )
    )
    routes = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method, route in methods.items()
        if set(route.get("tags", ())) <= TAGS
    }
    assert len(routes) > 25
    unasked = {
        (method, path)
        for method, path in routes
        if (method, path.replace("{id}", "{id:path}")) not in asked
        and (method, path.replace("{name}", "{name:path}")) not in asked
        and (method, path) not in asked
    }
    assert unasked <= {("GET", "/metrics")}  # which is asked all the time, and not counted


def test_there_are_lines_to_run() -> None:
    assert sum("curl" in line for line in shown_lines("api.md")) > 30


def test_what_the_services_page_asks_for_is_answered_with_a_key_and_without_keys(
    model_dir: Path, tmp_path: Path
) -> None:
    """Its other lines are commands, which test_docs.py looks at."""
    lines = [line for line in shown_lines("service.md") if line.startswith("curl")]
    with_key = [line for line in lines if "$KEY" in line]
    key = add_key(tmp_path / "keys", "someone", "read")
    registry = Registry(load_settings(api_keys_file=tmp_path / "keys"))
    registry.load_model(model_dir)
    with running(registry) as (address, _):
        assert [run_line(line, address, tmp_path, [f"KEY={key}"]) for line in with_key]
    registry = Registry(load_settings())
    registry.load_model(model_dir)
    with running(registry) as (address, _):
        for line in sorted(set(lines) - set(with_key)):
            printed = run_line(line, address, tmp_path)
            if "-D-" in line:
                assert "x-request-id: order-17" in printed
                assert "server-timing: total;dur=" in printed
