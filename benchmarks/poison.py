"""Hostile requests beside good ones against a real `clipserve serve`, for up to ten minutes.

    python -m benchmarks.poison [--model DIR] [--hostile 5000] [--good 500] [--out FILE.json]

Every hostile request must get its answer (tests/poison.py says which), every good one what was
computed in this process before: the model's vectors and probabilities, the best of the items of a
small collection. Nothing is answered from a cache.
Beside both /health/ready is asked twice a second: it must be true exactly while the service serves,
from the end of loading to the signal that ends it. What the process holds is read from /proc and
bounded: BOUNDS_MB. Exit code 1 and a list of what was wrong, if anything was. Start at `run`.
"""

import argparse
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import clipserve
from benchmarks.embedding import processor
from benchmarks.poison_clients import (
    MISBEHAVIOURS,
    Good,
    Rows,
    Seen,
    Service,
    attack,
    probe,
    problem_of_hits,
    problem_of_probabilities,
    problem_of_vectors,
    shuffled,
    use,
)
from benchmarks.service_peers import free_port
from clipserve import checkpoint
from clipserve.model import Model, create
from index.collection import Collection, Item
from tests.poison import Hostile, hostile_requests, picture_bytes

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SETTINGS = {
    "CLIPSERVE_BODY_TIMEOUT_S": "10",
    "CLIPSERVE_TEXT_CACHE_BYTES": "0",  # or most good requests would meet a cache alone
    "CLIPSERVE_IMAGE_CACHE_BYTES": "0",
    "CLIPSERVE_MAX_CACHED_LABELS": "1",
    "OMP_NUM_THREADS": "1",
}
TEXTS = ["a red shoe", "two dogs on a beach", "x", "a long walk " * 30]
LABELS = ["a shoe", "a dog", "a beach", "something else"]
TEMPLATES = ["{}", "a photo of a {}."]
NUM_ITEMS, K = 50, 5
BOUNDS_MB = {"peak over start": 1536, "end over half way": 256}
"""the first is what pictures may take while they are decoded, 1 GB, and the bodies that may be in
flight (CLIPSERVE_MAX_INFLIGHT_BYTES); the second what malloc may keep in pieces, which grows for a
minute and then no more"""
READY_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory; a tiny one if left out")
    parser.add_argument("--hostile", type=int, default=5000, help="at least every row once")
    parser.add_argument("--good", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/poison.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or _make_model(Path(folder))
        report = run(model, given.hostile, given.good, given.seconds, Path(folder))
    text = json.dumps(report, indent=2) + "\n"
    given.out.write_text(text)
    sys.stdout.write(text)
    sys.exit(1 if report["problems"] else 0)


def run(path: Path, hostile: int, good: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Start, attack, stop; the report."""
    seen, log = Seen(), folder / "log.txt"
    model = clipserve.load(path, device="cpu", dtype="fp32")
    vectors = _item_vectors(model)
    expected = good_requests(model, vectors)
    collection = _make_collection(model, vectors, folder / "toys")
    rows: Rows = [*hostile_requests(), *MISBEHAVIOURS, *MISBEHAVIOURS]
    hostile = max(hostile, len(rows))
    with _started(path, collection, log, seen) as service:
        memory_mb = {"start": service.memory_mb()}
        begun = time.monotonic()
        deadline = begun + seconds
        half, good_half = max(len(rows), hostile // 2), good // 2
        _all(service, seen, expected, shuffled(rows, half), good_half, deadline)
        memory_mb["half way"] = service.memory_mb()
        rest = shuffled(rows, hostile - half)
        _all(service, seen, expected, rest, good - good_half, deadline)
        took = time.monotonic() - begun
        seen.check(service.is_ready() == 200, "not ready when all was over")
        memory_mb |= {"end": service.memory_mb(), "peak": service.memory_mb("VmHWM")}
        _stop(service, seen)
    report = {
        "date": date.today().isoformat(),
        "machine": processor(),
        "model": path.name,
        "hostile_requests": seen.hostile,
        "hostile_cut_off": dict(sorted(seen.cut_off.items())),
        "hostile_answered_busy": seen.hostile_busy,
        "good_requests": seen.good.total(),
        "good_requests_by_path": dict(sorted(seen.good.items())),
        "good_answered_correctly": seen.correct,
        "good_sent_again_after_429": seen.good_busy,
        "seconds": round(took, 1),
        "hostile_statuses": {str(status): n for status, n in sorted(seen.statuses.items())},
        "ready": dict(seen.ready),
        "rss_mb": memory_mb,
        "bounds_mb": BOUNDS_MB,
        "tracebacks_in_the_log": log.read_text().count("Traceback"),
    }
    unanswered = {row.name for row in rows if isinstance(row, Hostile)} - seen.answered
    found = [*seen.problems, *(f"{name}: never answered" for name in sorted(unanswered))]
    return report | {"problems": find_problems(report, hostile, good) + found[:40]}


def good_requests(model: Model, items: np.ndarray) -> list[Good]:
    """Embeddings, classifications and searches by turns, with their right answers.

    items (N, E): the collection's, whose ids are their places.
    """
    pictures = [picture_bytes("JPEG", (640, 480)), picture_bytes(size=(33, 77))]
    encoded = [base64.b64encode(data).decode() for data in pictures]
    images = [{"image": picture} for picture in encoded]
    of_texts, of_images = model.embed_texts(TEXTS), model.embed_images(pictures)
    head = model.zero_shot(LABELS, TEMPLATES)

    def embedding(input: list[Any], right: np.ndarray) -> Good:
        return Good("/v1/embeddings", {"input": input}, partial(problem_of_vectors, right))

    def classification(kind: str, given: list[str], vectors: np.ndarray) -> Good:
        body = {kind: given, "labels": LABELS, "templates": TEMPLATES}
        right = head.probabilities(vectors)
        return Good("/v1/classify", body, partial(problem_of_probabilities, LABELS, right))

    def search(batch: list[Any], queries: np.ndarray) -> Good:
        right = partial(problem_of_hits, queries @ items.T, K)
        return Good("/v1/search", {"batch": batch, "k": K}, right)

    return [
        embedding(TEXTS, of_texts),
        classification("images", encoded, of_images),
        search([{"text": text} for text in TEXTS], of_texts),
        embedding(images, of_images),
        classification("texts", TEXTS, of_texts),
        search([*images, {"vector": items[-1].tolist()}], np.stack([*of_images, items[-1]])),
        embedding([TEXTS[0], images[0]], np.stack([of_texts[0], of_images[0]])),
    ]


def find_problems(report: dict[str, Any], hostile: int, good: int) -> list[str]:
    """What the numbers of a report say against it, where so many requests were asked for."""
    found = []
    sent, told, correct = (
        report[name] for name in ("hostile_requests", "good_requests", "good_answered_correctly")
    )
    if sent < hostile or told < good:
        found.append(f"only {sent} of {hostile} hostile and {told} of {good} good ones in time")
    if correct < told:
        found.append(f"{told - correct} good requests were not answered correctly")
    rss = report["rss_mb"]
    grown = {
        "peak over start": rss["peak"] - rss["start"],
        "end over half way": rss["end"] - rss["half way"],
    }
    for name, bound in report["bounds_mb"].items():
        if grown[name] > bound:
            found.append(f"memory: {name} is {grown[name]:.0f} MB, over {bound}")
    if count := report["tracebacks_in_the_log"]:
        found.append(f"{count} tracebacks in the log")
    return found


def _all(
    service: Service, seen: Seen, expected: Sequence[Good], rows: Rows, good: int, deadline: float
) -> None:
    """Eight hostile clients, four good ones, and a probe, at once."""
    over = threading.Event()
    probing = threading.Thread(target=probe, args=[service, seen, over])
    probing.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            done = [pool.submit(attack, service, seen, rows[i::8], deadline) for i in range(8)]
            shares = [range(i, good, 4) for i in range(4)]
            done += [pool.submit(use, service, seen, expected, s, deadline) for s in shares]
            for one in done:
                one.result()
    finally:
        over.set()
        probing.join()


def _item_vectors(model: Model) -> np.ndarray:
    """(N, E): those of the texts, and random ones, for an untrained model's are much alike."""
    drawn = np.random.default_rng(0).standard_normal((NUM_ITEMS - len(TEXTS), model.embed_dim))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return np.concatenate([model.embed_texts(TEXTS), drawn.astype(np.float32)])


def _make_collection(model: Model, vectors: np.ndarray, path: Path) -> Path:
    with Collection.create(
        path,
        fingerprint=model.info.fingerprint or "",
        model_name=model.info.name,
        embed_dim=model.embed_dim,
    ) as collection:
        items = [Item(str(i), f"item {i}", "", {"n": i}) for i in range(len(vectors))]
        collection.upsert(items, vectors)
    return path


@contextlib.contextmanager
def _started(model: Path, collection: Path, log: Path, seen: Seen) -> Iterator[Service]:
    """The service, ready; before that it must say that it is not."""
    port = free_port()
    command = [sys.executable, "-m", "clipserve", "serve", str(model)]
    command += ["--collection", str(collection), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | SETTINGS, stderr=output)
    service = Service(process, port)
    last = time.monotonic() + READY_S
    try:
        while (status := service.is_ready()) != 200:
            seen.ready[f"while loading: {status}"] += 1
            if process.poll() is not None or time.monotonic() > last:
                raise SystemExit(f"the service did not become ready:\n{log.read_text()}")
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
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(base_url=service.url, timeout=30) as client,
        ):
            answer = client.post("/v1/embeddings", content=_slow_body(begun), headers=headers)
            answers.append(answer.status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    begun.wait(30)
    time.sleep(0.5)
    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    status = service.is_ready()
    seen.ready[f"while draining: {status}"] += 1
    seen.check(status == 503, f"ready said {status} after the signal")
    asking.join()
    seen.check(answers == [200], f"a good request begun before the signal got {answers}")
    try:
        code = service.process.wait(timeout=30)
        seen.check(code == 0, f"the process ended with {code}")
    except subprocess.TimeoutExpired:
        seen.wrong("the process was there 30 s after the signal")


def _slow_body(begun: threading.Event) -> Iterator[bytes]:
    yield b'{"input": '
    begun.set()
    time.sleep(1.5)
    yield b'"a red shoe"}'


def _make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "tiny"
    checkpoint.save(create(TINY).eval(), path, name="tiny", objective=("contrastive",))
    return path


if __name__ == "__main__":
    main()
