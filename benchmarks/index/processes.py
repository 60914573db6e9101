"""Contenders as processes of their own, and the environment that the peers are installed in."""

import json
import os
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.index.data import Data

ROOT = Path(__file__).parents[2]
PEERS = {  # contender -> packages for the peers' environment
    "hnswlib": ("hnswlib",),
    "usearch": ("usearch",),
    "milvus-lite": ("milvus-lite", "pymilvus"),
    "qdrant-client": ("qdrant-client",),
}
_PATIENCE_S = 30


class ContenderError(Exception):
    """A contender's process ended."""


@dataclass
class Process:
    """A contender that was started; `ask` has it carry out a command of `worker.Worker`."""

    name: str
    process: "subprocess.Popen[str]"
    log: Path
    most: int | None = None
    """the largest value of its knob; None if it is tuned by itself, or has none"""
    knob: str = ""

    @classmethod
    def start(cls, name: str, data: Data, threads: int) -> Self:
        folder = contender_folder(name, data)
        folder.mkdir(parents=True, exist_ok=True)
        peers = data.folder.parent / "peers" / "bin" / "python"
        python = str(peers) if name in PEERS else sys.executable
        words = [name, str(folder), str(data.count), str(data.dim), str(threads)]
        limits = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
        )
        log = data.folder / f"{folder.name}.log"
        process = subprocess.Popen(
            [python, "-m", "benchmarks.index.worker", *words],
            cwd=ROOT,
            env=os.environ | limits,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
        )
        return cls(name, process, log)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do} | command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ContenderError(f"{self.name} failed at {do} {command}; see {self.log}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def contender_folder(name: str, data: Data) -> Path:
    return data.folder / name.replace(" ", "-")


def make_environment(folder: Path) -> dict[str, bool]:
    """The peers' own Python in a folder, and for each peer whether it could be installed there."""
    python = folder / "peers" / "bin" / "python"
    done = folder / "peers" / "installed.json"
    if not done.exists():
        if not python.exists():
            venv.create(folder / "peers", with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        found = {}
        for name, packages in PEERS.items():
            say(f"installing {name} ...")
            failed = subprocess.run([*install, *packages], capture_output=True).returncode
            found[name] = not failed
        done.write_text(json.dumps(found))
    installed: dict[str, bool] = json.loads(done.read_text())
    return installed


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()
