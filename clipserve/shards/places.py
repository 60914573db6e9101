"""Which shards a location names, and where each of them is. Start at `find_places`."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipserve.errors import DataError
from clipserve.shards.manifest import FORMAT_VERSION, MANIFEST, Manifest
from clipserve.storage import (
    MissingError,
    ShardCache,
    cache_root,
    expand,
    is_remote,
    local_path,
    shown,
)
from clipserve.storage.locations import scheme

UNFINISHED = ".pack.json"
"""stands in a folder for as long as `clipserve pack` has not finished it"""
_CACHE_BYTES = 100 * 2**30
_ENDINGS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Place:
    """One shard: its name in a manifest, a plain file name, and where it is."""

    name: str
    location: str


def default_cache() -> ShardCache:
    """Where copies of shards go when nobody said where."""
    return ShardCache(cache_root() / "shards", _CACHE_BYTES)


def is_shard_source(location: str | Path) -> bool:
    """Whether this is a .tar, a manifest, a pattern of them, or a local folder that holds shards.

    A remote location is judged by its name alone.
    """
    location = str(location)
    if not is_remote(location) and local_path(location).is_dir():
        folder = local_path(location)
        return (folder / MANIFEST).is_file() or bool(_tars(folder))
    return is_manifest(location) or _is_tar(location)


def is_manifest(location: str) -> bool:
    return _last_part(location) == MANIFEST


def check_finished(folder: Path) -> None:
    """DataError for a folder that `clipserve pack` was stopped in."""
    if (folder / UNFINISHED).exists():
        raise DataError(
            f"{folder} is a half-made pack; run the same `clipserve pack` again to complete it"
        )


def manifest_folder(location: str) -> Path | None:
    """The local folder a location means, if it has a manifest. DataError for a half-made pack."""
    path = local_path(location)
    folder = path.parent if path.name == MANIFEST else path
    if not folder.is_dir():
        return None
    check_finished(folder)
    return folder if (folder / MANIFEST).is_file() else None


def find_places(location: str) -> list[Place]:
    """The shards of a folder, a file or a pattern. Raises DataError when there is none."""
    if not is_remote(location) and local_path(location).is_dir():
        found = [str(file) for file in _tars(local_path(location))]
    elif scheme(location) not in ("file", "pipe") and not _is_tar(location):
        found = _list_remote_folder(location)
    else:
        found = expand(location)
    if not is_remote(location):
        # A file that is named outright may be called anything; a pattern gives only files.
        found = [file for file in found if not local_path(file).is_dir()]
        if len(found) == 1 and not local_path(found[0]).exists():
            found = []
    if not found:
        raise DataError(f"{shown(location)} holds no .tar shards; `clipserve pack` makes them")
    return [Place(*pair) for pair in zip(_names(found), found, strict=True)]


def check_no_others(folder: Path, manifest: Manifest) -> None:
    """DataError for shards in a folder that its manifest does not know."""
    names = {shard.name for shard in manifest.shards}
    others = {file.name for file in _tars(folder)} - names
    if others:
        raise DataError(
            f"{folder} holds shards that its manifest does not list: {', '.join(sorted(others))};"
            f" move them away, or `clipserve verify --rescan {folder}` to take them in"
        )


def identity(places: Sequence[Place]) -> str:
    """A digest of where shards are and, of local ones, when they changed last."""
    facts: list[object] = [FORMAT_VERSION]
    for place in places:
        if is_remote(place.location):
            facts.append([place.name, place.location])
            continue
        path = local_path(place.location).absolute()
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}") from None
        facts.append([place.name, os.fsdecode(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _list_remote_folder(location: str) -> list[str]:
    """Its shards. DataError where there are none, or nobody can know, as over http."""
    with contextlib.suppress(MissingError):
        if scheme(location) not in ("http", "https"):
            return expand(location.rstrip("/") + "/*.tar")
    raise DataError(
        f"{shown(location)} is no folder with a {MANIFEST}, nor one whose .tar shards can be"
        f" listed; name {MANIFEST} or a pattern, as in DIR/{{000..099}}.tar"
    )


def _tars(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.name.endswith(_ENDINGS) and not f.is_dir())


def _is_tar(location: str) -> bool:
    return location.endswith(_ENDINGS) or _last_part(location).endswith(_ENDINGS)


def _last_part(location: str) -> str:
    """The file name in a path, a URL without its query, or the last word of a command."""
    words = shown(location).rpartition("/")[2].split() if is_remote(location) else []
    return words[-1] if words else Path(location).name


def _names(locations: list[str]) -> list[str]:
    """A plain file name for each; with its folder's name, or a number, where names repeat."""
    names = [_last_part(location) or "shard" for location in locations]
    if len(set(names)) == len(names):
        return names
    folders = [shown(location).rstrip("/").split("/")[-2:-1] for location in locations]
    longer = ["-".join([*folder, name]) for folder, name in zip(folders, names, strict=True)]
    if len(set(longer)) == len(longer):
        return longer
    repeated = {location for location, count in Counter(locations).items() if count > 1}
    if repeated:
        raise DataError(f"{shown(min(repeated))} is named twice; name each shard once")
    return [f"{number:06d}-{name}" for number, name in enumerate(names)]
