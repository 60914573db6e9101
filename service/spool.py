"""The lines of one job on disk, and how far they were worked through.

A job has a folder of its own: `job.json` says what it is, `lines/` holds what was sent, a file for
each request, and `failed.ndjson` names the items that could not be stored. A file of lines is on
disk as a whole, or not there. Start at `Spool`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from clipserve.files import sync, write_atomic

FAILED_KEPT = 1000
"""failed items of a job that are named; the others are counted"""

_ABOUT = "job.json"
_BATCH_BYTES = 16 * 2**20


class Position(NamedTuple):
    """The end of the lines that are done."""

    part: int = 0
    offset: int = 0
    done: int = 0
    """lines before it"""

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(*map(int, text.split(":")))


@dataclass(frozen=True)
class Batch:
    """Lines that are worked on together."""

    index: int
    """of the first of them, in the job"""
    lines: list[bytes]
    end: Position


class Spool:
    """A job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "lines"
        self._failed = folder / "failed.ndjson"

    def create(self, about: dict[str, Any]) -> None:
        """The folder, which is a job once it says what it is."""
        self._lines.mkdir(parents=True)
        self.save(about)
        sync(self.folder.parent)

    def save(self, about: dict[str, Any]) -> None:
        write_atomic(self.folder / _ABOUT, json.dumps(about))

    def about(self) -> dict[str, Any] | None:
        """What was saved last; None for a folder that did not become a job."""
        try:
            content: dict[str, Any] = json.loads((self.folder / _ABOUT).read_bytes())
        except FileNotFoundError:
            return None
        return content

    def add(self) -> "LineWriter":
        """A file for the lines of one request; one at a time."""
        number = max((part.number for part in self._parts()), default=0) + 1
        return LineWriter(self._lines, number)

    def count(self) -> int:
        """Lines of all files."""
        return sum(part.num_lines for part in self._parts())

    def batches(self, start: Position, size: int) -> Iterator[Batch]:
        """The lines after a position, at most `size` or about 16 MiB at a time."""
        index = start.done
        for part in self._parts():
            if part.number < start.part:
                continue
            with part.path.open("rb") as file:
                file.seek(start.offset if part.number == start.part else 0)
                while lines := _take(file, size):
                    end = Position(part.number, file.tell(), index + len(lines))
                    yield Batch(index, lines, end)
                    index = end.done

    def failures(self) -> list[dict[str, Any]]:
        """The failed items that are named, in order."""
        if not self._failed.exists():
            return []
        return [json.loads(line) for line in self._failed.read_bytes().splitlines()]

    def set_failures(self, failures: Sequence[dict[str, Any]]) -> None:
        write_atomic(self._failed, "".join(f"{json.dumps(one)}\n" for one in failures))

    def drop_lines(self) -> None:
        """Free the disk of what is not needed any more."""
        shutil.rmtree(self._lines, ignore_errors=True)

    def remove(self) -> None:
        """All of it; what is half removed is no job any more."""
        (self.folder / _ABOUT).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _parts(self) -> list["_Part"]:
        found = []
        for path in self._lines.iterdir():  # an error, unlike `glob`, if they are out of reach
            if path.suffix != ".ndjson":
                continue
            number, _, count = path.stem.partition("-")
            found.append(_Part(int(number), int(count), path))
        return sorted(found)


class _Part(NamedTuple):
    """The lines of one request."""

    number: int
    num_lines: int
    path: Path


class LineWriter:
    """Chunks of a body -> a file of its lines, without blank ones.

    It is there, on disk, after `finish`; its name tells how many lines it has.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self._aside = folder / "incoming"
        self._file = self._aside.open("wb")
        self._rest = b""
        self.count = 0

    def write(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._put(lines)

    def finish(self) -> None:
        self._put([self._rest])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self.count:
            self._aside.rename(self._folder / f"{self._number:06}-{self.count}.ndjson")
            sync(self._folder)

    def discard(self) -> None:
        """As if nothing had come."""
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def _put(self, lines: list[bytes]) -> None:
        whole = [line for line in lines if line.strip()]
        self._file.writelines(line + b"\n" for line in whole)
        self.count += len(whole)


def _take(file: BinaryIO, size: int) -> list[bytes]:
    lines: list[bytes] = []
    num_bytes = 0
    while len(lines) < size and num_bytes < _BATCH_BYTES and (line := file.readline()):
        lines.append(line)
        num_bytes += len(line)
    return lines
