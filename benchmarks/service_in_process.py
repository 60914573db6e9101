"""What a model directory embeds per second without a service: `MODEL ROUNDS` -> a line of JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import clipserve
from benchmarks.embedding import pictures
from benchmarks.service_peers import TEXT


def main() -> None:
    model = clipserve.load(sys.argv[1])
    found = {
        "texts": rate(model.embed_texts, [TEXT + str(i) for i in range(128)]),
        "pictures": rate(model.embed_images, pictures(32)),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def rate(embed: Callable[[list[Any]], Any], items: list[Any]) -> float:
    """Items per second, median of rounds; the first, which warms up, does not count."""
    times = []
    for _ in range(int(sys.argv[2]) + 1):
        started = time.perf_counter()
        embed(items)
        times.append(time.perf_counter() - started)
    return round(len(items) / statistics.median(times[1:]), 1)


if __name__ == "__main__":
    main()
