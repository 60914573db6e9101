"""Whether the write-ahead log of a database that is in use is as it was written.

SQLite verifies the checksums of its log when the first process opens it, and never again: it reads
pages from it, and copies them into the database, as they are then; the checksum VFS looks at the
database alone and gives a page that was damaged in the log a new, right checksum when it is copied.
So the log is verified here: when a database is opened, and before it is copied.

The format is in sqlite.org/fileformat2.html, section 4. Frames hold a page each; a frame's checksum
goes on from the one before it.
"""

import functools
import struct
import time
from pathlib import Path
from typing import BinaryIO

import apsw
import numpy as np

_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, two salts, checksum
_FRAME_HEADER_BYTES = 24  # page number, size of the database, two salts, checksum
_MAGIC = 0x377F0682  # and the lowest bit if checksums are over big-endian words
_FRAMES_AT_A_TIME = 64
_ATTEMPTS = 100
_WAIT_S = 1.0  # of those who can do without
_PAUSE_S = 0.005


def num_frames(connection: apsw.Connection, wait_s: float = _WAIT_S) -> tuple[int, int]:
    """Frames in the log that count, and how many of them have been copied into the database.

    apsw.BusyError if another connection copies the log, or looks at it, for longer than `wait_s`:
    SQLite's own timeout does not count here. apsw.LockedError while this one has rows of a query to
    come.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        except apsw.BusyError:
            if time.monotonic() >= until:
                break
        time.sleep(_PAUSE_S)
    raise apsw.BusyError(
        f"another process has been copying its write-ahead log for {wait_s:g} s; try again"
    )


def is_whole(connection: apsw.Connection, log: Path, wait_s: float = _WAIT_S) -> bool:
    """Whether all frames of the file `log` that count are as they were written.

    Others may write, and begin it anew, meanwhile; then it looks again. apsw.BusyError if that goes
    on for ever, or as for `num_frames`.
    """
    for _ in range(_ATTEMPTS):
        before = _start(log)  # ahead of the count, which may be that of a log begun since
        count, _ = num_frames(connection, wait_s)
        if count <= 0:  # -1 where there is none, as in a place that is read-only
            return True
        if _verify(log, count):
            return True
        if before == _start(log):
            return False  # every log has salts of its own: it was this one all the time
    raise apsw.BusyError("the write-ahead log is begun anew again and again; try again")


def _start(log: Path) -> bytes:
    """The header of the log, whose salts tell it from every other; empty if there is none."""
    try:
        with log.open("rb") as file:
            return file.read(_HEADER.size)
    except FileNotFoundError:
        return b""


def _verify(log: Path, count: int) -> bool:
    if not log.exists():
        return False
    with log.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return False
        magic, _, page_bytes, _, *salts, first, second = _HEADER.unpack(header)
        words = np.dtype(">u4" if magic & 1 else "<u4")
        if magic & ~1 != _MAGIC or page_bytes not in (2**bits for bits in range(9, 17)):
            return False
        checksum = np.array([first, second], dtype=np.uint32)
        start = np.frombuffer(header[:24], words).astype(np.uint32)
        if not np.array_equal(_checksums(start[None], np.zeros((1, 2), np.uint32))[0], checksum):
            return False
        for at in range(0, count, _FRAMES_AT_A_TIME):
            some = min(_FRAMES_AT_A_TIME, count - at)
            last = _verify_frames(file, some, page_bytes, words, salts, checksum)
            if last is None:
                return False
            checksum = last
    return True


def _verify_frames(
    file: BinaryIO,
    count: int,
    page_bytes: int,
    words: np.dtype[np.uint32],
    salts: list[int],
    checksum: np.ndarray,
) -> np.ndarray | None:
    """The checksum of the last of the next frames, if they are right after that checksum."""
    size = _FRAME_HEADER_BYTES + page_bytes
    data = file.read(count * size)
    if len(data) < count * size:
        return None
    frames = np.frombuffer(data, words).reshape(count, -1)
    stored = frames[:, 2:6].view(np.uint8).view(">u4").astype(np.uint32)  # always big-endian
    before = np.concatenate([checksum[None], stored[:-1, 2:]])
    computed = _checksums(frames, before, skipped=slice(2, 6))
    is_right = (stored[:, :2] == salts).all() and np.array_equal(computed, stored[:, 2:])
    return stored[-1, 2:] if is_right else None


def _checksums(data: np.ndarray, before: np.ndarray, skipped: slice = slice(0)) -> np.ndarray:
    """(n, 2) after the words (n, w) have been added to the sums (n, 2), all modulo 2^32.

    For each pair of words: s0 += a + s1; s1 += b + s0. That is linear, so products do it: 16 MB of
    pages take 10 ms. Some words do not count.
    """
    weights, carried = _linear(data.shape[1] - len(range(*skipped.indices(data.shape[1]))))
    weights = np.insert(weights, [skipped.start or 0] * (data.shape[1] - weights.shape[1]), 0, 1)
    data = data.astype(np.uint32, copy=False)
    sums = [np.einsum("nw,w->n", data, column) for column in weights]  # @ is ten times as slow
    return np.asarray(np.stack(sums, axis=1) + before @ carried)


@functools.cache
def _linear(num_words: int) -> tuple[np.ndarray, np.ndarray]:
    """What each word adds to the sums (2, w), and the sums from before (2, 2)."""
    weights = np.zeros((num_words, 2), dtype=np.uint32)
    kept = np.eye(2, dtype=np.uint32)  # of s0 and of s1, at the end
    for pair in range(num_words - 2, -1, -2):
        weights[pair] = kept[0] + kept[1]
        weights[pair + 1] = kept[1]
        kept = np.stack([kept[0] + kept[1], kept[0] + 2 * kept[1]])
    return np.ascontiguousarray(weights.T), kept
