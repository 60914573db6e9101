"""The services that the benchmark of ours compares: how each is installed, started and asked.

A peer has an environment of its own below build/service. All serve a ViT-B/32 with the same random
weights: ours from a model directory, Infinity from transformers' CLIPModel of them.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.service_load import Body, Target, numbered, pictures

TEXT = "a photo of a small red bicycle leaning on a wall, number @@"
_READY_S = 180.0


@dataclass(frozen=True)
class Peer:
    """A service: `start` gives the command and its environment, `ask` a target by kind of work."""

    name: str
    command: Callable[[Path, int], Sequence[str]]
    environment: dict[str, str]
    health: str
    path: str
    text: object
    """JSON of a request for one text"""
    wrap: Callable[[list[str]], object]
    """JSON of a request for pictures, given their base64"""

    def target(self, port: int, jpegs: Sequence[bytes]) -> Target:
        """Requests for the pictures, or for one text where there are none."""
        body: Body = numbered(self.text, "@@") if not jpegs else pictures(list(jpegs), self.wrap)
        return Target("127.0.0.1", port, self.path, body, max(1, len(jpegs)))


@contextlib.contextmanager
def running(peer: Peer, model: Path, threads: int) -> Iterator[tuple[int, float]]:
    """The port of a started service, and the seconds until it was ready."""
    port = free_port()
    environment = os.environ | peer.environment | {"OMP_NUM_THREADS": str(threads)}
    with (model.parent / f"{peer.name.replace(' ', '-')}.log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            peer.command(model, port), env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{peer.health}", peer.name)
            yield port, time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", url: str, name: str) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with code {process.returncode}; its log says why")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"{name} was not ready after {_READY_S:g} s")


def uri(base64: str) -> str:
    return f"data:image/jpeg;base64,{base64}"


def ours() -> Peer:
    return Peer(
        "clipserve",
        lambda model, port: [
            *(sys.executable, "-m", "clipserve", "serve", str(model / "clipserve")),
            *("--port", str(port)),
        ],
        {},
        "/health/ready",
        "/v1/embeddings",
        {"input": [TEXT], "encoding_format": "base64"},
        lambda items: {
            "input": [uri(item) for item in items],
            "modality": "image",
            "encoding_format": "base64",
        },
    )


def infinity(environment: Path, dtype: str) -> Peer:
    """In its fastest setting on a CPU; no warm-up, for the benchmark warms all of them."""
    return Peer(
        f"infinity {dtype}",
        lambda model, port: [
            *(
                str(environment / "bin/infinity_emb"),
                "v2",
                "--model-id",
                str(model / "transformers"),
            ),
            *("--served-model-name", "clip", "--engine", "torch", "--device", "cpu"),
            *(
                "--no-bettertransformer",
                "--batch-size",
                "32",
                "--dtype",
                dtype,
                "--url-prefix",
                "/v1",
            ),
            *("--no-model-warmup", "--host", "127.0.0.1", "--port", str(port)),
            *("--log-level", "warning"),
        ],
        {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            "DO_NOT_TRACK": "1",
        },
        "/health",
        "/v1/embeddings",
        {"model": "clip", "input": [TEXT], "encoding_format": "base64"},
        lambda items: {
            "model": "clip",
            "modality": "image",
            "encoding_format": "base64",
            "input": [uri(item) for item in items],
        },
    )


def make_models(folder: Path, environment: Path) -> None:
    """One random ViT-B/32 as each of them reads it; `environment` is Infinity's."""
    import open_clip
    import torch

    from clipserve import checkpoint
    from clipserve.model import create

    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = create("ViT-B-32")
    checkpoint.save(model, folder / "clipserve", name="random")
    torch.save(model.network.state_dict(), folder / "open_clip.pt")
    script = Path(__file__).with_name("service_transformers.py")
    merges = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    subprocess.run(
        [
            *(environment / "bin/python", script),
            *(folder / "open_clip.pt", folder / "transformers", merges),
        ],
        check=True,
    )
    (folder / "made").touch()


def versions(environment: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of packages in another environment."""
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [environment / "bin/python", "-c", code, *packages], capture_output=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
