"""Shards from elsewhere: a server that cuts, stalls, lies and refuses; commands and fsspec."""

import errno
import os
import pickle
import select
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from shard_sites import CONTENT, OTHER, Site, copies, digest, small_cache, temporary

from clipserve import storage
from clipserve.errors import DataError
from clipserve.storage import DeniedError, MissingError, ShardCache, StorageError


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.serving() as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return small_cache(tmp_path)


def test_a_shard_is_downloaded_once(site: Site, cache: ShardCache) -> None:
    for _ in range(2):
        path = cache.fetch(f"{site.url}/a.tar", len(CONTENT), digest(CONTENT))
        assert path.read_bytes() == CONTENT
    assert site.count("/a.tar") == 1
    assert copies(cache) == [path]
    assert not temporary(cache)


def test_the_same_content_under_another_signature_is_the_same_copy(
    site: Site, cache: ShardCache
) -> None:
    for signature in ("a", "b"):
        cache.fetch(f"{site.url}/a.tar?sig={signature}", sha256=digest(CONTENT))
    assert site.count("/a.tar") == 1


def test_a_shard_of_which_nothing_is_known_is_identified(site: Site, cache: ShardCache) -> None:
    location = f"{site.url}/a.tar"
    for copy in (cache.identify(location), cache.identify(location)):
        assert (copy.num_bytes, copy.sha256) == (len(CONTENT), digest(CONTENT))
    assert cache.fetch(location) == copy.path
    assert cache.fetch(location, len(CONTENT)) == copy.path
    assert cache.fetch(location, copy.num_bytes, copy.sha256) == copy.path
    assert site.count("/a.tar") == 1


def test_a_torn_record_is_no_record(site: Site, cache: ShardCache) -> None:
    location = f"{site.url}/a.tar"
    cache.fetch(location)
    (known,) = cache.folder.glob("*.known")
    known.write_bytes(known.read_bytes()[:20])
    assert cache.fetch(location).read_bytes() == CONTENT


def test_a_damaged_copy_is_downloaded_again(site: Site, cache: ShardCache) -> None:
    location = f"{site.url}/a.tar"
    path = cache.fetch(location, len(CONTENT), digest(CONTENT))
    path.write_bytes(CONTENT[:100])
    assert cache.fetch(location, len(CONTENT), digest(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "cut", "wrong", "more"])
def test_what_passes_is_retried(site: Site, cache: ShardCache, fault: str) -> None:
    site.faults["/a.tar"] = [fault, fault]
    path = cache.fetch(f"{site.url}/a.tar", len(CONTENT), digest(CONTENT))
    assert path.read_bytes() == CONTENT
    assert site.count("/a.tar") == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "HTTP 500"),
        ("cut", "peer closed connection|incomplete|ended after"),
        ("wrong", "not that of its manifest"),
        ("more", "has 300001 bytes, 300000 by its manifest"),
    ],
)
def test_what_does_not_pass_is_a_storage_error(
    site: Site, cache: ShardCache, fault: str, message: str
) -> None:
    site.etag, site.ranges = "", False
    site.faults["/a.tar"] = [fault] * 3
    with pytest.raises(StorageError, match=message) as caught:
        cache.fetch(f"{site.url}/a.tar?sig=secret", len(CONTENT), digest(CONTENT))
    assert caught.value.transient
    assert "tried 3 times" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not copies(cache)
    assert not temporary(cache)
    again = pickle.loads(pickle.dumps(caught.value))  # it crosses from a worker to its parent
    assert (str(again), again.transient) == (str(caught.value), True)


@pytest.mark.parametrize(
    ("status", "kind"),
    [("401", DeniedError), ("403", DeniedError), ("404", MissingError), ("410", MissingError)]
    + [("400", DataError), ("204", DataError), ("302", DataError)],
)
def test_what_will_not_pass_is_raised_at_once(
    site: Site, cache: ShardCache, status: str, kind: type[DataError]
) -> None:
    site.faults["/a.tar"] = [status]
    with pytest.raises(kind) as caught:
        cache.fetch(f"{site.url}/a.tar?sig=secret")
    assert not isinstance(caught.value, StorageError)
    assert f"{site.url}/a.tar" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert site.count("/a.tar") == (6 if status == "302" else 1)
    assert not temporary(cache)


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_a_server_that_stalls_is_left(site: Site, tmp_path: Path, fault: str) -> None:
    cache = ShardCache(tmp_path, 2**20, retries=1, timeout=0.3, backoff_s=0)
    site.faults["/a.tar"] = [fault]
    assert cache.fetch(f"{site.url}/a.tar", len(CONTENT)).read_bytes() == CONTENT
    site.faults["/a.tar"] = [fault] * 2
    with pytest.raises(StorageError, match="nothing came for 0.3 s|bytes came in"):
        cache.fetch(f"{site.url}/a.tar?other", len(CONTENT))


def test_a_failure_is_shared_for_a_while(
    site: Site, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = f"{site.url}/a.tar?sig=secret"
    site.faults["/a.tar"] = ["500"] * 3
    site.files["/b.tar"] = OTHER
    others = [pickle.loads(pickle.dumps(cache)) for _ in range(4)]  # as in other processes
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(other.fetch, location, len(CONTENT)) for other in others]
        errors = [job.exception() for job in jobs]
    with pytest.raises(StorageError) as caught:
        cache.fetch(location, len(CONTENT))
    assert {str(error) for error in errors} == {str(caught.value)}
    assert "HTTP 500 (tried 3 times)" in str(caught.value)
    assert site.count("/a.tar") == 3
    assert cache.fetch(f"{site.url}/b.tar").read_bytes() == OTHER
    (record,) = cache.folder.glob("*.failed")
    assert "secret" not in record.read_text()
    monkeypatch.setattr(storage.cache, "_REFUSED_S", 0.0)
    assert cache.fetch(location, len(CONTENT)).read_bytes() == CONTENT
    assert not record.exists()


@pytest.mark.parametrize("content", ["", "9", "99999999999 from the future\n", "\0"])
def test_a_torn_record_of_a_failure_is_none(site: Site, cache: ShardCache, content: str) -> None:
    site.faults["/a.tar"] = ["500"] * 3
    with pytest.raises(StorageError):
        cache.fetch(f"{site.url}/a.tar")
    (record,) = cache.folder.glob("*.failed")
    record.write_text(content)
    assert cache.fetch(f"{site.url}/a.tar").read_bytes() == CONTENT


def test_a_cut_download_goes_on_where_it_was(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["cut"]
    assert cache.fetch(f"{site.url}/a.tar").read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == ["", f"bytes={len(CONTENT) // 2}-"]


def test_a_server_without_ranges_is_read_from_the_start(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["cut"]
    site.ranges = False
    assert cache.fetch(f"{site.url}/a.tar").read_bytes() == CONTENT


def test_a_shard_that_changes_during_a_download_is_not_mixed(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["stall"]
    cache.timeout = 0.3

    def change() -> None:
        site.halfway.wait(10)
        site.files["/a.tar"], site.etag = OTHER, '"two"'

    with ThreadPoolExecutor() as pool:
        changed = pool.submit(change)
        assert cache.fetch(f"{site.url}/a.tar").read_bytes() == OTHER
        changed.result()


def test_a_resumed_download_of_other_content_starts_over(site: Site, cache: ShardCache) -> None:
    site.etag = ""  # so that only the digest can tell
    site.faults["/a.tar"] = ["cut", "wrong"]
    path = cache.fetch(f"{site.url}/a.tar", len(CONTENT), digest(CONTENT))
    assert path.read_bytes() == CONTENT
    assert [bool(wanted) for _, wanted in site.requests] == [False, True, False]


def test_nothing_listening_is_a_storage_error(site: Site, cache: ShardCache) -> None:
    with pytest.raises(StorageError, match="127.0.0.1:1/a.tar: .*tried 3 times"):
        cache.fetch("http://me:secret@127.0.0.1:1/a.tar")


@pytest.mark.parametrize("location", ["http://", "http://[::1", "http:///a", "http://h\0/a.tar"])
def test_what_is_no_address_is_refused(cache: ShardCache, location: str) -> None:
    with pytest.raises(DataError) as caught:
        cache.fetch(location)
    assert not isinstance(caught.value, StorageError)


def test_content_that_the_server_encodes_is_decoded(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["encoded"]
    path = cache.fetch(f"{site.url}/a.tar", len(CONTENT), digest(CONTENT))
    assert path.read_bytes() == CONTENT


# Commands and fsspec.


def test_a_command_prints_a_shard(tmp_path: Path, cache: ShardCache) -> None:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    location = f"pipe:cat {tmp_path}/a.tar"
    assert cache.fetch(location, len(CONTENT), digest(CONTENT)).read_bytes() == CONTENT
    (tmp_path / "a.tar").unlink()
    assert cache.fetch(location, len(CONTENT), digest(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo 'cannot read https://h/a?secret' >&2; exit 3", r"code 3: cannot read https://h/a "),
        ("head -c 10 /dev/zero; exit 1", "code 1"),
        ("true", "the command printed nothing"),
        ("kill -9 $$", "code -9"),
    ],
)
def test_a_command_that_fails_is_retried(
    tmp_path: Path, cache: ShardCache, command: str, message: str
) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        cache.fetch(f"pipe:echo run >> {tmp_path}/log; {command}")
    assert (tmp_path / "log").read_text() == "run\n" * 3
    assert "secret" not in str(caught.value)
    assert not copies(cache)


def test_a_command_that_cannot_run_is_fatal(cache: ShardCache) -> None:
    with pytest.raises(DataError, match="the command cannot be run") as caught:
        cache.fetch("pipe:no-such-program --token secret 0.tar")
    assert not isinstance(caught.value, StorageError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("command", ["sleep 60", "echo x; exec 1>&-; sleep 60", "echo x; sleep 60"])
def test_a_command_that_hangs_is_ended_with_all_it_started(
    tmp_path: Path, cache: ShardCache, command: str
) -> None:
    cache.retries, cache.timeout = 0, 0.2
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(StorageError, match=r"0\.2 s"):
        cache.fetch(f"pipe:exec 9>{fifo}; {command} ; true")
    assert select.select([reader], [], [], 30)[0]
    assert os.read(reader, 1) == b""  # nobody has it open for writing any more
    os.close(reader)


def test_shards_come_through_fsspec(cache: ShardCache) -> None:
    fsspec.filesystem("memory").pipe("/shards/0.tar", CONTENT)
    path = cache.fetch("memory://shards/0.tar", len(CONTENT), digest(CONTENT))
    assert path.read_bytes() == CONTENT
    with pytest.raises(MissingError, match=r"memory://shards/1\.tar is not there"):
        cache.fetch("memory://shards/1.tar")


def test_an_fsspec_read_that_breaks_is_retried(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFile

    fsspec.filesystem("memory").pipe("/shards/0.tar", CONTENT)
    faults = [OSError(errno.EIO, "broken"), TimeoutError("slow")]
    read = MemoryFile.read

    def flaky(self: MemoryFile, size: int) -> bytes:
        if faults:
            raise faults.pop()
        return bytes(read(self, size))

    monkeypatch.setattr(MemoryFile, "read", flaky)
    assert cache.fetch("memory://shards/0.tar", len(CONTENT)).read_bytes() == CONTENT
    faults += [PermissionError(errno.EACCES, "no")]
    with pytest.raises(DeniedError, match="access denied"):
        cache.fetch("memory://shards/0.tar", sha256=digest(OTHER))


def test_an_unknown_scheme_is_refused(cache: ShardCache) -> None:
    with pytest.raises(DataError, match="nope://h/a.*not known"):
        cache.fetch("nope://h/a")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch, scheme: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"pip install 'clipserve\[{scheme}\]'"):
        cache.fetch(f"{scheme}://bucket/0.tar")
    with pytest.raises(DataError, match=rf"pip install 'clipserve\[{scheme}\]'"):
        storage.expand(f"{scheme}://bucket/*.tar")


def test_small_files_are_read_whole(site: Site, tmp_path: Path) -> None:
    site.faults["/a.tar"] = ["500", "cut"]
    assert storage.read_bytes(f"{site.url}/a.tar", backoff_s=0) == CONTENT
    (tmp_path / "m").write_bytes(b"local")
    assert storage.read_bytes(str(tmp_path / "m")) == b"local"
    assert storage.read_bytes("pipe:echo hello") == b"hello\n"


def test_small_files_that_are_not_small_are_refused(site: Site) -> None:
    assert storage.read_bytes(f"{site.url}/a.tar", max_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(DataError, match="larger than the 299999 bytes"):
        storage.read_bytes(f"{site.url}/a.tar", max_bytes=len(CONTENT) - 1)
    with pytest.raises(DataError, match="larger than the 100 bytes"):
        storage.read_bytes("pipe:yes", max_bytes=100)


def test_a_small_file_that_is_missing_is_told_apart(site: Site, tmp_path: Path) -> None:
    for location in (f"{site.url}/manifest.json", str(tmp_path / "x"), "memory://no/x"):
        with pytest.raises(MissingError):
            storage.read_bytes(location)
