"""What a pack that was cut short needs to go on: OUT/.pack.json, and the list of bad records.

The state is written after every finished shard, when the shard and the bad records before it are
on disk. A record is known by its number in the source, beginning with 1.
"""

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from clipserve.errors import DataError
from clipserve.files import sync, write_atomic
from clipserve.shards import UNFINISHED
from clipserve.sources import BadRecord, Record
from training.shard_writer import Position

BAD_FILE = "bad_samples.jsonl"
FIRST_BAD = 20
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackState:
    """How far a pack is."""

    identity: dict[str, Any]
    """the source and the options, as JSON gives them back"""
    positions: dict[str, Position]
    """of each folder's writer"""
    records: int = 0
    """records up to this number are in finished shards, or must be dealt with again for a writer
    whose position is before them; the bad ones among them are all listed"""
    digest: str = ""
    """`chain` over these records: shows whether the source is still the same"""

    @property
    def has_shards(self) -> bool:
        return any(position.shards for position in self.positions.values())

    @property
    def first_needed(self) -> int:
        """Number of the last record that every writer has dealt with."""
        return min(position.records for position in self.positions.values())

    def save(self, folder: Path) -> None:
        content = {"format_version": _FORMAT_VERSION, **asdict(self)}
        write_atomic(folder / UNFINISHED, json.dumps(content, indent=1) + "\n")


def load_state(folder: Path) -> PackState | None:
    """None where no pack was begun. Raises DataError."""
    file = folder / UNFINISHED
    try:
        content = json.loads(file.read_bytes())
        if content.pop("format_version") != _FORMAT_VERSION:
            raise DataError(f"{file} is of another version of clipserve; remove {folder}")
        positions = {name: Position(**p) for name, p in content.pop("positions").items()}
        return PackState(positions=positions, **content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be read: {error}; remove {folder}") from None


def chain(digest: bytes, record: Record | BadRecord) -> bytes:
    """A digest over a sequence of records: `digest` is that of those before. Not over bytes."""
    image = "" if isinstance(record, BadRecord) or isinstance(record.image, bytes) else record.image
    rest = record.reason if isinstance(record, BadRecord) else "\0".join(record.captions)
    text = f"{record.key}\0{record.origin}\0{image}\0{rest}"
    return blake2b(digest + text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


class BadList:
    """bad_samples.jsonl, appended to; holds the first few and counts by kind."""

    def __init__(self, folder: Path, records: int, needed: int) -> None:
        """Keep what is listed up to the number `records`, and remember which after `needed`."""
        self.by_kind: Counter[str] = Counter()
        self.first: list[BadRecord] = []
        self.listed: set[int] = set()
        """numbers that are in the list already"""
        self._path = folder / BAD_FILE
        self._keep(records, needed)
        self._file: BinaryIO = self._path.open("ab")

    def add(self, number: int, bad: BadRecord) -> None:
        self._count(bad)
        line = json.dumps({"record": number, **asdict(bad)})
        self._file.write(line.encode() + b"\n")

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # after a full disk; `sync` has told
            self._file.close()

    def _keep(self, records: int, needed: int) -> None:
        temporary = self._path.with_name(f".{BAD_FILE}.tmp")
        with temporary.open("wb") as kept:
            for number, bad, line in _read_bad(self._path):
                if number <= records:
                    kept.write(line)
                    self._count(bad)
                    if number > needed:
                        self.listed.add(number)
        temporary.replace(self._path)
        sync(self._path.parent)

    def _count(self, bad: BadRecord) -> None:
        self.by_kind[bad.kind] += 1
        if len(self.first) < FIRST_BAD:
            self.first.append(bad)


def _read_bad(path: Path) -> Iterator[tuple[int, BadRecord, bytes]]:
    """Whole lines; the last one may have been cut."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                fields = json.loads(line)
                yield fields.pop("record"), BadRecord(**fields), line


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder for one process. Raises DataError if another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process packs into {folder} right now") from None
        yield
    finally:
        os.close(descriptor)


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of what two identities say differently."""
    names = dict.fromkeys([*old, *new])
    found = []
    for name in names:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{name}.{inner}" for inner in differing(before, after)]
        elif before != after:
            found.append(name)
    return list(islice(found, 10))
