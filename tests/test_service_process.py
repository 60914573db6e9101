"""`clipserve serve` as a process of its own: its start, its end, and reloads under load."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import clipserve
from clipserve import checkpoint
from clipserve.errors import CheckpointError
from clipserve.model import create
from index.collection import Collection

ROOT = Path(__file__).parent.parent
WAIT_S = 180  # on a busy machine an import of torch alone took half a minute
TEXTS = ["a cat", "two dogs", "a red shoe"]

# Says when the service is being imported, and lets that take for ever; an exception in the handler
# of a signal would be lost, as in a callback of the interpreter's.
STUCK = """
import sys, threading
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "service.app":
            print("importing", flush=True)
            try:
                threading.Event().wait()
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
from clipserve.cli import main
main()
"""

# Loads until a signal has come, and some time more, which it spends inside torch.
SLOW_LOAD = """
import service.app, service.registry, service.server, threading, torch
came = threading.Event()
def load(registry, path):
    print("loading", flush=True)
    came.wait()
    square = torch.rand(200, 200)
    for _ in range(2000):
        square = torch.tanh(square @ square)
service.registry.Registry.load_model = load
handle = service.server.Server.handle_exit
def note(server, *arguments):
    handle(server, *arguments)
    came.set()
service.server.Server.handle_exit = note
from clipserve.cli import main
main()
"""


# The threads of its collections wait for a volume that does not answer.
STUCK_STORE = """
import service.registry, service.server, threading
service.server.CLOSE_S = {close_s}
load = service.registry.Registry.load_model
def load_and_hang(registry, path):
    for _ in range(registry.settings.search_threads):
        registry._store.submit(threading.Event().wait)
    return load(registry, path)
service.registry.Registry.load_model = load_and_hang
from clipserve.cli import main
main()
"""


def start(
    *arguments: object, log: Path, code: str | None = None, **settings: object
) -> "subprocess.Popen[str]":
    """`clipserve serve`, or `code` with its arguments. A pipe for a log would fill up."""
    command = ["-m", "clipserve"] if code is None else ["-c", code]
    environment = {f"CLIPSERVE_{name.upper()}": str(value) for name, value in settings.items()}
    with log.open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, *command, "serve", *map(str, arguments), "--port", "0"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


@contextlib.contextmanager
def serving(*arguments: object, log: Path, **settings: object) -> Iterator[str]:
    """The address of a service that has loaded; it must end well."""
    process = start(*arguments, log=log, **settings)
    try:
        while "ready at http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield re.search(r"ready at (\S+)", log.read_text())[1]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def paths(tmp_path: Path, architecture: dict[str, Any]) -> list[Path]:
    """Two checkpoints of one name."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(tmp_path / "models" / f"step-{seed}")
        checkpoint.save(create(architecture), made[-1], name="m")
    return made


def test_a_signal_while_it_still_imports_ends_it_well(log: Path):
    process = start("no model", log=log, code=STUCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()


def test_damaged_weights_end_it_though_they_are_hashed_beforehand(log: Path, paths: list[Path]):
    weights = paths[0] / checkpoint.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-5] ^= 16
    weights.write_bytes(data)
    process = start(paths[0], log=log)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == CheckpointError.exit_code, log.read_text()
    assert f"{weights} is damaged" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_signal_while_it_loads_ends_it_well(log: Path, model_dir: Path):
    process = start(model_dir, log=log, code=SLOW_LOAD)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "ready at" not in log.read_text()


@pytest.mark.parametrize(
    ("close_s", "signals", "says"),
    [(0.5, 1, "closing took over"), (600, 2, "a second signal came")],
)
def test_threads_that_hang_hold_its_end_up_until_a_deadline_or_a_second_signal(
    log: Path, model_dir: Path, close_s: float, signals: int, says: str
):
    code = STUCK_STORE.format(close_s=close_s)
    process = start(model_dir, log=log, code=code, shutdown_timeout_s=0.5)
    try:
        for line in ["ready at http", "shutting down"][:signals]:
            while line not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, log.read_text()
    assert says in log.read_text()
    assert "Traceback" not in log.read_text()


def test_threads_that_hang_do_not_hide_why_it_could_not_start(log: Path, paths: list[Path]):
    (paths[0] / checkpoint.WEIGHTS).write_bytes(b"no")
    process = start(paths[0], log=log, code=STUCK_STORE.format(close_s=0.5), shutdown_timeout_s=0.5)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == CheckpointError.exit_code, log.read_text()
    assert f"{paths[0] / checkpoint.WEIGHTS} is damaged" in log.read_text()


@pytest.mark.parametrize("setting", ["jobs_dir", "label_sets", "api_keys_file", "collections_root"])
def test_a_setting_that_cannot_be_used_is_one_line_and_code_2(
    setting: str, tmp_path: Path, model_dir: Path, log: Path
):
    (tmp_path / "file").write_bytes(b"\xff\n")
    unusable = tmp_path if setting == "api_keys_file" else tmp_path / "file"
    process = start(model_dir, log=log, **{setting: unusable})
    process.communicate(timeout=WAIT_S)
    said = log.read_text()
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("clipserve: ")]
    assert str(unusable) in line
    assert "Traceback" not in said


def test_after_best_moved_on_or_a_reload_by_path_a_restart_serves_what_it_can(
    paths: list[Path], log: Path, tmp_path: Path
):
    for name, path in zip(("old", "new"), paths, strict=True):
        fingerprint = checkpoint.read_description(path)["fingerprint"]
        for folder in (tmp_path / "root" / name, tmp_path / f"named-{name}"):
            Collection.create(folder, fingerprint=fingerprint, model_name="m", embed_dim=16).close()
    best = tmp_path / "best"
    best.symlink_to(paths[1])
    named = ("--collection", tmp_path / "named-old", "--collection", tmp_path / "named-new")
    with serving(best, *named, log=log, collections_root=tmp_path / "root") as address:
        listed = httpx.get(f"{address}/v1/collections", trust_env=False).json()
    assert {one["name"] for one in listed["data"]} == {"named-new", "new"}
    assert {one["name"] for one in listed["unavailable"]} == {"named-old", "old"}
    assert "unavailable: named-old, old" in log.read_text()


@pytest.mark.slow
def test_twenty_reloads_under_load_fail_no_request_of_any_client(paths: list[Path], log: Path):
    models = [clipserve.load(path, device="cpu", dtype="fp32") for path in paths]
    want = {model.info.fingerprint: model.embed_texts(TEXTS) for model in models}
    seen: list[str] = []

    async def ask(client: httpx.AsyncClient, done: asyncio.Event) -> None:
        while not done.is_set():
            answer = await client.post("/v1/embeddings", json={"input": TEXTS})
            assert answer.status_code == 200, answer.text
            content = answer.json()
            got = np.array([one["embedding"] for one in content["data"]])
            np.testing.assert_allclose(got, want[content["fingerprint"]], atol=2e-2)
            seen.append(content["fingerprint"])

    async def reload_often(address: str) -> None:
        done = asyncio.Event()
        async with httpx.AsyncClient(base_url=address, timeout=WAIT_S, trust_env=False) as client:
            asking = [asyncio.create_task(ask(client, done)) for _ in range(8)]
            for turn in range(20):
                body = {"path": str(paths[(turn + 1) % 2])}
                answer = await client.post("/v1/models/m:reload", json=body)
                assert answer.status_code == 200, answer.text
            done.set()
            await asyncio.gather(*asking)

    with serving(paths[0], log=log, model_roots=paths[0].parent) as address:
        asyncio.run(reload_often(address))
    assert set(seen) == set(want)
