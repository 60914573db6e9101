"""Four times what `clipserve serve` can do, and reloads while it serves.

    python -m benchmarks.overload [--seconds 60] [--reloads 20] [--out FILE.json]

ViT-B/32, random weights; each request is one text, or one JPEG of 640x480, never seen before. The
capacity is what 32 clients get that ask again when they are answered. Then requests come at four
times that rate, whatever becomes of them: goodput is what is answered with 200, the rest should be
429. Right after, single requests show whether it recovered. Last, the model is reloaded again and
again while clients ask: no request may fail. Exit code 1 if something did.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.embedding import pictures, processor
from benchmarks.service import FOLDER
from benchmarks.service_load import Load, Target, closed_loop, open_loop
from benchmarks.service_peers import make_models, ours, running

FACTOR = 4
LEAST_GOODPUT = 0.9
CLIENTS = 32


def main() -> None:
    arguments = read_arguments()
    make_models(FOLDER / "models", FOLDER / "infinity")
    peer = ours()
    with running(peer, FOLDER / "models", arguments.threads) as (port, ready_s):
        work = {"1 text": peer.target(port, [])}
        work["1 picture"] = peer.target(port, pictures(1))
        closed_loop(work["1 picture"], 8, arguments.seconds / 10)  # warm
        overloads = {name: overload(target, arguments.seconds) for name, target in work.items()}
        reloads = reload_under_load(work["1 text"], port, arguments.reloads)
    report = {
        "benchmark": "overload",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "seconds": arguments.seconds,
        "ready_s": round(ready_s, 2),
        "overload": overloads,
        "reloads": reloads,
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    good = all(one["goodput_share"] >= LEAST_GOODPUT for one in overloads.values())
    failed = sum(one["failed"] for one in (*overloads.values(), reloads))
    sys.exit(0 if good and not failed else 1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the report here too")
    return parser.parse_args()


def overload(target: Target, seconds: float) -> dict[str, Any]:
    """What a target answers at four times its capacity, and right after."""
    before = _rate(closed_loop(target, CLIENTS, seconds / 4))
    load = open_loop(target, FACTOR * before, seconds)
    recovered = closed_loop(target, 1, 1.0)
    after = _rate(closed_loop(target, CLIENTS, seconds / 4))
    capacity = statistics.fmean([before, after])  # of a machine that may have others
    return {
        "capacity_per_s": round(capacity, 1),
        "goodput_per_s": round(_rate(load), 1),
        "goodput_share": round(_rate(load) / capacity, 3),
        "answered": len(load.latencies_s),
        "refused": load.refused,
        "failed": load.failed + recovered.failed,
        "p50_ms": _p50_ms(load),
        "p50_ms_right_after": _p50_ms(recovered),
        "refused_right_after": recovered.refused,
    }


def reload_under_load(target: Target, port: int, count: int) -> dict[str, Any]:
    """What clients get while the model is read again `count` times."""
    done, errors = threading.Event(), list[str]()

    base = f"http://127.0.0.1:{port}/v1/models"
    with urllib.request.urlopen(base) as answer:
        name = json.load(answer)["data"][0]["id"]

    def reload() -> None:
        url = f"{base}/{name}:reload"
        headers = {"Content-Type": "application/json"}
        try:
            for _ in range(count):
                request = urllib.request.Request(url, b"{}", headers, method="POST")
                with contextlib.closing(urllib.request.urlopen(request, timeout=120)):
                    pass
        except OSError as error:
            errors.append(str(error))
        finally:
            done.set()

    thread = threading.Thread(target=reload)
    thread.start()
    loads = []
    while not done.is_set():
        loads.append(closed_loop(target, 8, 2.0))
    thread.join()
    return {
        "reloads": count,
        "answered": sum(len(load.latencies_s) for load in loads),
        "failed": sum(load.failed + load.refused for load in loads) + len(errors),
        "errors": errors,
    }


def _rate(load: Load) -> float:
    return len(load.latencies_s) / load.seconds


def _p50_ms(load: Load) -> float:
    return round(1000 * statistics.median(load.latencies_s or [float("nan")]), 1)


if __name__ == "__main__":
    main()
