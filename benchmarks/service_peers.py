"""The services that the benchmark of ours compares: how each is started and asked.

A peer has an environment of its own (service_environments.py). All serve a ViT-B/32 with the same
random weights: ours from a model directory, Infinity from transformers' CLIPModel of them,
clip-server from open_clip's state.
"""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.service_load import Body, Target, numbered, pictures

TEXT = "a photo of a small red bicycle leaning on a wall, number @@"
_READY_S = 180.0


@dataclass(frozen=True)
class Peer:
    """A service: `command` starts it on a folder of models and a port."""

    name: str
    command: Callable[[Path, int], Sequence[str]]
    environment: dict[str, str]
    health: str
    path: str
    text: object
    """JSON of a request for one text"""
    wrap: Callable[[list[str]], object]
    """JSON of a request for pictures, given their base64"""
    sign: bytes = b""
    """what `health` answers with once it is ready, beside 200"""

    def target(self, port: int, jpegs: Sequence[bytes]) -> Target:
        """Requests for the pictures, or for one text where there are none."""
        body: Body = numbered(self.text, "@@") if not jpegs else pictures(list(jpegs), self.wrap)
        return Target("127.0.0.1", port, self.path, body, max(1, len(jpegs)))


@contextlib.contextmanager
def running(
    peer: Peer, model: Path, threads: int, device: str = "cpu"
) -> Iterator[tuple[int, float]]:
    """The port of a started service, and the seconds until it was ready."""
    port = free_port()
    environment = os.environ | peer.environment | on(device, threads)
    with (model.parent / f"{peer.name.replace(' ', '-')}.log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            peer.command(model, port),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, port, peer)
            yield port, time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # clip-server is several processes
            process.wait()


def on(device: str, threads: int) -> dict[str, str]:
    """The environment of a process that shall compute there: ours takes a GPU that it sees."""
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return hidden | {"OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", port: int, peer: Peer) -> None:
    name, url = peer.name, f"http://127.0.0.1:{port}{peer.health}"
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with code {process.returncode}; its log says why")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200 and peer.sign in answer.read():
                return
        time.sleep(0.05)
    raise SystemExit(f"{name} was not ready after {_READY_S:g} s")


def vectors(target: Target, numbers: Sequence[int]) -> np.ndarray:
    """(N, E) unit vectors: what the service answers to the requests of these numbers."""
    found: list[np.ndarray] = []
    headers = {"Content-Type": "application/json"}
    for number in numbers:
        url = f"http://{target.host}:{target.port}{target.path}"
        request = urllib.request.Request(url, target.body(number), headers)
        with urllib.request.urlopen(request, timeout=_READY_S) as answer:
            items = json.load(answer)["data"]
        found += [_vector(item["embedding"]) for item in items]
    stacked = np.stack(found)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def _vector(value: str | list[float]) -> np.ndarray:
    given = base64.b64decode(value) if isinstance(value, str) else np.array(value, "<f4").tobytes()
    return np.frombuffer(given, "<f4")


def uri(content: str) -> str:
    return f"data:image/jpeg;base64,{content}"


def ours(settings: dict[str, str] | None = None, name: str = "clipserve") -> Peer:
    return Peer(
        name,
        lambda model, port: [
            *(sys.executable, "-m", "clipserve", "serve", str(model / "clipserve")),
            *("--port", str(port)),
        ],
        settings or {},
        "/health/ready",
        "/v1/embeddings",
        {"input": [TEXT], "encoding_format": "base64"},
        lambda items: {
            "input": [uri(item) for item in items],
            "modality": "image",
            "encoding_format": "base64",
        },
    )


def infinity(environment: Path, dtype: str, device: str = "cpu") -> Peer:
    """In its fastest setting; no warm-up, for the benchmark warms all of them."""
    return Peer(
        f"infinity {dtype}",
        lambda model, port: [
            *(
                str(environment / "bin/infinity_emb"),
                "v2",
                "--model-id",
                str(model / "transformers"),
            ),
            *("--served-model-name", "clip", "--engine", "torch", "--device", device),
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


def clip_server(environment: Path, device: str = "cpu") -> Peer:
    return Peer(
        "clip-server",
        lambda model, port: [
            str(environment / "bin/python"),
            str(Path(__file__).with_name("service_clip_server.py")),
            *(str(model / "open_clip.pt"), str(port), device),
        ],
        {"NO_VERSION_CHECK": "1", "JINA_OPTOUT_TELEMETRY": "1"},
        "/dry_run",
        "/post",
        {"data": [{"text": TEXT}], "execEndpoint": "/"},
        lambda items: {
            "data": [{"blob": item} for item in items],
            "execEndpoint": "/",
            "parameters": {"drop_image_content": True},
        },
        sign=b'"code":0',
    )


def make_checkpoint(path: Path, seed: int = 0) -> Path:
    """A ViT-B/32 of random weights as a model directory, unless it is there."""
    import torch

    from clipserve import checkpoint
    from clipserve.model import create

    if not checkpoint.is_model_directory(path):
        torch.manual_seed(seed)
        checkpoint.save(create("ViT-B-32"), path, name="random")
    return path


def make_models(folder: Path, environment: Path) -> None:
    """One random ViT-B/32 as each of them reads it; `environment` is Infinity's."""
    import open_clip
    import torch

    from clipserve import checkpoint

    model = make_checkpoint(folder / "clipserve")
    if (folder / "made").exists():
        return
    state = checkpoint.load_for_training(model).network.state_dict()
    torch.save(state, folder / "open_clip.pt")
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
