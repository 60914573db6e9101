"""How long `clipserve serve` takes until it is ready.

    python -m benchmarks.startup [MODEL] [--rounds 5] [--limit 6] [--out FILE.json]

MODEL is a model directory; without one a ViT-B/32 with random weights is made. Each round starts a
process, asks for /health/ready until it answers with 200, reads the process's processor time, and
ends it. A first round, which is not counted, brings the files into memory and writes the bytecode
that an installation has. Exit code 1 when the median is over the limit. Needs Linux.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.embedding import processor
from benchmarks.service_peers import free_port, make_checkpoint

MODEL = Path("build/startup/vit-b-32")
LOG = Path("build/startup/service.log")
PACKAGES = ("torch", "numpy", "open_clip_torch", "safetensors", "fastapi", "uvicorn")


class Start(NamedTuple):
    wall_s: float
    processor_s: float
    load: float
    """of the machine, over the last minute: what else it did"""


def main() -> None:
    arguments = read_arguments()
    model = arguments.model or make_checkpoint(MODEL)
    starts = [start(model) for _ in range(1 + arguments.rounds)][1:]
    report = {
        "benchmark": "startup",
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
        "weights_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "rounds": arguments.rounds,
    } | summary(starts, arguments.limit)
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    arguments.out.write_text(text + "\n")
    sys.exit(0 if report["in_limit"] else 1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="model directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=6.0, help="seconds it may take")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    return parser.parse_args()


def start(model: Path) -> Start:
    """One process, from its start until it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "clipserve", "serve", str(model), "--port", str(port)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until_ready(process, port)
            wall_s = time.perf_counter() - began
            return Start(wall_s, processor_s(process.pid), os.getloadavg()[0])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    url = f"http://127.0.0.1:{port}/health/ready"
    while process.poll() is None:
        # Until it listens, and while it loads, which is an HTTPError, an OSError too.
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60):
            return
        time.sleep(0.02)
    raise SystemExit(f"clipserve ended with code {process.returncode}; {LOG} says why")


def processor_s(pid: int) -> float:
    """What a process took of all processors, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system


def summary(starts: list[Start], limit_s: float) -> dict[str, Any]:
    walls, processors, loads = zip(*starts, strict=True)
    return {
        "limit_s": limit_s,
        "in_limit": statistics.median(walls) <= limit_s,
        "ready_s": {"median": round(statistics.median(walls), 2), "all": rounded(walls)},
        "processor_s": {"median": round(statistics.median(processors), 2)}
        | {"all": rounded(processors)},
        "machine_load": rounded(loads),
    }


def rounded(numbers: tuple[float, ...]) -> list[float]:
    return [round(number, 2) for number in numbers]


if __name__ == "__main__":
    main()
