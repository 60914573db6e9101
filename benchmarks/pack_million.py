"""Packing a table of a million rows: how long it takes, and how much memory.

    python -m benchmarks.pack_million [--rows 1000000] [--out FILE.json]

The rows name a few thousand tiny pictures again and again, so that what is measured is the work per
row: reading the table, opening and decoding a picture, writing the shard, the final scan.
`clipserve pack` runs in a process of its own, whose peak memory counts.
"""

import argparse
import csv
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.embedding import processor

PACKAGES = ("pillow", "numpy", "torch")
WORDS = ("red", "blue", "small", "large", "dog", "cat", "house", "tree", "old", "new")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pack_million.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder) / "source", arguments.rows, arguments.pictures)
        measured = measure(table, Path(folder) / "shards")
    report = {
        "benchmark": "pack_million",
        "rows": arguments.rows,
        "pictures": arguments.pictures,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        **measured,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if measured["peak_rss_gb"] >= 1.5 or measured["packed"] != arguments.rows:
        sys.exit(f"not as it should be: {measured}")


def make_table(folder: Path, rows: int, pictures: int) -> Path:
    """A CSV of 16x16 JPEG files with captions of five words."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(pictures):
        buffer = io.BytesIO()
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).save(buffer, "JPEG")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "price"])
        for row in range(rows):
            words = (WORDS[row // 10**place % 10] for place in range(5))
            writer.writerow([f"{row % pictures}.jpg", f"{' '.join(words)} {row}", row % 100])
    return table


def measure(table: Path, out: Path) -> dict[str, Any]:
    """Seconds, rows per second, and peak memory of the process that packs."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "clipserve", "pack", str(table), str(out), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    packed = sum(json.loads(done.stdout)["packed"].values())
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "packed": packed,
        "seconds": round(seconds, 1),
        "rows_per_second": round(packed / seconds),
        "peak_rss_gb": round(peak_kb / 2**20, 3),
    }


if __name__ == "__main__":
    main()
