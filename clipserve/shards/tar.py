"""The members of a tar file of untrusted bytes, also behind damage.

Python's tarfile, and so every reader built on it, takes a damaged header for the end of the archive
and drops the rest without a word. `walk` checks each header's checksum, reports what it cannot
read, and goes on at the next valid header. Formats: ustar, GNU and PAX (POSIX.1-2001).

Memory is bounded, and so is time: no byte is looked at more than a fixed number of times.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
_ZEROS = bytes(BLOCK)
# Searches begin small, so that damage everywhere costs little each time, and double.
_FIRST_CHUNK_BYTES, _MAX_CHUNK_BYTES = 2**11, 2**20
_MAX_EXTENDED_BYTES = 2**20
_MAX_END_BYTES = 2**16  # GNU tar pads to a record, 10 KiB unless told; more was never filled
_CHECKSUM_AND_MAGIC = re.compile(rb"(?=[ 0-7]{6}[ 0-7\0][ \0].{101}ustar)", re.DOTALL)
_OCTAL = b"01234567"

Read = Callable[[int, int], bytes]
"""read(offset, size): so many bytes of the file, or fewer at its end, like os.pread"""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in the archive: `size` bytes at `offset`."""

    name: str
    """bytes that are not UTF-8 as surrogates"""
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that hold no member: one stretch, from the last readable header to the next.

    `kind`: damaged_header, hole (zeros with data behind them), cut (the file ends inside a member),
    missing_end (no end marker), not_a_tar (not one header in the file).
    """

    offset: int
    length: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    type: bytes
    may_be_cut: bool
    """whether the name could be the stump of one whose extended header was lost"""


def walk(read: Read, size: int) -> Iterator[Member | Damage]:
    """Members and damage of the first `size` bytes, in their order there."""
    walker = _Walker(read, size)
    found_member = False
    pending: Damage | None = None
    for found in walker:
        if isinstance(found, Damage):
            pending = _join(pending, found)
            continue
        if pending:
            yield pending
            pending = None
        found_member = True
        yield found
    if pending and not found_member and not walker.found_header:
        reason = "is empty" if size == 0 else "holds not one tar header"
        pending = Damage(0, size, "not_a_tar", reason)
    if pending:
        yield pending


def _join(first: Damage | None, second: Damage) -> Damage:
    """Damage with no member in between is one damage, of the first's kind."""
    if first is None:
        return second
    end = second.offset + second.length
    return Damage(first.offset, end - first.offset, first.kind, first.reason)


class _Walker:
    def __init__(self, read: Read, size: int) -> None:
        self._read, self._size = read, size
        self._offset = 0
        self._data = 0
        """behind the last valid header"""
        self._held: Member | None = None
        """the member there, until what follows shows that its size is right"""
        self._extended: dict[bytes, bytes] = {}
        """of the next member: its full name ("path") and size"""
        self._uses_extended = False
        self._is_behind_damage = False
        self._has_end = False
        self._zeros = range(0)
        """the zeros passed last: many headers could claim to end in them"""
        self.found_header = False

    def __iter__(self) -> Iterator[Member | Damage]:
        while self._offset < self._size:
            block = self._read(self._offset, BLOCK)
            if block == _ZEROS:
                yield from self._pass_zeros()
            elif len(block) < BLOCK:
                yield from self._pass_stump(block)
            else:
                yield from self._pass_header(block)
        yield from self._release()
        if not self._has_end:
            yield Damage(self._size, 0, "missing_end", "ends without an end marker: it was cut")

    def _release(self) -> Iterator[Member]:
        if self._held:
            yield self._held
        self._held = None

    def _pass_header(self, block: bytes) -> Iterator[Member | Damage]:
        header = parse_header(block)
        if header is None:
            reason = f"has a damaged header at byte {self._offset}"
            yield from self._resynchronise("damaged_header", reason, self._offset)
            return
        yield from self._release()
        self.found_header = True
        extended, self._extended = self._extended, {}
        is_doubtful = self._is_behind_damage and self._uses_extended and not extended
        self._is_behind_damage = False
        size = _extended_size(extended, header.size)
        start, self._data = self._offset, self._offset + BLOCK
        if size is None or (is_doubtful and header.may_be_cut):
            reason = f"has a header at byte {start} without its long name or its size"
            yield from self._resynchronise("damaged_header", reason, start)
        elif self._data + size > self._size:
            reason = f"ends at byte {self._size}, inside the member at byte {start}"
            yield from self._resynchronise("cut", reason, start)
        elif header.type in (b"x", b"L") and size > _MAX_EXTENDED_BYTES:
            reason = f"has an extended header of {size} bytes at byte {start}"
            yield from self._resynchronise("damaged_header", reason, start)
        else:
            self._offset = self._data + -(-size // BLOCK) * BLOCK
            self._take(header, size, extended)

    def _take(self, header: _Header, size: int, extended: dict[bytes, bytes]) -> None:
        if header.type in (b"x", b"L"):
            records = parse_extended(self._read(self._data, size), header.type)
            self._uses_extended |= b"path" in records
            self._extended = extended | records
        elif header.type in (b"g", b"K"):
            self._extended = extended  # global, or of a link's target: not ours
        elif header.type in (b"0", b"\0", b"7"):
            name = extended.get(b"path", header.name)
            self._held = Member(name.decode("utf-8", "surrogateescape"), self._data, size)

    def _pass_zeros(self) -> Iterator[Member | Damage]:
        """Past the end marker, or past a hole up to the next header."""
        start = self._offset
        behind = self._find_data(start)
        if behind is not None:
            reason = f"has zeros from byte {start} on, and data behind them"
            first_block = behind - (behind - start) % BLOCK
            yield from self._resynchronise("hole", reason, first_block)
            return
        yield from self._release()
        self._offset = self._size
        self._has_end = True
        if self._size - start <= _MAX_END_BYTES:
            self.found_header = True  # an archive of nothing is one, too
        else:
            reason = f"has zeros from byte {start} to its end: it was never filled"
            yield Damage(start, self._size - start, "hole", reason)

    def _pass_stump(self, block: bytes) -> Iterator[Member | Damage]:
        yield from self._release()
        start, self._offset = self._offset, self._size
        self._has_end = True
        if block and not block.strip(b"\0"):
            reason = "ends inside its end marker: it was cut"
            yield Damage(start, self._size - start, "missing_end", reason)
        else:
            reason = f"ends inside the header at byte {start}"
            yield Damage(start, self._size - start, "cut", reason)

    def _find_data(self, start: int) -> int | None:
        """The first byte from `start` on that is not zero."""
        if start in self._zeros:
            return self._zeros.stop
        at, length = start, _FIRST_CHUNK_BYTES
        while at < self._size:
            chunk = self._read(at, min(length, self._size - at))
            if not chunk:
                return None  # it became shorter
            rest = chunk.lstrip(b"\0")
            at += len(chunk) - len(rest)
            if rest:
                self._zeros = range(start, at)
                return at
            length = min(2 * length, _MAX_CHUNK_BYTES)
        return None

    def _resynchronise(self, kind: str, reason: str, onward: int) -> Iterator[Member | Damage]:
        """Go to the next valid header, or to the end: one behind this block, from `onward` on.

        Unless one lies before: then bytes were lost, and the member held has fewer than it claims.
        """
        start, first = self._offset, self._data
        found = self._find_header(first, start) if first < start else None
        if found is None:
            found = self._find_header(max(onward, start + 1), self._size)
        self._offset = self._size if found is None else found
        if self._held and self._offset < self._held.offset + self._held.size:
            start, self._held = self._held.offset - BLOCK, None
        yield from self._release()
        start = min(start, self._offset)
        yield Damage(start, self._offset - start, kind, reason)
        self._data = self._offset
        self._extended = {}
        self._is_behind_damage = True

    def _find_header(self, start: int, stop: int) -> int | None:
        """The first valid header that begins in this range."""
        length = _FIRST_CHUNK_BYTES
        while start < stop:
            wanted = min(length, stop - start + BLOCK - 1, self._size - start)
            chunk = self._read(start, wanted)
            for at in _candidates(chunk, (self._offset - start) % BLOCK):
                if parse_header(chunk[at : at + BLOCK]) is not None:
                    return start + at
            if wanted < length or len(chunk) < wanted:
                return None
            start += len(chunk) - BLOCK + 1  # a header may lie across two chunks
            length = min(2 * length, _MAX_CHUNK_BYTES)
        return None


def parse_header(block: bytes) -> _Header | None:
    """One 512-byte block, or None if it is no header: its checksum is wrong or its size absurd."""
    stored = _parse_octal(block[148:156])
    # The checksum counts its own field as spaces (POSIX.1-1988 ustar).
    if stored is None or stored != sum(block[:148]) + 8 * 32 + sum(block[156:BLOCK]):
        return None
    size = _parse_size(block[124:136])
    raw_name = block[:100].split(b"\0")[0]
    if size is None or not raw_name:
        return None
    kind = block[156:157]
    if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        size = 0  # links, devices, folders: whatever the field says, no data follows
    magic = block[257:265]
    prefix = block[345:500].split(b"\0")[0] if magic.startswith(b"ustar\0") else b""
    name = prefix + b"/" + raw_name if prefix else raw_name
    # Writers put the name's first 100 bytes here, with "?" for letters that are not ASCII.
    return _Header(name, size, kind, not prefix and (len(raw_name) == 100 or b"?" in raw_name))


def parse_extended(data: bytes, type: bytes) -> dict[bytes, bytes]:
    """What a GNU long name ("L") or a PAX header ("x") says of the next member: path and size."""
    if type == b"L":
        return {b"path": data.split(b"\0")[0]}
    records, at = {}, 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(data) - at:
            break
        record = data[at + len(length) + 1 : at + int(length) - 1]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size"):
            records[key] = value
        at += int(length)
    return records


def _extended_size(extended: dict[bytes, bytes], size: int) -> int | None:
    value = extended.get(b"size")
    if value is None:
        return size
    return int(value) if value.isdigit() and len(value) < 20 else None


def _candidates(chunk: bytes, first_block: int) -> list[int]:
    """Where in the chunk a header could begin: on a block, or before "ustar" anywhere.

    Anywhere, since bytes lost or doubled in a broken transfer shift all that follows.
    """
    blocks = range(first_block, len(chunk) - BLOCK + 1, BLOCK)
    found = [block for block in blocks if _parse_octal(chunk[block + 148 : block + 156])]
    found += [match.start() - 148 for match in _CHECKSUM_AND_MAGIC.finditer(chunk, 148)]
    return sorted(at for at in found if at <= len(chunk) - BLOCK)


def _parse_octal(field: bytes) -> int | None:
    # Not int(field, 8), which takes signs, underscores and "0o", too.
    digits = field.split(b"\0")[0].strip(b" ")
    return None if digits.strip(_OCTAL) else int(digits or b"0", 8)


def _parse_size(field: bytes) -> int | None:
    if field[0] == 0x80:  # GNU base-256, for sizes over 8 GiB
        return int.from_bytes(field[1:], "big")
    return None if field[0] & 0x80 else _parse_octal(field)
