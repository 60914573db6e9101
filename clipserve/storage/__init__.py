"""Where shards come from when they are not local files, and the cache that keeps them.

locations.py    paths, URLs, commands and patterns, as text
transfer.py     http(s), `pipe:`, fsspec and local files as one stream; what may go wrong
receive.py      one download: size and digest checked, resumed, unpacked
cache.py        expand, read_bytes, ShardCache
locks.py        flock
"""

from clipserve.storage.cache import CachedCopy, ShardCache, cache_root, expand, read_bytes
from clipserve.storage.locations import check_name, is_remote, join, local_path, shown
from clipserve.storage.transfer import DeniedError, MissingError, StorageError

__all__ = [
    "CachedCopy",
    "DeniedError",
    "MissingError",
    "ShardCache",
    "StorageError",
    "cache_root",
    "check_name",
    "expand",
    "is_remote",
    "join",
    "local_path",
    "read_bytes",
    "shown",
]
