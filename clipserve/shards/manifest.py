"""What a set of shards holds: its manifest.json, and one .index file per shard.

    manifest.json   per shard its size, sha256 and count; the bad samples; a fingerprint
    000000.index    a NumPy array, one row per sample: key, place of each member, checksums

Start at `read_manifest` and `write_manifest`; scan.py finds out what is written here.
Both are read as untrusted: names must be plain, numbers in range.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from struct import pack
from tokenize import TokenError
from zlib import crc32

import numpy as np
from numpy.lib import format as npy

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
_DIGEST = re.compile(r"[0-9a-f]{64}")
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
    index_sha256: str
    """of its index file"""
    num_out_of_order: int = 0
    """samples whose members are not adjacent: readable here, half samples to other readers"""
    compression: str = ""
    """"gzip" or none; places in the index are those of the decompressed bytes"""


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds. `fingerprint` changes with any shard, their order, or the bad.

    It does not with how an index is encoded, which another NumPy may do differently.
    """

    shards: tuple[Shard, ...]
    bad: tuple[BadSample, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        shards = [asdict(shard) for shard in self.shards]
        for shard in shards:
            del shard["index_sha256"]
        content = [shards, [asdict(bad) for bad in self.bad]]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_dtype(key_bytes: int) -> np.dtype[np.void]:
    """The dtype of an index whose longest key has `key_bytes` bytes."""
    return np.dtype([("key", f"S{max(key_bytes, 1)}"), *_FIELDS])


def checksum(image_crc: int, text_crc: int, json_crc: int) -> int:
    """The `crc32` of a sample, from those of its members; 0 stands for one that is not there."""
    return crc32(pack("<3I", image_crc, text_crc, json_crc))


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index"


def encode_index(index: np.ndarray) -> bytes:
    """The content of an index file."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()


def write_manifest(folder: Path, manifest: Manifest, indexes: Sequence[np.ndarray]) -> None:
    """Write the index files, then manifest.json, each whole or not at all."""
    for shard, index in zip(manifest.shards, indexes, strict=True):
        file = folder / index_name(shard.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, encode_index(index))
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


def parse_index(data: bytes, shard: Shard, where: str) -> np.ndarray:
    """The index of a shard from the content of the file called `where`, all checked.

    Raises DataError.
    """
    if sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"{where} is damaged: its sha256 is not the manifest's; {_RESCAN}")
    try:
        index = npy.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, SyntaxError, TokenError, MemoryError, RecursionError):
        raise _not_an_index(where, shard) from None
    if not _has_form(index, shard) or not _in_range(index):
        raise _not_an_index(where, shard)
    return index


def read_index(file: Path, shard: Shard) -> np.ndarray:
    """As `parse_index`, from a file."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {_RESCAN}") from None
    return parse_index(data, shard, str(file))


def map_index(file: Path, shard: Shard) -> np.ndarray:
    """An index that `read_index` has found good, mapped, so that processes share its memory."""
    try:
        mapped = npy.open_memmap(file, mode="r")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {_RESCAN}") from None
    except (ValueError, SyntaxError, TokenError):
        raise _not_an_index(str(file), shard) from None
    index = np.asarray(mapped)  # still mapped; a plain array's rows are read much faster
    if not _has_form(index, shard):
        raise _not_an_index(str(file), shard)
    return index


def _not_an_index(where: str, shard: Shard) -> DataError:
    return DataError(f"{where} is not the index of {shard.name}; {_RESCAN}")


def _has_form(index: np.ndarray, shard: Shard) -> bool:
    names = index.dtype.names or ()
    width = index.dtype["key"].itemsize if "key" in names else 0
    is_index = width <= MAX_KEY_BYTES and index.dtype == index_dtype(width)
    return is_index and index.shape == (shard.num_samples,)


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
    is_sane = is_sane and isinstance(shard.index_sha256, str)
    is_sane = is_sane and _DIGEST.fullmatch(shard.index_sha256) is not None
    if not is_sane or shard.compression not in ("", "gzip"):
        raise DataError(f"{where} describes shard {shard.name!r} wrongly; {_RESCAN}")


def _other_format(where: str, found: int) -> str:
    if found > FORMAT_VERSION:
        return (
            f"{where} has format {found}; this version reads up to {FORMAT_VERSION}:"
            " install a newer clipserve"
        )
    return f"{where} has format {found}, of an older clipserve; {_RESCAN}"
