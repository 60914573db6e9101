"""The lines of docs/api.md, run as they are shown, against a service on loopback."""

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
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
from service.registry import Registry
from service.settings import load_settings

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
TAGS = {"embeddings", "classify", "match", "search", "collections", "items", "jobs", "models"}
TAGS |= {"health"}


def shown_lines() -> list[str]:
    """Whole commands, in the order of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines: list[str] = []
    for line in "".join(blocks).splitlines():
        if line.startswith(" "):
            lines[-1] += f"\n{line}"
        else:
            lines.append(line)
    return lines


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
    app = create_app(settings, registry)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", app
        server.should_exit = True
        thread.join()
    registry.close()


def test_every_line_works_and_every_route_has_one(service: tuple[str, Any], tmp_path: Path):
    address, app = service
    (tmp_path / "shoe.jpg").write_bytes(encode(make_picture(seed=1), "JPEG"))
    (tmp_path / "hat.png").write_bytes(encode(make_picture(seed=2)))
    variables: list[str] = []
    for line in shown_lines():
        # A curl that fails where the service refuses, and goes through no proxy.
        script = [
            "set -e -o pipefail",
            "curl() { command curl --fail-with-body -S --noproxy '*' \"$@\"; }",
        ]
        script += [*variables, line.replace("localhost:8000", address)]
        if line.startswith("JOB="):
            script.append('echo "$JOB"')
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if line.startswith("JOB="):
            variables = [f"JOB={done.stdout.strip()}"]
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
    assert sum("curl" in line for line in shown_lines()) > 30
