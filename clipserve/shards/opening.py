"""From a location to the manifest, the places and the indexes of its shards. Start at `describe`.

What is not beside the shards, or is far away, is kept under the cache folder: the manifest of a
scan, and the index files of a remote set. Removing that folder costs another scan, no more.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipserve.errors import DataError
from clipserve.files import write_atomic
from clipserve.shards.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    index_name,
    parse_index,
    parse_manifest,
    read_index,
    read_manifest,
    write_manifest,
)
from clipserve.shards.places import (
    Place,
    check_no_others,
    find_places,
    identity,
    is_manifest,
    is_shard_source,
    manifest_folder,
)
from clipserve.shards.scan import scan_places
from clipserve.storage import (
    MissingError,
    ShardCache,
    cache_root,
    is_remote,
    join,
    read_bytes,
    shown,
)
from clipserve.storage.locks import locked
from clipserve.storage.receive import cache_faults

logger = logging.getLogger(__name__)

_INDEX_THREADS = 16


@dataclass(frozen=True)
class Described:
    """Shards, where they are, and what is in them."""

    manifest: Manifest
    places: Sequence[Place]
    indexes: Sequence[np.ndarray | Path]
    """by shard: an index, or the file it is in"""
    is_scanned: bool
    """by us: then sizes and digests are those of what was read, unpacked if need be"""
    are_checked: bool
    """the indexes: those beside local shards are only when they are first used"""


def describe(location: str, cache: ShardCache) -> Described:
    """By the manifest beside the shards, or else by a scan, of now or earlier. Raises DataError."""
    if is_remote(location):
        manifest = _read_remote_manifest(location)
        if manifest is not None:
            places = [Place(s.name, join(location, s.name)) for s in manifest.shards]
            indexes = _fetch_indexes(location, manifest)
            return Described(manifest, places, indexes, is_scanned=False, are_checked=True)
    elif (folder := manifest_folder(location)) is not None:
        return _describe_folder(folder)
    places = find_places(location)
    return Described(*_scan_once(places, location, cache), is_scanned=True, are_checked=True)


def _describe_folder(folder: Path) -> Described:
    manifest = read_manifest(folder)
    check_no_others(folder, manifest)
    files = [folder / index_name(shard.name) for shard in manifest.shards]
    for shard, file in zip(manifest.shards, files, strict=True):
        _check_size(folder / shard.name, shard.num_bytes)
        if not file.is_file():
            raise DataError(
                f"{file} is missing; put it back, or `clipserve verify --rescan {folder}`"
            )
    places = [Place(shard.name, str(folder / shard.name)) for shard in manifest.shards]
    return Described(manifest, places, files, is_scanned=False, are_checked=False)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from None
    if found != expected:
        raise DataError(
            f"shard {path} has {found} bytes, not the manifest's {expected}: it changed since;"
            f" put the right one back, or `clipserve verify --rescan {path.parent}`"
        )


def _read_remote_manifest(location: str) -> Manifest | None:
    """None where shards are named one by one, or none is there and shards can be listed."""
    if not is_manifest(location) and (is_shard_source(location) or location.startswith("pipe:")):
        return None
    file = join(location, MANIFEST)
    try:
        return parse_manifest(read_bytes(file), shown(file))
    except MissingError:
        if is_manifest(location):
            raise
        return None


def _fetch_indexes(location: str, manifest: Manifest) -> list[Path]:
    """The index files of a remote set, kept under the cache folder by their digests."""
    folder = cache_root() / "indexes"
    files = [folder / f"{shard.index_sha256}.index" for shard in manifest.shards]

    def fetch(file: Path, shard: Shard) -> None:
        if not _is_good(file, shard):
            content = _fetch_index(join(location, index_name(shard.name)), shard)
            with cache_faults(folder):
                write_atomic(file, content)

    with cache_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    different = dict(zip(files, manifest.shards, strict=True))  # equal ones are written once
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        list(pool.map(fetch, different.keys(), different.values()))
    return files


def _fetch_index(location: str, shard: Shard) -> bytes:
    """What a proxy or a failing server may send in its place is not taken for it."""
    for _ in range(2):
        data = read_bytes(location)
        with contextlib.suppress(DataError):
            parse_index(data, shard, location)
            return data
    raise DataError(
        f"{shown(location)} is not the index that the {MANIFEST} beside it describes;"
        " put both there anew, or check the server and its proxies"
    )


def _is_good(file: Path, shard: Shard) -> bool:
    with contextlib.suppress(DataError):
        read_index(file, shard)
        return True
    return False


def _scan_once(
    places: Sequence[Place], location: str, cache: ShardCache
) -> tuple[Manifest, Sequence[Place], Sequence[np.ndarray | Path]]:
    """What a scan finds, or found before. One process scans; others that start with it wait."""
    folder = cache_root() / "manifests" / identity(places)
    with _lock(folder):
        manifest = _read_kept(folder)
        if manifest is None:
            logger.info("%s has no manifest: scanning %d shards", shown(location), len(places))
            manifest, indexes = scan_places(places, cache)
            try:
                write_manifest(folder, manifest, indexes)
            except OSError as error:
                logger.warning("%s: %s; this scan is not kept", folder, error.strerror)
                return manifest, places, indexes
    return manifest, places, [folder / index_name(shard.name) for shard in manifest.shards]


def _read_kept(folder: Path) -> Manifest | None:
    """The manifest of an earlier scan; None if it is missing or damaged: it can be made again."""
    with contextlib.suppress(DataError):
        manifest = read_manifest(folder)
        files = [folder / index_name(shard.name) for shard in manifest.shards]
        with ThreadPoolExecutor(_INDEX_THREADS) as pool:
            if all(pool.map(_is_good, files, manifest.shards)):
                return manifest
    return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time; by none where the folder cannot be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock"))
        yield
