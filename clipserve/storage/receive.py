"""One download: a stream, checked and unpacked on the way, into a temporary file.

Start at `Receiver.receive`. It is called again after each interruption, and goes on from where it
was if the other side can.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from clipserve.errors import DataError
from clipserve.storage.transfer import Interrupted, Stream, opened

GZIP_MAGIC = b"\x1f\x8b"
_GROWTH_BYTES = 16 * 2**20
_PIECE_BYTES = 64 * 2**10


class Receiver:
    """What was received of `location`, and how much of it is in the file `descriptor`.

    The file is in the cache `folder` of `max_bytes`, in which `reserve(size)` must let it grow to
    `size` bytes, or raise.
    """

    def __init__(
        self,
        location: str,
        descriptor: int,
        folder: Path,
        max_bytes: int,
        reserve: Callable[[int], None],
    ) -> None:
        self._location = location
        self._descriptor = descriptor
        self._folder = folder
        self._max_bytes = max_bytes
        self._reserve_file = reserve
        self._reserved = 0
        self._version = ""
        self._restart()

    def _restart(self) -> None:
        self._head = b""
        self._received = 0
        self._written = 0
        self._digest = sha256()
        self._gunzip: _Gunzip | None = None

    @property
    def is_gzip(self) -> bool:
        return self._gunzip is not None

    @property
    def num_bytes(self) -> int:
        """As served, not as written."""
        return self._received

    @property
    def sha256(self) -> str:
        """Of the content as served."""
        return self._digest.hexdigest()

    def receive(self, num_bytes: int | None, digest: str | None, timeout: float) -> None:
        """One attempt at all of the content. Raises Interrupted when another is worth while."""
        may_resume = bool(self._version or digest)
        start = self._received if may_resume else 0
        try:
            with opened(self._location, timeout, start=start, version=self._version) as stream:
                self._begin(stream, num_bytes)
                for chunk in stream.chunks:
                    self._add(chunk, num_bytes)
            self._end(num_bytes, digest, stream.size)
        except Interrupted as fault:
            if fault.restart:
                self._restart()
            raise

    def reserve(self, size: int) -> None:
        """Have room for at least `size` bytes."""
        if size > self._reserved:
            self._reserve_file(size)
            self._reserved = size

    def finish(self) -> None:
        """Give back room that was not needed, and flush to disk."""
        os.ftruncate(self._descriptor, self._written)
        os.fsync(self._descriptor)

    def _begin(self, stream: Stream, num_bytes: int | None) -> None:
        if stream.start != self._received:
            self._restart()
        if stream.start != self._received:
            raise Interrupted("the server answered with another part than asked for")
        self._version = stream.version
        if num_bytes is not None and stream.size not in (None, num_bytes):
            raise Interrupted(f"has {stream.size} bytes, {num_bytes} by its manifest", restart=True)
        self.reserve(stream.size or 0)

    def _add(self, chunk: bytes, num_bytes: int | None) -> None:
        is_start = self._received < len(GZIP_MAGIC)
        self._received += len(chunk)
        if num_bytes is not None and self._received > num_bytes:
            raise Interrupted(f"has more than the {num_bytes} bytes of its manifest", restart=True)
        self._digest.update(chunk)
        if is_start:  # a first chunk may be shorter than the magic bytes
            chunk, self._head = self._head + chunk, b""
            if len(chunk) < len(GZIP_MAGIC):
                self._head = chunk
                return
            self._gunzip = _Gunzip() if chunk.startswith(GZIP_MAGIC) else None
        for piece in self._gunzip.feed(chunk) if self._gunzip else [chunk]:
            self._write(piece)

    def _end(self, num_bytes: int | None, digest: str | None, served: int | None) -> None:
        expected = served if num_bytes is None else num_bytes
        if expected is not None and self._received < expected:
            raise Interrupted(f"ended after {self._received} of {expected} bytes")
        if digest is not None and self.sha256 != digest:
            raise Interrupted("its content is not that of its manifest (sha256)", restart=True)
        is_proven = expected is not None or digest is not None
        if self._gunzip is not None:
            self._write(self._gunzip.rest())
            if self._gunzip.is_cut and not is_proven:
                raise Interrupted(f"ended within its gzip stream, after {self._received} bytes")
        self._write(self._head)

    def _write(self, data: bytes) -> None:
        end = self._written + len(data)
        if end > self._reserved:
            growth = min(end, _GROWTH_BYTES)
            self.reserve(max(end, min(end + growth, self._max_bytes)))
        with cache_faults(self._folder):
            view = memoryview(data)
            while view:
                count = os.pwrite(self._descriptor, view, self._written)
                self._written += count
                view = view[count:]


class _Gunzip:
    """Unpacks chunk by chunk; of a damaged stream, all that comes before the damage.

    What is missing behind it is for the scan of the shard to name.
    """

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=31)
        self._is_over = False  # what follows the last member is of no interest, as in gzip itself
        self.is_cut = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Pieces of bounded size, however much `data` unpacks to."""
        while data and not self._is_over:
            if self._decompressor.eof and not self._next_member(data):
                return
            before = self._decompressor.copy()
            try:
                piece = self._decompressor.decompress(data, _PIECE_BYTES)
            except zlib.error:
                self._is_over = True
                yield _before_damage(before, data)
                return
            self.is_cut = not self._decompressor.eof
            data = self._decompressor.unconsumed_tail or self._decompressor.unused_data
            yield piece

    def rest(self) -> bytes:
        """What the last chunk left within."""
        return b"" if self._is_over else self._decompressor.flush()

    def _next_member(self, data: bytes) -> bool:
        self._is_over = not data.startswith(GZIP_MAGIC[: len(data)])
        if not self._is_over:
            self._decompressor = zlib.decompressobj(wbits=31)
        return not self._is_over


def _before_damage(decompressor: "zlib._Decompress", data: bytes) -> bytes:
    pieces = []
    with contextlib.suppress(zlib.error):
        for i in range(len(data)):
            pieces.append(decompressor.decompress(data[i : i + 1]))
    return b"".join(pieces)


@contextlib.contextmanager
def cache_faults(folder: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is no fault of the other side."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be written: {error.strerror}; free some space, or choose "
            "another folder with CLIPSERVE_CACHE"
        ) from error
