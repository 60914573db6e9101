"""What our service does a second beside Infinity and clip-server, on the same weights.

    python -m benchmarks.service --install        # the peers, each in an environment of its own
    python -m benchmarks.service [--clients 1 8 32 64] [--rounds 3] [--seconds 6] [--only NAME ...]
        [--device cpu|cuda] [--out FILE.json]

ViT-B/32, random weights. The services are up side by side and take turns; the load is closed-loop,
of one text, one JPEG of 640x480, or eight, each another than all before, base64 vectors back.
What pictures and texts reach in process, which is the limit of the service, is measured in the same
turns. Beside it: the latency at 80 % of what 32 clients got out of ours. First the vectors of all
services are compared. Exit code 1 unless every mark of the table "ratios" is met
(service_ratios.py) and nothing failed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import service_environments as environments
from benchmarks.embedding import pictures as make_pictures
from benchmarks.embedding import processor
from benchmarks.service_in_process import InProcess
from benchmarks.service_load import Target, closed_loop, open_loop
from benchmarks.service_peers import (
    Peer,
    clip_server,
    infinity,
    make_models,
    on,
    ours,
    running,
    vectors,
)
from benchmarks.service_ratios import compare, find_problems, ratios
from clipserve.packed import multiplies_int8

FOLDER = Path("build/service")
INFINITY, CLIP_SERVER = FOLDER / "infinity", FOLDER / "clip-server"
WORK = {"1 text": 0, "1 picture": 1, "8 pictures": 8}
"""pictures in each request"""
LIMITS = {"1 text": ("texts",), "1 picture": ("pictures", "pictures, resized")}
"""what in process is their limit, once there are clients enough to fill a batch"""
MANY = 32
COMPARED = {
    "1 text": range(111_111_111_111, 999_999_999_999, 111_111_111_111),
    "8 pictures": [10**10],
}
"""numbers of requests whose vectors are compared: eight texts unlike each other, eight pictures"""
PACKAGES = ("torch", "fastapi", "uvicorn")


def main() -> None:
    arguments = read_arguments()
    if arguments.install:
        environments.install(INFINITY, CLIP_SERVER)
        return
    make_models(FOLDER / "models", INFINITY)
    peers = [
        peer
        for peer in known(arguments.device)
        if not arguments.only or peer.name in arguments.only
    ]
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        ready: dict[str, float] = {}
        for peer in peers:
            started = running(peer, FOLDER / "models", arguments.threads, arguments.device)
            ports[peer.name], ready[peer.name] = stack.enter_context(started)
        agreement = compare_vectors(peers, ports)
        environment = on(arguments.device, arguments.threads)
        alone = stack.enter_context(InProcess.running(FOLDER / "models/clipserve", environment))
        loads = measure(peers, ports, alone, arguments)
        paced = at_eighty_percent(peers[0], ports, loads) if peers[0].name == "clipserve" else {}
    report = {
        "benchmark": "service",
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "device": arguments.device,
        },
        "versions": installed_versions(),
        "unit": "medians of rounds that take turns; items are texts or pictures",
        "rounds": arguments.rounds,
        "ready_s": {name: round(seconds, 1) for name, seconds in ready.items()},
        "agreement": agreement,
        "ratios": ratios(loads),
        "loads": loads,
        "clipserve_at_80_percent_of_32_clients": paced,
    }
    problems = find_problems(report)
    arguments.out.write_text(json.dumps(report | {"problems": problems}, indent=2) + "\n")
    sys.stdout.write(json.dumps(report["ratios"], indent=2) + "\n" + "\n".join(problems) + "\n")
    sys.exit(1 if problems else 0)


def known(device: str) -> list[Peer]:
    """Ours first; of the others those that are installed. On a CPU that can, int8 too."""
    peers = [ours()]
    dtypes = ["float16", "bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    if device == "cpu" and multiplies_int8():
        peers.append(ours({"CLIPSERVE_DTYPE": "int8"}, "clipserve int8"))
        dtypes.append("int8")
    if environments.is_installed(INFINITY):
        peers += [infinity(INFINITY, dtype, device) for dtype in dtypes]
    if environments.is_installed(CLIP_SERVER):
        peers.append(clip_server(CLIP_SERVER, device))
    return peers


def installed_versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    for folder, packages in (
        (INFINITY, ["infinity-emb", "transformers", "torch"]),
        (CLIP_SERVER, ["clip-server", "jina", "torch"]),
    ):
        if environments.is_installed(folder):
            found[folder.name] = environments.versions(folder, packages)
    return found


def targets(work: str, peers: Sequence[Peer], ports: dict[str, int]) -> dict[str, Target]:
    """Where each service is asked for a kind of work."""
    jpegs = make_pictures(8)[: WORK[work]]
    return {peer.name: peer.target(ports[peer.name], jpegs) for peer in peers}


def compare_vectors(peers: Sequence[Peer], ports: dict[str, int]) -> dict[str, Any]:
    """By work and service: how like the first one's its vectors are."""
    found: dict[str, Any] = {}
    for work, numbers in COMPARED.items():
        own, *others = (
            (name, vectors(target, numbers)) for name, target in targets(work, peers, ports).items()
        )
        found[work] = {name: compare(own[1], theirs) for name, theirs in others}
    return found


def measure(
    peers: Sequence[Peer], ports: dict[str, int], alone: InProcess, arguments: argparse.Namespace
) -> dict[str, Any]:
    """By work, number of clients and service: the median of each number over the rounds."""
    found: dict[str, Any] = {}
    for work in WORK:
        asked = targets(work, peers, ports)
        for target in asked.values():
            closed_loop(target, 2, 1.0)  # first-time work
        for clients in arguments.clients:
            limits = LIMITS.get(work, ()) if clients >= MANY else ()
            names = [*asked, *(f"in process: {kind}" for kind in limits)]
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name, target in asked.items():
                    load = closed_loop(target, clients, arguments.seconds)
                    rounds[name].append(load.summary(target.items))
                for kind in limits:
                    rounds[f"in process: {kind}"].append({"items_per_s": alone.rate(kind)})
            found[f"{work}, {clients} clients"] = row = {n: medians(r) for n, r in rounds.items()}
            tell(f"{work}, {clients} clients", row)
    return found


def at_eighty_percent(peer: Peer, ports: dict[str, int], loads: dict[str, Any]) -> dict[str, Any]:
    """Latency of ours at a steady rate of 80 % of its throughput, requests at random times."""
    found = {}
    for work in WORK:
        capacity = loads.get(f"{work}, {MANY} clients", {}).get(peer.name, {}).get("items_per_s")
        if capacity:
            target = targets(work, [peer], ports)[peer.name]
            rate = 0.8 * capacity / target.items
            found[work] = open_loop(target, rate, 20.0).summary(target.items)
            tell(f"{work}, 80 %", {peer.name: found[work]})
    return found


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in rounds), 2) for name in rounds[0]}


def tell(work: str, row: dict[str, dict[str, float]]) -> None:
    for name, numbers in row.items():
        told = "  ".join(f"{key} {value:g}" for key, value in numbers.items())
        sys.stdout.write(f"{work:24} {name:20} {told}\n")
    sys.stdout.flush()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="install the peers, and end")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each load")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="services by name")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/service.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
