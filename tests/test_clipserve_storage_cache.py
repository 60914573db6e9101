"""A cache that many share, of a bounded size, on a disk that may be full."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_sites import CONTENT, Handler, Site, copies, small_cache, temporary

from clipserve.errors import DataError
from clipserve.storage import ShardCache, StorageError
from clipserve.storage.locks import locked


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.serving() as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return small_cache(tmp_path)


@pytest.fixture
def shard(site: Site) -> Callable[[int], str]:
    """shard(i) -> the location of a shard of 300,000 bytes, of which three fit."""

    def make(i: int) -> str:
        site.files[f"/{i}.tar"] = np.random.default_rng(i).bytes(300_000)
        return f"{site.url}/{i}.tar"

    return make


def test_the_least_recently_used_copy_goes_first(
    site: Site, cache: ShardCache, shard: Callable[[int], str]
) -> None:
    for i in (0, 1, 2):
        path = cache.fetch(shard(i))
        os.utime(path, (i, i))
    cache.fetch(shard(0))  # now used after 1 and 2
    cache.fetch(shard(3))
    assert sum(path.stat().st_size for path in copies(cache)) <= cache.max_bytes
    for i in (0, 2, 3):
        cache.fetch(shard(i))
        assert site.count(f"/{i}.tar") == 1
    cache.fetch(shard(1))
    assert site.count("/1.tar") == 2


def test_an_open_copy_outlives_its_removal(cache: ShardCache, shard: Callable[[int], str]) -> None:
    descriptor = cache.open(shard(0))
    path = cache.fetch(shard(0))
    os.utime(path, (0, 0))
    for i in (1, 2, 3):
        cache.fetch(shard(i))
    assert not path.exists()
    assert os.pread(descriptor, 400_000, 0) == np.random.default_rng(0).bytes(300_000)
    os.close(descriptor)


def test_a_copy_removed_before_it_is_opened_is_fetched_again(
    site: Site, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = cache.fetch
    removals = [1, 1]

    def fetch_and_remove(*arguments: Any) -> Path:
        path = fetch(*arguments)
        if removals:
            removals.pop()
            path.unlink()
        return path

    monkeypatch.setattr(cache, "fetch", fetch_and_remove)
    os.close(cache.open(f"{site.url}/a.tar"))
    removals += [1, 1, 1]
    with pytest.raises(StorageError, match="let the cache .* hold more"):
        cache.open(f"{site.url}/a.tar")


def test_a_shard_larger_than_the_cache_is_an_error(site: Site, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 200_000, retries=0)
    for known in ({"num_bytes": len(CONTENT)}, {}):
        with pytest.raises(DataError, match="takes 300000 bytes or more.*may hold 200000"):
            cache.fetch(f"{site.url}/a.tar", **known)
    with pytest.raises(DataError, match="may hold 200000"):
        cache.fetch("pipe:yes")
    assert not temporary(cache)


def test_foreign_files_are_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(bytes(300_000))
    (tmp_path / "mine.tmp").write_bytes(bytes(300_000))
    cache = ShardCache(tmp_path, 300_000, retries=0)
    cache.fetch(f"{site.url}/a.tar")
    assert (tmp_path / "mine.tar").exists()
    assert (tmp_path / "mine.tmp").exists()


def test_threads_that_want_one_shard_share_a_download(site: Site, cache: ShardCache) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(cache.fetch, [f"{site.url}/a.tar"] * 16))
    assert len(paths) == 1
    assert site.count("/a.tar") == 1


def test_many_threads_stay_within_the_bound(
    site: Site, cache: ShardCache, shard: Callable[[int], str]
) -> None:
    locations = [shard(i % 7) for i in range(42)]
    seen = []

    def read(location: str) -> bool:
        descriptor = cache.open(location)
        entries = [entry for entry in os.scandir(cache.folder) if entry.name != "lock"]
        with locked(cache.folder / "lock"):  # else the files of two moments would be added up
            seen.append(sum(path.stat().st_size for path in copies(cache)))
        content = os.pread(descriptor, 400_000, 0)
        os.close(descriptor)
        return bool(entries) and content == site.files[location.removeprefix(site.url)]

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(read, locations))
    assert max(seen) <= cache.max_bytes
    assert not temporary(cache)


FETCH = """
import sys
from pathlib import Path
from clipserve.storage import ShardCache, read_bytes
folder, url = sys.argv[1:]
read_bytes(url + "/here")
print(ShardCache(Path(folder), 2**20).fetch(url + "/a.tar").stat().st_size)
"""


def fetching(cache: ShardCache, site: Site) -> "subprocess.Popen[bytes]":
    site.files["/here"] = b"x"
    arguments = [sys.executable, "-c", FETCH, str(cache.folder), site.url]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE)


def test_processes_that_want_one_shard_share_a_download(site: Site, cache: ShardCache) -> None:
    with fetching(cache, site) as first, fetching(cache, site) as second:
        for process in (first, second):
            output, _ = process.communicate(timeout=60)
            assert output == b"300000\n"
    assert site.count("/here") == 2
    assert site.count("/a.tar") == 1


def test_the_download_of_a_killed_process_is_taken_over(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["stall"]
    with fetching(cache, site) as killed:
        assert site.halfway.wait(60)
        with fetching(cache, site) as waiting:
            while site.count("/here") < 2:
                threading.Event().wait(0.01)
            while site.count("/a.tar") < 1:
                threading.Event().wait(0.01)
            assert len(temporary(cache)) == 1
            killed.send_signal(signal.SIGKILL)
            output, _ = waiting.communicate(timeout=60)
    assert output == b"300000\n"
    assert site.count("/a.tar") == 2
    assert cache.fetch(f"{site.url}/a.tar").read_bytes() == CONTENT
    assert not temporary(cache)


def test_leftovers_of_a_killed_process_are_removed(
    site: Site, cache: ShardCache, shard: Callable[[int], str]
) -> None:
    site.faults["/a.tar"] = ["stall"]
    with fetching(cache, site) as killed:
        while not temporary(cache):
            threading.Event().wait(0.01)
        (leftover,) = temporary(cache)
        cache.fetch(shard(0))
        assert leftover.exists()  # its writer is alive
        killed.send_signal(signal.SIGKILL)
    cache.fetch(shard(1))
    assert not leftover.exists()


FORK = """
import os, sys, threading
from pathlib import Path
from clipserve.storage import ShardCache, read_bytes
folder, url = sys.argv[1:]
cache = ShardCache(Path(folder), 2**20)
download = threading.Thread(target=cache.fetch, args=[url + "/a.tar"])
download.start()
read_bytes(url + "/halfway")
child = os.fork()
if child == 0:
    os.read(0, 1)  # lives for as long as the test wants, with the lock's descriptor
    os._exit(0)
read_bytes(url + "/go_on")
download.join()
for path in Path(folder).glob("*.tar"):
    path.unlink()
print(cache.fetch(url + "/a.tar").stat().st_size, flush=True)
os.write(1, b"done\\n")
"""


def test_a_process_forked_during_a_download_keeps_no_lock(site: Site, cache: ShardCache) -> None:
    site.faults["/a.tar"] = ["stall"]
    site.files |= {"/halfway": b"x", "/go_on": b"x"}
    do_get = Handler.do_GET

    def gated(self: Handler) -> None:
        if self.path == "/halfway":
            site.halfway.wait(30)
        if self.path == "/go_on":
            site.go_on.set()
        do_get(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_GET", gated)
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORK, str(cache.folder), site.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"300000\n"
            process.communicate(b"x", timeout=60)


# The disk.


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_full_disk_is_fatal_and_leaves_nothing(
    site: Site, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(DataError, match="cannot be written: No space left") as caught:
            cache.fetch(f"{site.url}/a.tar")
    assert not isinstance(caught.value, StorageError)
    assert not copies(cache)
    assert not temporary(cache)
    assert site.count("/a.tar") <= 1
    assert cache.fetch(f"{site.url}/a.tar").read_bytes() == CONTENT


def test_a_really_full_disk(site: Site, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(DataError, match="cannot be written: No space left"):
            ShardCache(disk / "cache", 2**20).fetch(f"{site.url}/a.tar")
        assert not list((disk / "cache").glob("*.t*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_cache_that_is_no_folder_is_an_error(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match="the cache .* cannot be written"):
        ShardCache(tmp_path / "cache", 2**20).fetch(f"{site.url}/a.tar")


def test_copies_of_another_user_are_used(
    site: Site, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = cache.fetch(f"{site.url}/a.tar")
    monkeypatch.setattr(os, "utime", refuse)
    assert cache.fetch(f"{site.url}/a.tar") == path


def test_a_digest_that_is_none_is_refused(site: Site, cache: ShardCache) -> None:
    with pytest.raises(DataError, match="not 64 hex digits"):
        cache.fetch(f"{site.url}/a.tar", sha256="../../x")
    assert not site.requests


def test_downloads_that_hold_all_the_room_are_waited_for(
    site: Site, cache: ShardCache, shard: Callable[[int], str]
) -> None:
    cache.max_bytes = 400_000
    site.faults["/0.tar"] = ["stall"]
    first, second, third = shard(0), shard(1), shard(2)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(cache.fetch, first, 300_000)
        assert site.halfway.wait(30)
        impatient = ShardCache(cache.folder, cache.max_bytes, retries=0, timeout=0.1)
        with pytest.raises(StorageError, match="other downloads hold"):
            impatient.fetch(second, 300_000)
        patient = pool.submit(cache.fetch, third, 300_000)
        site.go_on.set()
        slow.result()
        assert patient.result().read_bytes() == site.files["/2.tar"]
    assert len(copies(cache)) == 1


def test_a_cache_travels_to_another_process(cache: ShardCache) -> None:
    again = pickle.loads(pickle.dumps(cache))
    assert (again.folder, again.max_bytes) == (cache.folder, cache.max_bytes)
