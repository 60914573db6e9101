"""WebDataset shards: what they hold, and reading any sample by its place.

    000000.tar      key.jpg|png|webp, key.txt, key.json: readable by any WebDataset reader
    000000.index    one row per sample: its key, and offset and size of each member
    manifest.json   per shard its size, sha256, count and index; bad samples; a fingerprint

Start at `ShardSet.open`. Shards without a manifest get one in memory from one scan. The scan walks
the headers itself and checks their checksums: Python's tarfile, and so every reader built on it,
takes a damaged header for the end of the archive and drops the rest without a word.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from clipserve.errors import DataError
from clipserve.files import sha256 as file_sha256
from clipserve.files import write_atomic

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_BLOCK = 512
_MAX_KEY_BYTES = 1024
_MAX_TEXT_BYTES = 2**20
_READ_BYTES = 2**20
_MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class BadSample:
    """A sample that is in a shard but not in the set."""

    shard: str
    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds. `fingerprint` changes with any shard, their order, or the bad."""

    shards: tuple[Shard, ...]
    bad: tuple[BadSample, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        content = [[asdict(shard) for shard in self.shards], [asdict(bad) for bad in self.bad]]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One sample's bytes, undecoded. `captions` come from .json's "captions" or else from .txt."""

    shard: str
    key: str
    image: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any]


class ShardSet:
    """Samples 0..len-1 of a set of local shards, readable in any order and from any process.

    Open files are kept per instance and read with pread, so forked workers may share them.
    """

    def __init__(self, folder: Path, manifest: Manifest, indexes: list[np.ndarray]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._indexes = indexes
        self._starts = np.cumsum([0, *(len(index) for index in indexes)])
        self._files: dict[int, int] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """From a folder of shards, its manifest.json, a .tar, or a pattern (`train-*.tar`).

        Raises DataError.
        With a manifest, each shard's size is compared with it; `verify` compares every byte.
        """
        folder = path if path.is_dir() else path.parent
        if (path.is_dir() or path.name == MANIFEST) and (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            _check_no_others(folder, manifest)
            for shard in manifest.shards:
                _check_size(folder / shard.name, shard.num_bytes)
            return cls(folder, manifest, [_read_index(folder, s) for s in manifest.shards])
        pattern = "*.tar" if path.is_dir() else path.name
        names = [path.name] if path.is_file() else sorted(f.name for f in folder.glob(pattern))
        if not names:
            raise DataError(f"{path} holds no .tar shards; `clipserve pack` makes them")
        manifest, indexes = scan(folder, names)
        return cls(folder, manifest, indexes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, i: int) -> Sample:
        """Sample i. DataError if its shard has become shorter; OSError if it cannot be read."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = self._indexes[shard][i - self._starts[shard]]
        name = self.manifest.shards[shard].name
        image = self._pread(shard, row["image_offset"], row["image_size"])
        text = self._pread(shard, row["text_offset"], row["text_size"])
        metadata = self._pread(shard, row["json_offset"], row["json_size"])
        fields = _parse_json(metadata)
        captions = fields.pop("captions", None)
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            captions = [text.decode("utf-8", errors="replace")]
        return Sample(name, row["key"].decode("utf-8"), image, tuple(captions), fields)

    def key(self, i: int) -> tuple[str, str]:
        """(shard, key) of sample i, without reading it."""
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = self._indexes[shard][i - self._starts[shard]]
        return self.manifest.shards[shard].name, row["key"].decode("utf-8")

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        if shard not in self._files:
            while len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.folder / self.manifest.shards[shard].name
            self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._files[shard], int(size), int(offset))
        if len(data) != size:
            name = self.manifest.shards[shard].name
            raise DataError(f"shard {name} ends before byte {offset + size}: it was cut")
        return data


def is_shard_source(path: Path) -> bool:
    """Whether `path` is a .tar, a manifest, or a folder that holds shards."""
    if path.is_dir():
        return (path / MANIFEST).is_file() or next(path.glob("*.tar"), None) is not None
    return path.suffix == ".tar" or path.name == MANIFEST


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: no byte that was not is hidden in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def scan(folder: Path, names: Iterable[str]) -> tuple[Manifest, list[np.ndarray]]:
    """Walk every header of the shards. Raises DataError for one that is not a whole tar file."""
    shards, indexes, bad = [], [], []
    for name in names:
        rows, bad_here = _scan_shard(folder / name)
        index = _to_index(rows)
        size = (folder / name).stat().st_size
        shards.append(Shard(name, size, file_sha256(folder / name), len(rows)))
        indexes.append(index)
        bad += bad_here
    return Manifest(tuple(shards), tuple(bad)), indexes


def write_manifest(folder: Path, manifest: Manifest, indexes: list[np.ndarray]) -> None:
    """Write the index files, then manifest.json, each whole or not at all."""
    import io

    for shard, index in zip(manifest.shards, indexes, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, index, allow_pickle=False)
        write_atomic(folder / _index_name(shard.name), buffer.getvalue())
    content = {
        "format_version": FORMAT_VERSION,
        "num_samples": manifest.num_samples,
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
        "bad": [asdict(bad) for bad in manifest.bad],
    }
    write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a folder, checked against its own fingerprint. Raises DataError."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["format_version"]
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise DataError(
                f"{file} has format {found}; this version reads up to {FORMAT_VERSION}:"
                " install a newer clipserve"
            )
        manifest = Manifest(
            tuple(Shard(**shard) for shard in content["shards"]),
            tuple(BadSample(**bad) for bad in content["bad"]),
        )
        expected = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}; delete it to scan anew") from None
    if manifest.fingerprint != expected:
        raise DataError(f"{file} was changed after it was written; delete it to scan anew")
    return manifest


def verify(path: Path) -> tuple[Manifest, list[str]]:
    """Scan the shards anew and compare every byte with the manifest, if there is one.

    Returns what the scan found and one line for each disagreement.
    """
    folder = path if path.is_dir() else path.parent
    has_manifest = (folder / MANIFEST).is_file()
    if not (has_manifest and (path.is_dir() or path.name == MANIFEST)):
        return ShardSet.open(path).manifest, []
    manifest = read_manifest(folder)
    problems = []
    for shard in manifest.shards:
        file = folder / shard.name
        if not file.is_file():
            problems.append(f"{shard.name} is missing")
        elif file_sha256(file) != shard.sha256:
            problems.append(f"{shard.name} is damaged: its sha256 is not the manifest's")
        else:
            _, indexes = scan(folder, [shard.name])
            if not np.array_equal(indexes[0], _read_index(folder, shard)):
                problems.append(f"{_index_name(shard.name)} is damaged; delete manifest.json")
    return manifest, problems


@dataclass
class _Row:
    key: str
    members: dict[str, tuple[int, int]]


def _scan_shard(path: Path) -> tuple[list[_Row], list[BadSample]]:
    """Complete samples (a picture and a caption) in order, and the rest with the reason."""
    samples: dict[str, _Row] = {}
    bad = []
    for name, offset, size in _walk(path):
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or base.startswith("."):
            continue  # not a member of a sample, as in webdataset
        key = f"{folder}/{stem}" if folder else stem
        row = samples.setdefault(key, _Row(key, {}))
        kind = "image" if extension.lower() in IMAGE_EXTENSIONS else extension.lower()
        if kind in row.members:
            bad.append(BadSample(path.name, key, "repeated_key", f"a second {extension}; ignored"))
        else:
            row.members[kind] = (offset, size)
    rows = []
    for row in samples.values():
        missing = [kind for kind in ("image", "txt") if kind not in row.members]
        if "txt" in missing and "json" in row.members:
            missing.remove("txt")  # the caption may be in the JSON
        if missing:
            what = " and ".join("picture" if kind == "image" else "caption" for kind in missing)
            bad.append(BadSample(path.name, row.key, "half_sample", f"has no {what}"))
        elif not is_utf8(row.key):
            key = row.key.encode("utf-8", "backslashreplace").decode()
            bad.append(BadSample(path.name, key, "bad_key", "its name is not UTF-8"))
        elif len(row.key.encode()) > _MAX_KEY_BYTES:
            bad.append(BadSample(path.name, row.key[:80], "long_key", f"over {_MAX_KEY_BYTES} B"))
        elif max(row.members.get(kind, (0, 0))[1] for kind in ("txt", "json")) > _MAX_TEXT_BYTES:
            bad.append(BadSample(path.name, row.key, "long_text", f"over {_MAX_TEXT_BYTES} B"))
        else:
            rows.append(row)
    return rows, bad


def _walk(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, data offset, size) of each file in a tar, every header's checksum verified."""
    total = path.stat().st_size
    long_name: str | None = None
    with path.open("rb") as file:
        offset = 0
        while True:
            header = os.pread(file.fileno(), _BLOCK, offset)
            if header == bytes(_BLOCK):
                _check_end(file.fileno(), path, offset, total)
                return
            if len(header) < _BLOCK:
                raise DataError(
                    f"shard {path} ends at byte {offset} without an end marker: it was cut"
                )
            name, size, kind = _parse_header(header, path, offset)
            data = offset + _BLOCK
            if data + size > total:
                raise DataError(f"shard {path} is cut inside {name!r}, at byte {total}")
            if kind in (b"x", b"L"):
                long_name = _long_name(os.pread(file.fileno(), size, data), kind) or long_name
            elif kind in (b"0", b"\0", b"7"):
                yield long_name or name, data, size
                long_name = None
            elif kind not in (b"g", b"K"):
                long_name = None  # a folder or a link: no data of a sample
            offset = data + -(-size // _BLOCK) * _BLOCK


def _check_end(descriptor: int, path: Path, offset: int, total: int) -> None:
    """After the end marker all must be zero: else it is a hole, with samples behind it."""
    for start in range(offset, total, _READ_BYTES):
        if os.pread(descriptor, _READ_BYTES, start).strip(b"\0"):
            raise DataError(
                f"shard {path} has a hole of zeros at byte {offset}, and data behind it"
            )


def _parse_header(header: bytes, path: Path, offset: int) -> tuple[str, int, bytes]:
    # The checksum counts its own field as spaces (POSIX.1-1988 ustar).
    computed = sum(header[:148]) + 8 * 32 + sum(header[156:])
    try:
        stored = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        size = _parse_number(header[124:136])
    except ValueError:
        stored, size = -1, 0
    if stored != computed:
        what = "is not a tar file" if offset == 0 else f"has a damaged header at byte {offset}"
        raise DataError(f"shard {path} {what}")
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" else b""
    full = prefix + b"/" + name if prefix and header[257:265] != b"ustar  \0" else name
    return full.decode("utf-8", "surrogateescape"), size, header[156:157]


def _parse_number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256, for sizes over 8 GiB
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.rstrip(b"\0 ").lstrip() or b"0", 8)


def _long_name(data: bytes, kind: bytes) -> str | None:
    """The name in a GNU long-name block or in a PAX header's "path" record."""
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "surrogateescape")
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or int(length) == 0:
            return None
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def _to_index(rows: list[_Row]) -> np.ndarray:
    keys = [row.key.encode() for row in rows]
    width = max((len(key) for key in keys), default=1)
    fields: list[tuple[str, str]] = [("key", f"S{width}")]
    kinds = (("image", "image"), ("text", "txt"), ("json", "json"))
    fields += [(f"{name}_{part}", "<i8") for name, _ in kinds for part in ("offset", "size")]
    index = np.zeros(len(rows), dtype=np.dtype(fields))
    index["key"] = keys
    for name, kind in kinds:
        places = np.array([row.members.get(kind, (0, 0)) for row in rows], np.int64).reshape(-1, 2)
        index[f"{name}_offset"], index[f"{name}_size"] = places.T
    return index


def _read_index(folder: Path, shard: Shard) -> np.ndarray:
    file = folder / _index_name(shard.name)
    try:
        index = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}; delete {MANIFEST} to scan anew") from None
    if index.dtype.names is None or len(index) != shard.num_samples:
        raise DataError(f"{file} is not the index of {shard.name}; delete {MANIFEST} to scan anew")
    assert isinstance(index, np.ndarray)
    return index


def _index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index"


def _check_no_others(folder: Path, manifest: Manifest) -> None:
    others = {file.name for file in folder.glob("*.tar")} - {s.name for s in manifest.shards}
    if others:
        raise DataError(
            f"{folder} holds shards that its manifest does not list: {', '.join(sorted(others))};"
            f" move them away, or delete {MANIFEST} to scan anew"
        )


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from None
    if found != expected:
        raise DataError(f"shard {path} has {found} bytes, not the manifest's {expected}")


def _parse_json(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
