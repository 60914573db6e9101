"""WebDataset shards: what they hold, and reading any sample by its place.

    000000.tar      key.jpg|png|webp, key.txt, key.json: readable by any WebDataset reader
    000000.index    one row per sample: its key, and the place of each member
    manifest.json   per shard its size, sha256, count; the bad samples; a fingerprint

Shards without a manifest are scanned once, and what was found is kept in the cache folder.

    shard_set.py    ShardSet, Sample: any sample by its number
    places.py       a location -> the shards it names
    opening.py      a location -> manifest and indexes, read or scanned
    manifest.py     manifest.json and the index files
    scan.py         one pass over a shard; all shards side by side
    tar.py          tar headers, walked tolerantly
    grouping.py     tar members -> samples, and the bad ones
    verify.py       `clipserve verify`
    open_files.py   descriptors shared by threads and forks
"""

from clipserve.shards.grouping import IMAGE_EXTENSIONS, is_utf8
from clipserve.shards.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    BadSample,
    Manifest,
    Shard,
    read_manifest,
    write_manifest,
)
from clipserve.shards.places import UNFINISHED, is_shard_source
from clipserve.shards.shard_set import Sample, ShardSet

__all__ = [
    "FORMAT_VERSION",
    "IMAGE_EXTENSIONS",
    "MANIFEST",
    "UNFINISHED",
    "BadSample",
    "Manifest",
    "Sample",
    "Shard",
    "ShardSet",
    "is_shard_source",
    "is_utf8",
    "read_manifest",
    "write_manifest",
]
