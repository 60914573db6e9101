"""What a set of shards holds: its manifest.json, and one .index file per shard.

    manifest.json   per shard its size, sha256 and count; the bad samples; a fingerprint
    000000.index    a NumPy array, one row per sample: key, place of each member, checksums

Start at `read_manifest` and `write_manifest`; scan.py finds out what is written here.
Both are read as untrusted: names must be plain, numbers in range.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from struct import pack
from zlib import crc32

import numpy as np

from clipserve.errors import DataError
from clipserve.files import write_atomic
from clipserve.storage import check_name

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20
MAX_KEY_BYTES = 1024

_PLACES = tuple(
    f"{kind}_{part}" for kind in ("image", "text", "json") for part in ("offset", "size")
)
_FIELDS = [(name, "<i8") for name in _PLACES] + [
    ("crc32", "<u4"),  # see `checksum`
    ("text_bytes", "<u4"),  # of the longest caption, wherever it stands
    ("image_hash", "<u8"),  # blake2b of the picture's bytes, 64 bits: finds identical ones
]
_RESCAN = "`clipserve verify --rescan` makes it anew"


@dataclass(frozen=True)
class BadSample:
    """A sample that is in a shard but not in the set.

    `key` is empty where damage hides which sample it was.
    """

    shard: str
    key: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """One tar file, as its bytes are stored: compressed, if it is."""

    name: str
    num_bytes: int
    sha256: str
    num_samples: int
    num_out_of_order: int = 0
    """samples whose members are not adjacent: readable here, half samples to other readers"""
    compression: str = ""
    """"gzip" or none; places in the index are those of the decompressed bytes"""


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


def index_dtype(key_bytes: int) -> np.dtype[np.void]:
    """The dtype of an index whose longest key has `key_bytes` bytes."""
    return np.dtype([("key", f"S{max(key_bytes, 1)}"), *_FIELDS])


def checksum(image_crc: int, text_crc: int, json_crc: int) -> int:
    """The `crc32` of a sample, from those of its members; 0 stands for one that is not there."""
    return crc32(pack("<3I", image_crc, text_crc, json_crc))


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index"


def write_manifest(folder: Path, manifest: Manifest, indexes: Sequence[np.ndarray]) -> None:
    """Write the index files, then manifest.json, each whole or not at all."""
    for shard, index in zip(manifest.shards, indexes, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, index, allow_pickle=False)
        file = folder / index_name(shard.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, buffer.getvalue())
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
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    return parse_manifest(data, str(file))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The content of the manifest.json called `where` in messages. Raises DataError."""
    try:
        content = json.loads(data)
        found = content["format_version"]
        if not isinstance(found, int):
            raise ValueError(f"format_version is {found!r}")
        if found != FORMAT_VERSION:
            raise DataError(_other_format(where, found))
        manifest = Manifest(
            tuple(Shard(**shard) for shard in content["shards"]),
            tuple(BadSample(**bad) for bad in content["bad"]),
        )
        expected = content["fingerprint"]
        found_fingerprint = manifest.fingerprint
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} cannot be read: {error}; {_RESCAN}") from None
    if found_fingerprint != expected:
        raise DataError(f"{where} was changed after it was written; {_RESCAN}")
    for shard in manifest.shards:
        _check_shard(shard, where)
        check_name(shard.name)
    return manifest


def load_index(file: Path, shard: Shard) -> np.ndarray:
    """The index of a shard, mapped into memory, so that processes share it. Raises DataError."""
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{file} cannot be read: {error}; {_RESCAN}") from None
    index = np.asarray(mapped)  # still mapped; a plain array's rows are read much faster
    names = index.dtype.names or ()
    width = index.dtype["key"].itemsize if "key" in names else 0
    is_index = width <= MAX_KEY_BYTES and index.dtype == index_dtype(width)
    if not is_index or index.shape != (shard.num_samples,) or not _in_range(index):
        raise DataError(f"{file} is not the index of {shard.name}; {_RESCAN}")
    return index


def _in_range(index: np.ndarray) -> bool:
    """Whether a read by these numbers is bounded; whether they are right, the checksum tells."""
    limits = {"image": MAX_IMAGE_BYTES, "text": MAX_TEXT_BYTES, "json": MAX_TEXT_BYTES}
    return all(
        bool(np.all((index[f"{kind}_size"] >= 0) & (index[f"{kind}_size"] <= limit)))
        and bool(np.all((index[f"{kind}_offset"] >= 0) & (index[f"{kind}_offset"] < 2**62)))
        for kind, limit in limits.items()
    )


def _check_shard(shard: Shard, where: str) -> None:
    numbers = (shard.num_bytes, shard.num_samples, shard.num_out_of_order)
    is_sane = isinstance(shard.name, str) and isinstance(shard.sha256, str)
    is_sane = is_sane and all(type(number) is int and number >= 0 for number in numbers)
    if not is_sane or shard.compression not in ("", "gzip"):
        raise DataError(f"{where} describes shard {shard.name!r} wrongly; {_RESCAN}")


def _other_format(where: str, found: int) -> str:
    if found > FORMAT_VERSION:
        return (
            f"{where} has format {found}; this version reads up to {FORMAT_VERSION}:"
            " install a newer clipserve"
        )
    return f"{where} has format {found}, of an older clipserve; {_RESCAN}"
