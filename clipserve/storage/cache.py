"""Where shards come from when they are not local files: `expand`, `read_bytes`, `ShardCache`.

The cache is a folder that any number of processes and threads share without a server:

    <sha256>.tar          a whole, checked copy; its time of change says when it was last asked for
    <sha256>.plain.tar    what was inside a gzip'd one; the digest is that of the shard as served
    <key>.tmp             being written by whoever holds its flock; left by the dead if nobody does
    <key>.known           size and digest of a location that came without
    <key>.failed          when and why a location could not be read, after all retries
    lock                  held for the moment in which room is made or a whole copy gets its name
"""

import contextlib
import errno
import functools
import glob
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from clipserve.errors import DataError
from clipserve.files import sync
from clipserve.storage.locations import (
    MAX_LOCATIONS,
    braces,
    is_remote,
    local_path,
    scheme,
    shown,
)
from clipserve.storage.locks import locked, locked_temporary, remove_unlocked
from clipserve.storage.receive import GZIP_MAGIC, Receiver, cache_faults
from clipserve.storage.transfer import (
    Interrupted,
    MissingError,
    StorageError,
    file_faults,
    file_system,
    opened,
    retried,
)

RETRIES = 5
BACKOFF_S = 1.0  # with five retries, half a minute of patience
_REFUSED_S = 30.0  # after all retries
_COPY = re.compile(r"[0-9a-f]{64}(\.plain)?\.tar")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.tmp")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KNOWN = re.compile(r"(\d+) ([0-9a-f]{64})\n")
_FAILED = re.compile(r"(\d+) (.+)\n")


def cache_root() -> Path:
    """$CLIPSERVE_CACHE, or else ~/.cache/clipserve."""
    return Path(os.environ.get("CLIPSERVE_CACHE") or "~/.cache/clipserve").expanduser()


def expand(location: str) -> list[str]:
    """The locations a pattern stands for: braces in their order, then globs, each sorted.

    http and pipe have no globs. Without a pattern, the location itself, whether or not it exists.
    """
    if not is_remote(location) and os.path.exists(local_path(location)):
        return [str(local_path(location))]
    found = list(islice(_globbed(braces(location)), MAX_LOCATIONS + 1))
    if len(found) > MAX_LOCATIONS:
        raise DataError(
            f"{shown(location)} stands for more than {MAX_LOCATIONS} locations; "
            "give fewer, larger shards"
        )
    return found


def read_bytes(
    location: str,
    max_bytes: int = 2**28,
    retries: int = RETRIES,
    timeout: float = 60.0,
    backoff_s: float = BACKOFF_S,
) -> bytes:
    """All of a small file, a manifest or an index. MissingError when it is not there."""

    def attempt() -> bytes:
        content = bytearray()
        with opened(location, timeout) as stream:
            for chunk in stream.chunks:
                content += chunk
                if len(content) > max_bytes:
                    raise DataError(
                        f"{shown(location)} is larger than the {max_bytes} bytes such a file "
                        "may have; check the location"
                    )
        if stream.size not in (None, len(content)):
            raise Interrupted(f"ended after {len(content)} of {stream.size} bytes")
        return bytes(content)

    return retried(location, attempt, retries, backoff_s)


@dataclass(frozen=True)
class CachedCopy:
    """A local copy; size and digest are those of the shard as served, before unpacking."""

    path: Path
    num_bytes: int
    sha256: str


class ShardCache:
    """Local copies of remote shards, the least recently used of them removed for new ones.

    Holds no open file and no thread: it may be pickled, forked, and shared by threads.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        retries: int = RETRIES,
        timeout: float = 60.0,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.retries = retries
        self.timeout = timeout
        self.backoff_s = backoff_s

    def fetch(self, location: str, num_bytes: int | None = None, sha256: str | None = None) -> Path:
        """The path of a whole local copy, downloaded when it is not there yet.

        `num_bytes` and `sha256` are those of the content as served; without a digest, a copy is
        trusted for as long as it is kept. A gzip'd shard is kept unpacked; a plain local file is
        its own copy. A copy may be removed for another at any moment, so open it soon, or use
        `open`: who has it open keeps it. After a StorageError, no process asks for the location
        again for half a minute; all raise the same.
        """
        if not is_remote(location) and not _is_gzip(location):
            return local_path(location)
        return self._obtain(location, num_bytes, sha256).path

    def identify(self, location: str) -> CachedCopy:
        """The copy of a shard of which nothing is known yet, with what its manifest should say."""
        return self._obtain(location, None, None)

    def open(self, location: str, num_bytes: int | None = None, sha256: str | None = None) -> int:
        """A descriptor of the copy, which stays readable when the copy is removed for another."""
        for _ in range(self.retries + 1):
            path = self.fetch(location, num_bytes, sha256)
            if path == local_path(location):
                with _read_faults(location):
                    return os.open(path, os.O_RDONLY)
            with cache_faults(self.folder), contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY)
        raise StorageError(
            f"{shown(location)}: its copy is removed for others as soon as it is made; "
            f"let the cache {self.folder} hold more than {self.max_bytes} bytes"
        )

    def _obtain(self, location: str, num_bytes: int | None, digest: str | None) -> CachedCopy:
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise DataError(
                f"{shown(location)}: the manifest's sha256 {digest[:80]!r} is not 64 hex digits; "
                "make it again with `clipserve verify`"
            )
        with cache_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        key = digest or _key(location)
        while True:
            if found := self._find(key, num_bytes, digest):
                return found
            temporary = locked_temporary(self.folder / f"{key}.tmp")
            with cache_faults(self.folder), temporary as descriptor:
                if descriptor is None:  # whoever held it is done
                    continue
                if found := self._find(key, num_bytes, digest):
                    return found
                with _failing_once(self.folder / f"{_key(location)}.failed"):
                    return self._download(descriptor, key, location, num_bytes, digest)

    def _find(self, key: str, num_bytes: int | None, digest: str | None) -> CachedCopy | None:
        with cache_faults(self.folder):
            if digest is None:
                known = _read_known(self.folder / f"{key}.known")
                if known is None or num_bytes not in (None, known[0]):
                    return None
                num_bytes, digest = known
            for path in (self.folder / f"{digest}.tar", self.folder / f"{digest}.plain.tar"):
                with contextlib.suppress(FileNotFoundError):
                    size = path.stat().st_size
                    if path.name.endswith(".plain.tar") or num_bytes in (None, size):
                        _touch(path)
                        return CachedCopy(path, size if num_bytes is None else num_bytes, digest)
        return None

    def _download(
        self,
        descriptor: int,
        key: str,
        location: str,
        num_bytes: int | None,
        digest: str | None,
    ) -> CachedCopy:
        def reserve(size: int) -> None:
            self._make_room(descriptor, size, location)

        receiver = Receiver(location, descriptor, self.folder, self.max_bytes, reserve)
        receiver.reserve(num_bytes or 0)
        retried(
            location,
            lambda: receiver.receive(num_bytes, digest, self.timeout),
            self.retries,
            self.backoff_s,
        )
        name = f"{receiver.sha256}{'.plain' if receiver.is_gzip else ''}.tar"
        with cache_faults(self.folder):
            receiver.finish()
            # Under the lock: a directory read meanwhile can show a renamed file under neither name,
            # and whoever makes room would not count it.
            with locked(self.folder / "lock"):
                (self.folder / f"{key}.tmp").replace(self.folder / name)
            sync(self.folder)
            if digest is None:
                known = f"{receiver.num_bytes} {receiver.sha256}\n"
                (self.folder / f"{key}.known").write_text(known)
        return CachedCopy(self.folder / name, receiver.num_bytes, receiver.sha256)

    def _make_room(self, descriptor: int, size: int, location: str) -> None:
        """Let the temporary file take `size` bytes; waits when other downloads hold the room."""
        if size > self.max_bytes:
            raise DataError(
                f"{shown(location)} takes {size} bytes or more, and the cache {self.folder} "
                f"may hold {self.max_bytes}; let it hold more"
            )
        deadline = time.monotonic() + self.timeout
        while not self._has_made_room(descriptor, size):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{shown(location)}: other downloads hold the {self.max_bytes} bytes of the "
                    f"cache {self.folder}; let it hold more"
                )
            time.sleep(0.05)

    def _has_made_room(self, descriptor: int, size: int) -> bool:
        """Removes copies as needed. The size of a temporary file is its reservation."""
        with cache_faults(self.folder), locked(self.folder / "lock"):
            _remove_leftovers(self.folder)
            files = _files(self.folder)
            excess = sum(status.st_size for _, status in files) - self.max_bytes
            excess += size - os.fstat(descriptor).st_size
            copies = [(path, status) for path, status in files if _COPY.fullmatch(path.name)]
            for path, status in sorted(copies, key=lambda item: item[1].st_mtime_ns):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= status.st_size
            if excess > 0:
                return False
            os.ftruncate(descriptor, size)
            return True


def _globbed(locations: Iterable[str]) -> Iterator[str]:
    for location in locations:
        kind = scheme(location)
        if kind in ("http", "https", "pipe"):
            yield location
        elif kind == "file":
            path = str(local_path(location))
            has_glob = glob.has_magic(path) and not os.path.exists(path)
            yield from _sorted(location, glob.iglob(path)) if has_glob else [path]
        elif glob.has_magic(location):
            names = retried(location, functools.partial(_remote_glob, location), RETRIES, BACKOFF_S)
            yield from _sorted(location, names)
        else:
            yield location


def _remote_glob(location: str) -> list[str]:
    filesystem, path = file_system(location)
    with file_faults(location):
        return [filesystem.unstrip_protocol(name) for name in filesystem.glob(path)]


def _sorted(pattern: str, matches: Iterable[str]) -> list[str]:
    found = sorted(islice(matches, MAX_LOCATIONS + 1))
    if not found:
        raise MissingError(f"no file matches {shown(pattern)}; check the pattern")
    return found


def _is_gzip(location: str) -> bool:
    with _read_faults(location), local_path(location).open("rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def _key(location: str) -> str:
    """Of a location that came without a digest; a local one is another when it is written to."""
    identity: list[str | int] = [location]
    if not is_remote(location):
        with _read_faults(location):
            status = local_path(location).stat()
        identity = [str(local_path(location).absolute()), status.st_size, status.st_mtime_ns]
    return blake2b(repr(identity).encode(), digest_size=32).hexdigest()


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except FileNotFoundError:
        raise
    except OSError as error:  # copies of another user, or on a disk that is not to be written to
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS):
            raise


def _read_known(path: Path) -> tuple[int, str] | None:
    try:
        match = _KNOWN.fullmatch(path.read_text(errors="replace"))
    except FileNotFoundError:
        return None
    return (int(match[1]), match[2]) if match else None


@contextlib.contextmanager
def _failing_once(record: Path) -> Iterator[None]:
    """Raise what failed lately anew, instead of going through all the retries once more.

    Else each process that needs a shard would wait for all of them, one after the other.
    """
    _raise_recorded(record)
    try:
        yield
    except StorageError as error:
        with contextlib.suppress(OSError):
            record.write_text(f"{int(time.time())} {error}\n")
        raise


def _raise_recorded(record: Path) -> None:
    try:
        match = _FAILED.fullmatch(record.read_text(errors="replace"))
    except FileNotFoundError:
        return
    if match and 0 <= time.time() - int(match[1]) < _REFUSED_S:
        raise StorageError(match[2])
    record.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of processes that died: nobody holds their lock."""
    for path in folder.glob("*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            remove_unlocked(path)


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        if _COPY.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return found


@contextlib.contextmanager
def _read_faults(location: str) -> Iterator[None]:
    try:
        with file_faults(location):
            yield
    except Interrupted as fault:
        raise StorageError(f"{shown(location)} cannot be read: {fault}; check its disk") from fault
