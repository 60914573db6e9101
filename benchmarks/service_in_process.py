"""What a model directory embeds per second without a service: `MODEL ROUNDS` -> a line of JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import clipserve
from benchmarks.embedding import pictures
from benchmarks.service_peers import TEXT
from clipserve.decoding import open_decoded
from clipserve.embed import embed_pixels


def main() -> None:
    model = clipserve.load(sys.argv[1])
    jpegs = pictures(32)
    resized = [model.transform.resize(open_decoded(jpeg, model.transform)) for jpeg in jpegs]
    found = {
        "texts": rate(model.embed_texts, [TEXT + str(i) for i in range(128)]),
        "pictures": rate(model.embed_images, jpegs),
        "pictures, resized": rate(partial(embed_pixels, model), resized),
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
