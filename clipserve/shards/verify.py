"""Shards against their manifest, byte by byte; those without one get it. Start at `verify`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipserve.errors import DataError
from clipserve.shards.manifest import (
    BadSample,
    Manifest,
    Shard,
    index_name,
    read_index,
    read_manifest,
    write_manifest,
)
from clipserve.shards.places import Place, check_no_others, find_places, manifest_folder
from clipserve.shards.scan import Progress, scan_places
from clipserve.storage import is_remote, local_path

_NUM_DUPLICATES_NAMED = 5


@dataclass(frozen=True)
class Duplicates:
    """Pictures that are the same byte for byte. They stay in the set."""

    groups: int
    samples: int
    """in all groups together"""
    first: list[list[str]]
    """a few of them: shard:key of each sample in the group"""


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    manifest: Manifest
    problems: list[str]
    """where the shards disagree with the manifest beside them, one line each"""
    duplicates: Duplicates
    written: Path | None
    """the folder that got a new manifest"""

    @property
    def bad(self) -> tuple[BadSample, ...]:
        return self.manifest.bad

    @property
    def num_out_of_order(self) -> int:
        return sum(shard.num_out_of_order for shard in self.manifest.shards)


def verify(
    location: str | Path,
    *,
    decode: bool = False,
    rescan: bool = False,
    write: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Scan shards anew and compare every byte with their manifest.

    A folder that has none gets one, and with `rescan` a new one; not with `write` off, nor where
    nobody may write. Raises DataError for shards that are not there, except those a manifest lists.
    """
    location = str(location)
    folder = None if is_remote(location) else manifest_folder(location)
    if folder is not None and not rescan:
        return _compare(folder, decode, progress)
    places = find_places(str(folder or location))
    manifest, indexes = scan_places(places, decode=decode, progress=progress)
    target = None if is_remote(location) else local_path(location)
    written = folder or target
    if written is None or not written.is_dir() or not (write and _is_writable(written)):
        written = None
    else:
        write_manifest(written, manifest, indexes)
    return Report(manifest, [], _find_duplicates(manifest, indexes), written)


def _compare(folder: Path, decode: bool, progress: Progress | None) -> Report:
    expected = read_manifest(folder)
    check_no_others(folder, expected)
    present = [shard for shard in expected.shards if (folder / shard.name).is_file()]
    places = [Place(shard.name, str(folder / shard.name)) for shard in present]
    found, indexes = scan_places(places, decode=decode, progress=progress)
    missing = [shard for shard in expected.shards if shard not in present]
    problems = [f"{shard.name} is missing" for shard in missing]
    bad = set(expected.bad)
    for shard, scanned, index in zip(present, found.shards, indexes, strict=True):
        if scanned.sha256 != shard.sha256:
            problems.append(f"{shard.name} is damaged: its sha256 is not the manifest's")
        elif {entry for entry in found.bad if entry.shard == shard.name} <= bad:
            problems += _compare_index(folder, shard, index)
    # What was bad when the manifest was made, and what a closer look now finds.
    bad |= set(found.bad)
    manifest = Manifest(expected.shards, tuple(sorted(bad, key=lambda b: (b.shard, b.key, b.kind))))
    return Report(manifest, problems, _find_duplicates(found, indexes), None)


def _compare_index(folder: Path, shard: Shard, scanned: np.ndarray) -> list[str]:
    name = index_name(shard.name)
    try:
        index = read_index(folder / name, shard)
    except DataError as error:
        return [str(error)]
    if np.array_equal(index, scanned):
        return []
    return [f"{name} is damaged; `clipserve verify --rescan` makes it anew"]


def _is_writable(folder: Path) -> bool:
    # By its mode alone, for root may write anywhere: a folder made read-only is meant to stay so.
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _find_duplicates(manifest: Manifest, indexes: Sequence[np.ndarray]) -> Duplicates:
    hashes = np.concatenate([index["image_hash"] for index in indexes] or [np.empty(0, np.uint64)])
    values, counts = np.unique(hashes, return_counts=True)
    repeated = values[counts > 1]
    starts = np.cumsum([0, *map(len, indexes)])
    first = []
    for value in repeated[:_NUM_DUPLICATES_NAMED]:
        group_names = []
        for i in np.flatnonzero(hashes == value)[:_NUM_DUPLICATES_NAMED]:
            shard = int(np.searchsorted(starts, i, side="right")) - 1
            key = indexes[shard][i - starts[shard]]["key"].decode()
            group_names.append(f"{manifest.shards[shard].name}:{key}")
        first.append(group_names)
    return Duplicates(len(repeated), int(counts[counts > 1].sum()), first)
