"""Hostile requests beside good ones against a real `clipserve serve`, for up to ten minutes.

    python -m benchmarks.poison [--model DIR] [--hostile 5000] [--good 500] [--out FILE.json]

Every hostile request must get its answer (tests/poison.py says which), every good one the vectors
that the model gives in this process. Beside both /health/ready is asked twice a second: it must be
true exactly while the service serves, from the end of loading to the signal that ends it. What the
process holds is read from /proc: at the start, after a first round, and at its peak. Exit code 1
and a list of what was wrong, if anything was.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import clipserve
from benchmarks.embedding import processor
from clipserve import checkpoint
from clipserve.model import create
from tests.poison import Hostile, hostile_requests, picture_bytes, problem

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SETTINGS = {"CLIPSERVE_BODY_TIMEOUT_S": "10", "OMP_NUM_THREADS": "1"}
TEXTS = ["a red shoe", "two dogs on a beach", "x", "a long walk " * 30]
LEAST_COSINE = 0.999


@dataclass
class Seen:
    """What happened, from all threads."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    hostile: int = 0
    good: int = 0
    busy: int = 0
    ready: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)


@dataclass
class Service:
    """The process, and where it listens."""

    process: "subprocess.Popen[bytes]"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory_mb(self, name: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
        return round(int(line.split()[1]) / 1024, 1)

    def is_ready(self) -> int:
        """The status of /health/ready; 0 if nobody answers."""
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=30).status_code
        except httpx.TransportError:
            return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; a tiny one if left out")
    parser.add_argument("--hostile", type=int, default=5000)
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/poison.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or _make_model(Path(folder))
        report = run(model, given.hostile, given.good, given.seconds, Path(folder) / "log.txt")
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if report["problems"] else 0)


def run(model: Path, hostile: int, good: int, seconds: float, log: Path) -> dict[str, Any]:
    """Start, attack, stop; the report."""
    seen = Seen()
    expected = _expected(model)
    with _started(model, log, seen) as service:
        start_mb = service.memory_mb()
        begun = time.monotonic()
        deadline = begun + seconds
        _all(service, seen, expected, len(hostile_requests()), 20, deadline)  # every row once
        after_first_mb = service.memory_mb()
        _all(service, seen, expected, hostile - seen.hostile, good - seen.good, deadline)
        took = time.monotonic() - begun
        _check(seen, service.is_ready() == 200, "not ready when all was over")
        end_mb, peak_mb = service.memory_mb(), service.memory_mb("VmHWM")
        _stop(service, seen)
    tracebacks = log.read_text().count("Traceback")
    return {
        "date": date.today().isoformat(),
        "machine": processor(),
        "model": model.name,
        "hostile_requests": seen.hostile,
        "good_requests": seen.good,
        "good_answered_correctly": seen.good - sum("good" in text for text in seen.problems),
        "good_sent_again_after_429": seen.busy,
        "seconds": round(took, 1),
        "hostile_statuses": {str(status): n for status, n in sorted(seen.statuses.items())},
        "ready": dict(seen.ready),
        "rss_mb": {
            "start": start_mb,
            "after the first round": after_first_mb,
            "end": end_mb,
            "peak": peak_mb,
        },
        "tracebacks_in_the_log": tracebacks,
        "problems": seen.problems[:20],
    }


def _all(
    service: Service, seen: Seen, expected: "list[Good]", hostile: int, good: int, deadline: float
) -> None:
    """Eight hostile clients, four good ones, and a probe, at once."""
    rows = _shuffled(hostile)
    over = threading.Event()
    probe = threading.Thread(target=_probe, args=[service, seen, over])
    probe.start()
    with ThreadPoolExecutor(12) as pool:
        done = [pool.submit(_attack, service, seen, rows[i::8], deadline) for i in range(8)]
        shares = [range(i, good, 4) for i in range(4)]
        done += [pool.submit(_use, service, seen, expected, s, deadline) for s in shares]
        for one in done:
            one.result()
    over.set()
    probe.join()


def _shuffled(count: int) -> list[Hostile | None]:
    """Rows in an order of their own, all as often; None is a connection that misbehaves."""
    rows: list[Hostile | None] = [*hostile_requests(), *[None] * 20]
    generator = random.Random(0)
    found: list[Hostile | None] = []
    while len(found) < count:
        generator.shuffle(rows)
        found += rows
    return found[:count]


def _attack(service: Service, seen: Seen, rows: list[Hostile | None], deadline: float) -> None:
    client = httpx.Client(base_url=service.url, timeout=60)
    for number, row in enumerate(rows):
        if time.monotonic() > deadline:
            break
        if row is None:
            _misbehave(service.port, _MISBEHAVIOURS[number % len(_MISBEHAVIOURS)])
        else:
            _send(client, seen, row)
        with seen.lock:
            seen.hostile += 1
    client.close()


def _send(client: httpx.Client, seen: Seen, row: Hostile) -> None:
    try:
        answer = client.request(row.method, row.path, content=row.body, headers=row.headers)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # a body that is refused may be cut off before its answer is read
    except httpx.TransportError as error:
        seen.wrong(f"{row.name}: {type(error).__name__}")
        return
    with seen.lock:
        seen.statuses[answer.status_code] += 1
    # A busy service may refuse anything; h11 refuses some headers before we see them.
    if answer.status_code == 429 or answer.text == "Invalid HTTP request received.":
        return
    if wrong := problem(row, answer.status_code, answer.content):
        seen.wrong(wrong)


_HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
_MISBEHAVIOURS = (
    b"",
    b"GET / HT",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    _HEAD,
    _HEAD + b"Content-Length: 1000\r\n\r\n{",
    _HEAD + b"Content-Length: -5\r\n\r\n{}",
    _HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    _HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    _HEAD + b'Content-Length: 20\r\n\r\n{"input": "left"   }',
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
)


def _misbehave(port: int, data: bytes) -> None:
    """Say something, and leave without reading; now and then stay for a while."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as peer:
        peer.sendall(data)
        if len(data) < 50:
            time.sleep(0.2)


@dataclass(frozen=True)
class Good:
    """A request of a good client, and the vectors it must get."""

    body: dict[str, Any]
    vectors: np.ndarray


def _use(
    service: Service, seen: Seen, expected: list[Good], numbers: range, deadline: float
) -> None:
    client = httpx.Client(base_url=service.url, timeout=120)
    for number in numbers:
        if time.monotonic() > deadline:
            break
        good = expected[number % len(expected)]
        while (answer := client.post("/v1/embeddings", json=good.body)).status_code == 429:
            seen.busy += 1
            time.sleep(float(answer.headers["retry-after"]))
        _compare(seen, good, answer)
    client.close()


def _compare(seen: Seen, good: Good, answer: httpx.Response) -> None:
    with seen.lock:
        seen.good += 1
    if answer.status_code != 200:
        seen.wrong(f"good request: status {answer.status_code}: {answer.text[:200]}")
        return
    found = np.array([item["embedding"] for item in answer.json()["data"]])
    if (cosines := (found * good.vectors).sum(axis=1)).min() < LEAST_COSINE:
        seen.wrong(f"good request: cosine {cosines.min():.6f}")


def _probe(service: Service, seen: Seen, over: threading.Event) -> None:
    while not over.wait(0.5):
        status = service.is_ready()
        seen.ready[f"while serving: {status}"] += 1
        _check(seen, status == 200, f"ready said {status} while all was served")


def _expected(folder: Path) -> list[Good]:
    model = clipserve.load(folder, device="cpu", dtype="fp32")
    pictures = [picture_bytes("JPEG", (640, 480)), picture_bytes(size=(33, 77))]
    encoded = [{"image": base64.b64encode(data).decode()} for data in pictures]
    texts = model.embed_texts(TEXTS)
    images = model.embed_images(pictures)
    return [
        Good({"input": TEXTS}, texts),
        Good({"input": encoded}, images),
        Good({"input": [TEXTS[0], encoded[0]]}, np.stack([texts[0], images[0]])),
    ]


@contextlib.contextmanager
def _started(model: Path, log: Path, seen: Seen) -> Iterator[Service]:
    """The service, ready; before that it must say that it is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from clipserve.cli import main; main()", "serve", str(model)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=os.environ | SETTINGS, stderr=output
        )
    service = Service(process, port)
    try:
        while (status := service.is_ready()) != 200:
            seen.ready[f"while loading: {status}"] += 1
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        yield service
    finally:
        process.kill()
        process.wait()


def _stop(service: Service, seen: Seen) -> None:
    """SIGTERM beside a request that is being sent: not ready at once, answered, over in time."""
    answers: list[int] = []
    begun = threading.Event()
    headers = {"Content-Type": "application/json"}

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            answer = client.post("/v1/embeddings", content=_slow_body(begun), headers=headers)
        answers.append(answer.status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    begun.wait()
    time.sleep(0.5)
    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    status = service.is_ready()
    seen.ready[f"while draining: {status}"] += 1
    _check(seen, status == 503, f"ready said {status} after the signal")
    asking.join()
    _check(seen, answers == [200], f"a good request begun before the signal got {answers}")
    code = service.process.wait(timeout=30)
    _check(seen, code == 0, f"the process ended with {code}")


def _slow_body(begun: threading.Event) -> Iterator[bytes]:
    yield b'{"input": '
    begun.set()
    time.sleep(1.5)
    yield b'"a red shoe"}'


def _check(seen: Seen, holds: bool, text: str) -> None:
    if not holds:
        seen.wrong(text)


def _make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "tiny"
    checkpoint.save(create(TINY).eval(), path, name="tiny", objective=("contrastive",))
    return path


if __name__ == "__main__":
    main()
