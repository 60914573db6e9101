"""Four times what `clipserve serve` can do, and reloads while it serves.

    python -m benchmarks.overload [--seconds 60] [--reloads 20] [--out FILE.json]

ViT-B/32, random weights; each request is one text, or one JPEG of 640x480, never seen before. The
capacity is what 32 clients get that ask again when they are answered. Then requests come at four
times that rate, whatever becomes of them: goodput is what is answered with 200, the rest must be
429. Right after, single requests show whether it recovered. Last, two checkpoints take each other's
place again and again while clients ask: no request may fail, and each answer must hold the vectors
of the model whose fingerprint it names. Exit code 1 if something was not so: `find_problems`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import clipserve
from benchmarks.embedding import pictures, processor
from benchmarks.service import FOLDER
from benchmarks.service_load import Load, Target, closed_loop, open_loop
from benchmarks.service_peers import TEXT, make_checkpoint, ours, running

FACTOR = 4
LEAST_GOODPUT = 0.9
MOST_SLOWER = 2.0
"""latency of single requests right after, over that before"""
CLIENTS = 32
CLIENTS_OF_RELOADS = 8
TEXTS = [TEXT.replace("@@", str(i)) for i in range(32)]
LEAST_COSINE = 0.999
MODELS = FOLDER / "models"


def main() -> None:
    arguments = read_arguments()
    paths = [
        make_checkpoint(MODELS / name, seed).resolve()
        for seed, name in enumerate(("clipserve", "clipserve-other"))
    ]
    expected = embed_texts(paths)
    peer = ours(
        {
            "CLIPSERVE_MODEL_ROOTS": str(MODELS.resolve()),
            "CLIPSERVE_TEXT_CACHE_BYTES": "0",  # each answer is to come from a model
        }
    )
    with running(peer, MODELS, arguments.threads) as (port, ready_s):
        work = {"1 text": peer.target(port, [])}
        work["1 picture"] = peer.target(port, pictures(1))
        closed_loop(work["1 picture"], 8, arguments.seconds / 10)  # warm
        overloads = {name: overload(target, arguments.seconds) for name, target in work.items()}
        reloads = asyncio.run(reload_under_load(port, paths, expected, arguments.reloads))
    report = {
        "benchmark": "overload",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "seconds": arguments.seconds,
        "ready_s": round(ready_s, 2),
        "overload": overloads,
        "reloads": reloads,
    }
    problems = find_problems(overloads, reloads)
    text = json.dumps(report | {"problems": problems}, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    sys.exit(1 if problems else 0)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the report here too")
    return parser.parse_args()


def embed_texts(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """By fingerprint what each checkpoint says of TEXTS, in this process."""
    found = {}
    for path in paths:
        model = clipserve.load(path)
        found[model.info.fingerprint or ""] = model.embed_texts(TEXTS)
    return found


def overload(target: Target, seconds: float) -> dict[str, Any]:
    """What a target answers at four times its capacity, and right after."""
    alone = closed_loop(target, 1, 2.0)
    before = _rate(closed_loop(target, CLIENTS, seconds / 4))
    load = open_loop(target, FACTOR * before, seconds)
    recovered = closed_loop(target, 1, 2.0)
    after = _rate(closed_loop(target, CLIENTS, seconds / 4))
    capacity = statistics.fmean([before, after])  # of a machine that may have others
    return {
        "capacity_per_s": round(capacity, 1),
        "goodput_per_s": round(_rate(load), 1),
        "goodput_share": round(_rate(load) / capacity, 3),
        "answered": len(load.latencies_s),
        "refused": load.refused,
        "failed": load.failed,
        "p50_ms": _p50_ms(load),
        "drain_s": round(load.drain_s, 1),
        "p50_ms_alone_before": _p50_ms(alone),
        "p50_ms_alone_right_after": _p50_ms(recovered),
        "refused_or_failed_right_after": recovered.refused + recovered.failed,
    }


@dataclass
class Replies:
    """What clients got while models took each other's place."""

    fingerprints: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def note(self, text: int, answer: httpx.Response, expected: Mapping[str, np.ndarray]) -> None:
        if answer.status_code != 200:
            self.problems.append(f"status {answer.status_code}: {answer.text[:200]}")
            return
        content = answer.json()
        maker = content["fingerprint"]
        self.fingerprints[maker] += 1
        if maker not in expected:
            self.problems.append(f"an answer of {maker}, which was not served")
            return
        cosine = float(np.dot(content["data"][0]["embedding"], expected[maker][text]))
        if not cosine >= LEAST_COSINE:
            self.problems.append(f"an answer named {maker[:12]}: cosine {cosine:.4f} to its vector")


async def reload_under_load(
    port: int, paths: Sequence[Path], expected: Mapping[str, np.ndarray], count: int
) -> dict[str, Any]:
    """What clients get while the two checkpoints are loaded in turn, `count` times."""
    replies, done = Replies(), asyncio.Event()
    address = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:

        async def ask(number: int) -> None:
            while not done.is_set():
                number = (number + 1) % len(TEXTS)
                try:
                    answer = await client.post("/v1/embeddings", json={"input": TEXTS[number]})
                    replies.note(number, answer, expected)
                except httpx.TransportError as error:
                    replies.problems.append(type(error).__name__)

        asking = [asyncio.create_task(ask(4 * i)) for i in range(CLIENTS_OF_RELOADS)]
        try:
            name = (await client.get("/v1/models")).json()["data"][0]["id"]
            for turn in range(count):
                body = {"path": str(paths[(turn + 1) % len(paths)])}
                answer = await client.post(f"/v1/models/{name}:reload", json=body)
                if answer.status_code != 200:
                    replies.problems.append(f"reload: {answer.status_code}: {answer.text[:200]}")
        finally:
            done.set()
            await asyncio.gather(*asking)
    return {
        "reloads": count,
        "answered": replies.fingerprints.total(),
        "by_fingerprint": dict(replies.fingerprints),
        "checkpoints": len(expected),
        "least_cosine": LEAST_COSINE,
        "num_problems": len(replies.problems),
        "problems": replies.problems[:10],
    }


def find_problems(overloads: dict[str, dict[str, Any]], reloads: dict[str, Any]) -> list[str]:
    """What was not as it should be: goodput, answers, recovery, reloads."""
    found = []
    for name, one in overloads.items():
        if one["goodput_share"] < LEAST_GOODPUT:
            found.append(f"{name}: goodput {one['goodput_share']}, under {LEAST_GOODPUT}")
        if not one["refused"]:
            found.append(f"{name}: nothing was refused, so it was no overload")
        if one["failed"]:
            found.append(f"{name}: {one['failed']} answers were neither 200 nor 429")
        before, after = one["p50_ms_alone_before"], one["p50_ms_alone_right_after"]
        if one["refused_or_failed_right_after"] or not after <= MOST_SLOWER * before:
            found.append(f"{name}: not recovered right after: {after} ms, {before} before")
    if reloads["num_problems"]:
        found.append(f"reloads: {reloads['num_problems']} problems: {reloads['problems'][0]}")
    if len(reloads["by_fingerprint"]) < reloads["checkpoints"]:
        found.append("reloads: not every checkpoint answered")
    return found


def _rate(load: Load) -> float:
    return len(load.latencies_s) / load.seconds


def _p50_ms(load: Load) -> float:
    return round(1000 * statistics.median(load.latencies_s or [float("nan")]), 1)


if __name__ == "__main__":
    main()
