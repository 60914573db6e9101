"""Locks between processes and threads, as flock has them: the kernel drops those of the dead.

The lock of a file in the making is that file itself, so a crash leaves nothing else to clean.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays; waits for whoever holds it."""
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked_temporary(path: Path) -> Iterator[int | None]:
    """The file `path`, empty and locked, removed at the end unless it was renamed.

    Waits for whoever is writing it. None when by then it is no longer the file at `path`.
    """
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not _is_at(descriptor, path):
            yield None
            return
        try:
            os.ftruncate(descriptor, 0)
            yield descriptor
        finally:
            if _is_at(descriptor, path):  # and not already the next one's
                path.unlink()


def remove_unlocked(path: Path) -> None:
    """Remove a temporary file unless somebody is writing it."""
    if not path.exists():
        return
    with contextlib.suppress(BlockingIOError), _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        # Closing alone would leave the lock to a process forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
