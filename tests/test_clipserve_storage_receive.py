"""What comes in gzip is kept unpacked; what is cut or damaged gives what is before."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_sites import CONTENT, OTHER, Site, copies, digest, small_cache, temporary

from clipserve.errors import DataError
from clipserve.storage import MissingError, ShardCache, StorageError


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.serving() as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return small_cache(tmp_path)


def test_a_gzipd_shard_is_kept_unpacked(site: Site, cache: ShardCache) -> None:
    packed = gzip.compress(CONTENT)
    site.files["/a.tar"] = packed
    for _ in range(2):
        path = cache.fetch(f"{site.url}/a.tar", len(packed), digest(packed))
        assert path.read_bytes() == CONTENT
    copy = cache.identify(f"{site.url}/a.tar")
    assert (copy.num_bytes, copy.sha256) == (len(packed), digest(packed))
    assert copy.path == path


def test_gzip_members_follow_each_other(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.tar"
    padding = bytes(512)
    path.write_bytes(gzip.compress(CONTENT) + gzip.compress(OTHER) + padding)
    assert cache.fetch(str(path)).read_bytes() == CONTENT + OTHER
    path.write_bytes(gzip.compress(OTHER))  # written to: another file
    assert cache.fetch(f"file://{path}").read_bytes() == OTHER


def test_a_cut_gzip_gives_what_is_before_the_cut(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.tar.gz"
    packed = gzip.compress(CONTENT)
    path.write_bytes(packed[: len(packed) // 2])
    found = cache.fetch(str(path)).read_bytes()
    assert CONTENT.startswith(found)
    assert len(found) > 0.49 * len(CONTENT)


def test_a_damaged_gzip_gives_what_is_before_the_damage(tmp_path: Path, cache: ShardCache) -> None:
    text = b"".join(b"line %06d\n" % i for i in range(60_000))
    packed = bytearray(gzip.compress(text))
    packed[-6] ^= 1  # of its checksum: all of the text is before it
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed)
    assert cache.fetch(str(path)).read_bytes() == text


def test_an_unsized_gzip_that_is_cut_is_retried(site: Site, cache: ShardCache) -> None:
    packed = gzip.compress(CONTENT)
    site.files["/a.tar"] = packed[:1000]
    site.faults["/a.tar"] = ["unsized"] * 3
    with pytest.raises(StorageError, match="ended within its gzip stream, after 1000 bytes"):
        cache.fetch(f"{site.url}/a.tar")


def test_a_gzip_bomb_stops_at_the_size_of_the_cache(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(bytes(2**25)))
    with pytest.raises(DataError, match="may hold 1048576; let it hold more"):
        cache.fetch(str(path))
    assert not copies(cache)
    assert not temporary(cache)


def test_a_plain_local_file_is_its_own_copy(tmp_path: Path, cache: ShardCache) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    assert cache.fetch(str(path)) == path
    assert not cache.folder.exists()
    descriptor = cache.open(str(path))
    assert os.read(descriptor, 10) == CONTENT[:10]
    os.close(descriptor)
    with pytest.raises(MissingError, match=r"b\.tar is not there"):
        cache.fetch(str(tmp_path / "b.tar"))
    with pytest.raises(MissingError):
        cache.open(str(tmp_path / "b.tar"))


@pytest.mark.parametrize("content", [b"", b"\x1f", b"\x1f\x8b"])
def test_the_shortest_contents_are_kept_as_they_are(
    site: Site, cache: ShardCache, content: bytes
) -> None:
    site.files["/a.tar"] = content
    found = cache.fetch(f"{site.url}/a.tar").read_bytes()
    assert found == (b"" if content == b"\x1f\x8b" else content)  # the last is a cut gzip
