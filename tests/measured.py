"""A training run that writes down, after each checkpoint, the memory of each of its processes.

    python tests/measured.py LOG section.key=value ...

A line of LOG is {"parent": pages, "<worker pid>": pages, ...}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from clipserve.cli import main
from training.saver import Saver


def resident_pages(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def measure_saves(log: Path) -> None:
    real = Saver._write

    def write(*args: Any, **named: Any) -> None:
        real(*args, **named)
        me = os.getpid()
        workers = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        pages = {"parent": resident_pages(me)} | {pid: resident_pages(pid) for pid in workers}
        with log.open("a") as file:
            file.write(json.dumps(pages) + "\n")

    Saver._write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    log, *overrides = sys.argv[1:]
    measure_saves(Path(log))
    sys.argv = ["clipserve", "train", *overrides]
    main()
