"""What our service does a second beside Infinity, on the same weights.

    python -m benchmarks.service --install        # Infinity, in an environment of its own
    python -m benchmarks.service [--clients 1 8 32 64] [--rounds 3] [--seconds 6] [--only NAME ...]
        [--out FILE.json]

ViT-B/32, random weights. The services are up side by side and take turns; the load is closed-loop,
of one text, one JPEG of 640x480, or eight, each another than all before, base64 vectors back.
Beside it: the latency at 80 % of what 32 clients got out of ours, and what pictures and texts reach
in process, which is the limit of the service.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.embedding import pictures as make_pictures
from benchmarks.embedding import processor
from benchmarks.service_load import closed_loop, open_loop
from benchmarks.service_peers import (
    Peer,
    infinity,
    make_models,
    ours,
    running,
    versions,
)

FOLDER = Path("build/service")
INFINITY = ["infinity-emb[torch,server]==0.0.78", "aiohttp", "pillow"]
WORK = {"1 text": 0, "1 picture": 1, "8 pictures": 8}
"""pictures in each request"""
PACKAGES = ("torch", "fastapi", "uvicorn")


def main() -> None:
    arguments = read_arguments()
    if arguments.install:
        install(FOLDER / "infinity", INFINITY)
        return
    make_models(FOLDER / "models", FOLDER / "infinity")
    peers = [peer for peer in known() if not arguments.only or peer.name in arguments.only]
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        ready: dict[str, float] = {}
        for peer in peers:
            started = running(peer, FOLDER / "models", arguments.threads)
            ports[peer.name], ready[peer.name] = stack.enter_context(started)
        loads = measure(peers, ports, arguments)
        paced = at_eighty_percent(peers[0], ports, loads) if peers[0].name == "clipserve" else {}
    in_process = measure_in_process(arguments) if peers[0].name == "clipserve" else {}
    report = {
        "benchmark": "service",
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES}
        | versions(FOLDER / "infinity", ["infinity-emb", "transformers", "torch"]),
        "unit": "medians of rounds that take turns; items are texts or pictures",
        "rounds": arguments.rounds,
        "ready_s": {name: round(seconds, 1) for name, seconds in ready.items()},
        "loads": loads,
        "clipserve_at_80_percent_of_32_clients": paced,
        "in_process_items_per_s": in_process,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def known() -> list[Peer]:
    """Ours first; of the others those that are installed."""
    peers = [ours()]
    if (FOLDER / "infinity/bin/infinity_emb").exists():
        peers += [infinity(FOLDER / "infinity", dtype) for dtype in ("float32", "bfloat16")]
    return peers


def measure(
    peers: Sequence[Peer], ports: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """By work, number of clients and service: the median of each number over the rounds."""
    jpegs = make_pictures(8)
    found: dict[str, Any] = {}
    for work, count in WORK.items():
        targets = {peer.name: peer.target(ports[peer.name], jpegs[:count]) for peer in peers}
        for target in targets.values():
            closed_loop(target, 2, 1.0)  # first-time work
        for clients in arguments.clients:
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
            for _ in range(arguments.rounds):
                for name, target in targets.items():
                    load = closed_loop(target, clients, arguments.seconds)
                    rounds[name].append(load.summary(target.items))
            found[f"{work}, {clients} clients"] = row = {n: medians(r) for n, r in rounds.items()}
            tell(f"{work}, {clients} clients", row)
    return found


def at_eighty_percent(peer: Peer, ports: dict[str, int], loads: dict[str, Any]) -> dict[str, Any]:
    """Latency of ours at a steady rate of 80 % of its throughput, requests at random times."""
    jpegs = make_pictures(8)
    found = {}
    for work, count in WORK.items():
        capacity = loads.get(f"{work}, 32 clients", {}).get(peer.name, {}).get("items_per_s")
        if capacity:
            target = peer.target(ports[peer.name], jpegs[:count])
            rate = 0.8 * capacity / target.items
            found[work] = open_loop(target, rate, 20.0).summary(target.items)
            tell(f"{work}, 80 %", {peer.name: found[work]})
    return found


def measure_in_process(arguments: argparse.Namespace) -> dict[str, float]:
    """Items a second of `embed_images`, from JPEG bytes, and `embed_texts`, with no service."""
    command = [sys.executable, "-m", "benchmarks.service_in_process"]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(
        [*command, FOLDER / "models/clipserve", str(arguments.rounds)],
        capture_output=True,
        check=True,
        env=environment,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}


def tell(work: str, row: dict[str, dict[str, float]]) -> None:
    for name, numbers in row.items():
        told = "  ".join(f"{key} {value:g}" for key, value in numbers.items())
        sys.stdout.write(f"{work:24} {name:20} {told}\n")
    sys.stdout.flush()


def install(folder: Path, packages: Sequence[str]) -> None:
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", *packages], check=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install the peers, and end")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="services by name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/service.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
