"""What a model directory embeds per second without a service, in a process of its own.

`InProcess` is asked in turn with the services. The process is `MODEL`: a line that names a kind of
work -> a line with the items per second of one round of it.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

KINDS = ("texts", "pictures", "pictures, resized")


class InProcess:
    """The process, idle but for `rate`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @classmethod
    @contextlib.contextmanager
    def running(cls, model: Path, environment: dict[str, str]) -> Iterator[Self]:
        """Ends with the block; each kind has been run once."""
        command = [sys.executable, "-m", "benchmarks.service_in_process", str(model)]
        pipe, env = subprocess.PIPE, os.environ | environment
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
            found = cls(process)
            for kind in KINDS:
                found.rate(kind)
            yield found
            assert process.stdin is not None
            process.stdin.close()

    def rate(self, kind: str) -> float:
        """Items per second in one round."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(kind + "\n")
        stdin.flush()
        return float(stdout.readline())


def main() -> None:
    import clipserve
    from benchmarks.embedding import pictures
    from benchmarks.service_load import DIGITS
    from benchmarks.service_peers import TEXT
    from clipserve.decoding import open_decoded
    from clipserve.embed import embed_pixels

    model = clipserve.load(sys.argv[1])
    jpegs = pictures(32)
    resized = [model.transform.resize(open_decoded(jpeg, model.transform)) for jpeg in jpegs]
    works: dict[str, tuple[Callable[[list[Any]], Any], list[Any]]] = {
        "texts": (model.embed_texts, [TEXT.replace("@@", f"{i:0{DIGITS}d}") for i in range(128)]),
        "pictures": (model.embed_images, jpegs),
        "pictures, resized": (partial(embed_pixels, model), resized),
    }
    for line in sys.stdin:
        embed, items = works[line.strip()]
        started = time.perf_counter()
        embed(items)
        sys.stdout.write(f"{len(items) / (time.perf_counter() - started):.1f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
