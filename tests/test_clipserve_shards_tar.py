"""The walker over headers that are hostile rather than damaged."""

import io
import tarfile
from collections.abc import Callable

import pytest
from tars import samples, to_tar

from clipserve.shards.tar import Damage, Member, Read, parse_extended, parse_header, walk


def reader(data: bytes) -> Read:
    return lambda offset, size: data[offset : offset + size]


def run(data: bytes) -> tuple[list[tuple[str, bytes]], list[Damage]]:
    """Members with their bytes, and damage."""
    found = list(walk(reader(data), len(data)))
    members = [
        (entry.name, data[entry.offset : entry.offset + entry.size])
        for entry in found
        if isinstance(entry, Member)
    ]
    return members, [entry for entry in found if isinstance(entry, Damage)]


def header(name: str = "x.jpg", size_field: bytes = b"00000000000\0", type: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size_field, type
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


GOOD = samples(2)
TAR = to_tar(GOOD)


@pytest.mark.parametrize(
    "size_field",
    [
        b"\x80" + b"\xff" * 11,  # base-256, far beyond any file
        b"\xff" * 12,  # base-256, negative
        b"-0000000001\0",
        b"+0000000001\0",
        b"0000_00001\0\0",
        b"0o000000017\0",
        b"99999999999\0",
        b"77777777777\0",
    ],
)
def test_an_absurd_size_hides_nothing_behind_it(size_field: bytes) -> None:
    members, damages = run(header(size_field=size_field) + TAR)
    assert members == GOOD
    assert len(damages) == 1


def test_base_256_is_read_as_a_size() -> None:
    found = parse_header(header(size_field=b"\x80" + (9 * 2**30).to_bytes(11, "big")))
    assert found is not None
    assert found.size == 9 * 2**30


def pax(records: bytes) -> bytes:
    block = header("pax", b"%011o\0" % len(records), b"x")
    return block + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"0 path=x\n",
        b"1 path=x\n",
        b"99999999999999999999 path=x\n",
        b"-5 path=x\n",
        b"path",
        b"\xff" * 400,
        b"9 a=\0\0\0\0\n" * 40,
        b"15 size=-00001\n",
        b"35 size=99999999999999999999999999\n",
    ],
)
def test_hostile_pax_records_neither_hang_nor_hide(records: bytes) -> None:
    members, damages = run(pax(records) + TAR)
    assert [member for member in members if member in GOOD] == members
    assert len(members) >= len(GOOD) - 1  # a size that is none costs the member it is for
    assert len(damages) <= 1


def test_an_endless_chain_of_extended_headers_ends() -> None:
    members, damages = run(pax(b"18 path=other.jpg\n") * 5000 + TAR)
    assert members[0] == ("other.jpg", GOOD[0][1])
    assert members[1:] == GOOD[1:]
    assert not damages


def test_an_extended_header_of_megabytes_is_not_read() -> None:
    asked = []
    huge = header("pax", b"%011o\0" % 2**22, b"x")
    data = huge + TAR

    def read(offset: int, size: int) -> bytes:
        asked.append(size)
        return data[offset : offset + size] if offset < len(data) else bytes(size)

    found = list(walk(read, len(data) + 2**23))
    assert [entry.name for entry in found if isinstance(entry, Member)] == [n for n, _ in GOOD]
    assert max(asked) <= 2**20


def test_pax_gives_name_and_size() -> None:
    assert parse_extended(b"16 path=a/b.jpg\n12 size=700\n20 mtime=1234567.89\n", b"x") == {
        b"path": b"a/b.jpg",
        b"size": b"700",
    }
    data = pax(b"12 size=700\n") + header("x.jpg") + b"P" * 700 + bytes(324) + bytes(1024)
    assert run(data) == ([("x.jpg", b"P" * 700)], [])


def test_folders_and_links_have_no_data_whatever_they_claim() -> None:
    links = b"".join(header(f"{kind}", b"00000004000\0", bytes([kind])) for kind in b"123456")
    assert run(links + TAR) == (GOOD, [])


def test_a_plain_old_header_without_magic_is_one_also_behind_damage() -> None:
    block = bytearray(header("x.txt", b"00000000003\0"))
    block[257:] = bytes(255)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    old = bytes(block) + b"abc" + bytes(509)
    assert run(old + bytes(1024)) == ([("x.txt", b"abc")], [])
    members, damages = run(b"\1" * 1024 + old + bytes(1024))
    assert members == [("x.txt", b"abc")]
    assert [damage.kind for damage in damages] == ["damaged_header"]


def test_a_name_cut_short_by_lost_long_name_is_not_taken_for_a_name() -> None:
    long = "k" * 120 + ".jpg"
    tar = to_tar([("k" * 130 + ".txt", b"t"), (long, b"1"), ("b.jpg", b"2")], tarfile.GNU_FORMAT)
    second = tar.index(b"././@LongLink", 600)
    members, damages = run(tar[:second] + bytes([tar[second] ^ 1]) + tar[second + 1 :])
    assert [name for name, _ in members] == ["k" * 130 + ".txt", "b.jpg"]
    assert len(damages) == 1


class Counting(io.BytesIO):
    """Counts the bytes it gives."""

    given = 0

    def pread(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        data = self.read(size)
        self.given += len(data)
        return data


def zeros_between(tar: bytes) -> bytes:
    return tar[:1536] + bytes(8 * 2**20) + tar[1536:]


def noise(tar: bytes) -> bytes:
    return b"ustar" * (2 * 2**20) + tar


def lying_headers(tar: bytes) -> bytes:
    return header(size_field=b"77777777777\0") * 8000 + tar


def empty_members(tar: bytes) -> bytes:
    return header("a.xyz") * 8000 + tar


def holes(tar: bytes) -> bytes:
    return (header("a.xyz") + bytes(512)) * 4000 + tar


def nested_claims(tar: bytes) -> bytes:
    """Each header claims all up to the same hole, with the next header inside."""
    count, hole = 500, 4 * 2**20
    claims = [
        header(f"{i}.xyz", b"%011o\0" % (1024 * (count - i) - 512)) + b"x" * 512
        for i in range(count)
    ]
    return b"".join(claims) + bytes(hole) + tar


@pytest.mark.parametrize(
    "make", [zeros_between, noise, lying_headers, empty_members, holes, nested_claims]
)
def test_the_bytes_looked_at_grow_with_the_file_and_no_faster(
    make: Callable[[bytes], bytes],
) -> None:
    data = make(TAR)
    file = Counting(data)
    found = list(walk(file.pread, len(data)))
    names = {entry.name for entry in found if isinstance(entry, Member)}
    assert {name for name, _ in GOOD[3:]} <= names
    assert file.given < 6 * len(data)
