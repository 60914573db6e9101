"""The clients of poison.py: hostile ones, good ones and a probe; what they saw is in `Seen`."""

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.poison import Hostile, problem

Rows = list[Hostile | bytes]
"""bytes are all that a connection says"""

LEAST_COSINE = 0.999
MOST_OFF = 0.02
"""of a score or a probability, for the service may compute in another precision"""
MAY_BE_CUT_OFF = 2**20
"""bytes of a body over which a refusal may be lost, for the service does not read on"""
BUSY = 429
_HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MISBEHAVIOURS: tuple[bytes, ...] = (
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


@dataclass
class Seen:
    """What happened, from all threads."""

    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    hostile: int = 0
    hostile_busy: int = 0
    answered: set[str] = field(default_factory=set)
    """hostile rows that got an answer at least once, and not for being one too many"""
    cut_off: Counter[str] = field(default_factory=Counter)
    good: Counter[str] = field(default_factory=Counter)
    """by path"""
    correct: int = 0
    good_busy: int = 0
    ready: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)

    def check(self, holds: bool, text: str) -> None:
        if not holds:
            self.wrong(text)


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


@dataclass(frozen=True)
class Good:
    """A request of a good client, and what must be in its answer."""

    path: str
    body: dict[str, Any]
    problem: Callable[[Any], str | None]
    """what is wrong with an answer's JSON, None if nothing is"""


def shuffled(rows: Rows, count: int) -> Rows:
    """So many rows in an order of their own, all as often."""
    generator = random.Random(0)
    found: Rows = []
    while len(found) < count:
        found += generator.sample(rows, len(rows))
    return found[:count]


def attack(service: Service, seen: Seen, rows: Rows, deadline: float) -> None:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        for row in rows:
            if time.monotonic() > deadline:
                break
            if isinstance(row, Hostile):
                send(client, seen, row)
            else:
                _misbehave(service.port, row)
            with seen.lock:
                seen.hostile += 1


def use(
    service: Service, seen: Seen, expected: Sequence[Good], numbers: range, deadline: float
) -> None:
    """A good client: it comes again when it is told to, and compares what it gets."""
    with httpx.Client(base_url=service.url, timeout=120) as client:
        for number in numbers:
            if time.monotonic() > deadline:
                break
            good = expected[number % len(expected)]
            try:
                answer = insist(client, seen, good, deadline)
                correct = is_correct(seen, good, answer)
            except httpx.TransportError as error:
                seen.wrong(f"good request to {good.path}: {type(error).__name__}")
                correct = False
            with seen.lock:
                seen.good[good.path] += 1
                seen.correct += correct


def probe(service: Service, seen: Seen, over: threading.Event) -> None:
    while not over.wait(0.5):
        status = service.is_ready()
        seen.ready[f"while serving: {status}"] += 1
        seen.check(status == 200, f"ready said {status} while all was served")


def send(client: httpx.Client, seen: Seen, row: Hostile) -> None:
    try:
        answer = client.request(row.method, row.path, content=row.body, headers=row.headers)
    except httpx.TransportError as error:
        if len(row.body) < MAY_BE_CUT_OFF or isinstance(error, httpx.TimeoutException):
            seen.wrong(f"{row.name}: {type(error).__name__}")
        else:
            with seen.lock:
                seen.cut_off[row.name] += 1
        return
    with seen.lock:
        seen.statuses[answer.status_code] += 1
        # A busy service may refuse anything.
        if answer.status_code == BUSY and BUSY not in row.statuses:
            seen.hostile_busy += 1
            return
        seen.answered.add(row.name)
    if answer.text == "Invalid HTTP request received.":  # not even parsed
        return
    if wrong := problem(row, answer.status_code, answer.content):
        seen.wrong(wrong)


def _misbehave(port: int, data: bytes) -> None:
    """Say something, and leave without reading; now and then stay for a while."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as peer:
        peer.sendall(data)
        if len(data) < 50:
            time.sleep(0.2)


def insist(client: httpx.Client, seen: Seen, good: Good, deadline: float) -> httpx.Response:
    """The answer to a good request, sent again while the service is busy."""
    while True:
        answer = client.post(good.path, json=good.body)
        wait_s = float(answer.headers.get("retry-after", 1))
        if answer.status_code != BUSY or time.monotonic() + wait_s > deadline:
            return answer
        with seen.lock:
            seen.good_busy += 1
        time.sleep(wait_s)


def is_correct(seen: Seen, good: Good, answer: httpx.Response) -> bool:
    if answer.status_code == 200:
        problem = good.problem(answer.json())
    else:
        problem = f"status {answer.status_code}: {answer.text[:200]}"
    if problem is not None:
        seen.wrong(f"good request to {good.path}: {problem}")
    return problem is None


def problem_of_vectors(right: np.ndarray, answer: Any) -> str | None:
    """Unit vectors (N, E) are held against those of an answer."""
    found = np.array([item["embedding"] for item in answer["data"]])
    if found.shape != right.shape:
        return f"vectors {found.shape} in the place of {right.shape}"
    cosine = float((found * right).sum(axis=1).min())
    return None if cosine >= LEAST_COSINE else f"cosine {cosine:.6f}"


def problem_of_probabilities(labels: Sequence[str], right: np.ndarray, answer: Any) -> str | None:
    """Probabilities (N, C) of so many labels, each with its name and in its place."""
    found = np.full(right.shape, np.nan)
    if len(answer["results"]) != len(right):
        return f"{len(answer['results'])} results in the place of {len(right)}"
    for row, result in zip(found, answer["results"], strict=True):
        for one in result.get("predictions", []):
            if one["label"] == labels[one["label_index"]]:
                row[one["label_index"]] = one["probability"]
    off = float(np.abs(found - right).max())
    return None if off <= MOST_OFF else f"probabilities are off by {off:.6f}"


def problem_of_hits(right: np.ndarray, k: int, answer: Any) -> str | None:
    """The scores (Q, N) that items, whose ids are their places, have for the queries of a batch:
    the k best of each, best first, with their scores and what else there is of them."""
    if len(answer["results"]) != len(right):
        return f"{len(answer['results'])} results in the place of {len(right)}"
    for scores, result in zip(right, answer["results"], strict=True):
        hits = result["hits"]
        places = [int(hit["id"]) for hit in hits]
        found = np.array([hit["score"] for hit in hits])
        if len(set(places)) != k or len(hits) != k or (np.diff(found) > 0).any():
            return f"not the {k} best items in their order: {places}"
        if any(hit["metadata"] != {"n": place} for hit, place in zip(hits, places, strict=True)):
            return f"metadata of other items than {places}"
        off = float(np.abs(found - scores[places]).max())
        passed_over = float(np.sort(scores)[-k] - scores[places].min())
        if not max(off, passed_over) <= MOST_OFF:
            return f"scores are off by {off:.6f}, a hit passed over is better by {passed_over:.6f}"
    return None
