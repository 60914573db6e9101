"""Shards from elsewhere: a server that cuts, stalls, lies and refuses; a cache many share."""

import errno
import gzip
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from clipserve import storage
from clipserve.errors import DataError
from clipserve.storage import DeniedError, MissingError, ShardCache, StorageError
from clipserve.storage.locks import locked

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


class Site(ThreadingHTTPServer):
    """Serves `files`; each request for a path takes the next of its `faults` first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # path, Range
        self.etag = '"one"'
        self.ranges = True
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of these tests."""

    def count(self, path: str) -> int:
        return sum(requested == path for requested, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((path, self.headers.get("Range", "")))
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            self.send_response(int(fault))
            if fault == "302":
                self.send_header("Location", self.path)
                faults.append(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path not in self.server.files:
            self.send_error(404)
        else:
            self.send_file(self.server.files[path], fault)

    def log_message(self, *_: Any) -> None:
        """Not into the output of the tests."""

    def send_file(self, content: bytes, fault: str) -> None:
        start = 0
        wanted = self.headers.get("Range", "")
        same = self.headers.get("If-Range", self.server.etag) == self.server.etag
        if wanted and self.server.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        body = content[start:]
        if fault == "wrong":
            body = OTHER[: len(body)]
        if fault == "more":
            body += b"x"
        if fault == "encoded":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        if fault != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if fault in ("cut", "stall", "trickle") else len(body)
        self.wfile.write(body[:half])
        self.server.halfway.set()
        if fault == "stall":
            self.server.go_on.wait(30)
        if fault == "trickle":
            for i in range(half, len(body)):
                self.wfile.write(body[i : i + 1])
                if self.server.go_on.wait(0.01):
                    break
        self.close_connection = True


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    server.files["/a.tar"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 2**20, retries=2, timeout=5, backoff_s=0.001)


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def copies(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.tar"))


def temporary(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.tmp"))


# Locations.


@pytest.mark.parametrize(
    "location", ["http://h/a", "HTTPS://h/a", "s3://b/a", "gs://b/a", "memory://a", "pipe:cat a"]
)
def test_urls_and_commands_are_remote(location: str) -> None:
    assert storage.is_remote(location)


@pytest.mark.parametrize("location", ["/a/b.tar", "a.tar", "file:///a", "a::b", "c:/a", "", "~"])
def test_paths_are_local(location: str) -> None:
    assert not storage.is_remote(location)


def test_a_file_url_is_its_path() -> None:
    assert storage.local_path("file:///a%20b/c?.tar") == Path("/a b/c?.tar")
    assert storage.local_path("file://localhost/a") == Path("/a")
    assert storage.local_path("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}", ["000", "001", "002"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{b,a,}x", ["bx", "ax", "x"]),
        ("{0..1}-{a,b}", ["0-a", "0-b", "1-a", "1-b"]),
        ("{a,b{1..2}}c", ["ac", "b1c", "b2c"]),
        ("{{a,b}}", ["{a}", "{b}"]),
        ("{a}{1,2}", ["{a}1", "{a}2"]),
        ("{print $1}", ["{print $1}"]),
        ("{a,b", ["{a,b"]),
        ("}{", ["}{"]),
        ("{0..1..0}", ["0", "1"]),
    ],
)
def test_braces_are_the_shells(pattern: str, expected: list[str]) -> None:
    assert storage.expand(f"https://h/{pattern}.tar?k=*") == [
        f"https://h/{text}.tar?k=*" for text in expected
    ]


def test_commands_expand_braces_and_no_globs() -> None:
    assert storage.expand("pipe:cat *-{0..1}.tar") == ["pipe:cat *-0.tar", "pipe:cat *-1.tar"]


def test_local_globs_are_sorted_within_each_brace(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a-1.tar", "a-0.tar"):
        (tmp_path / name).touch()
    found = storage.expand(f"{tmp_path}/{{b,a}}-*.tar")
    assert [Path(path).name for path in found] == ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]
    assert storage.expand(f"file://{tmp_path}/a-*.tar") == found[2:]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("{1,2}.tar", "x[1].tar"):
        (tmp_path / name).touch()
        assert storage.expand(str(tmp_path / name)) == [str(tmp_path / name)]


def test_a_location_without_a_pattern_is_itself() -> None:
    for location in ("/not/there.tar", "https://h/a.tar?b", "s3://b/a.tar"):
        assert storage.expand(location) == [location]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    for pattern in (f"{tmp_path}/*.tar", "memory://nothing/*.tar"):
        with pytest.raises(DataError, match=r"no file matches .*\*\.tar"):
            storage.expand(pattern)


def test_remote_globs_go_through_fsspec() -> None:
    for name in ("1", "0"):
        fsspec.filesystem("memory").pipe(f"/globbed/{name}.tar", b"x")
    assert storage.expand("memory://globbed/*.tar") == [
        "memory:///globbed/0.tar",
        "memory:///globbed/1.tar",
    ]


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}", "{a,b}" * 40])
def test_patterns_are_bounded(pattern: str) -> None:
    with pytest.raises(DataError, match="more than 1000000 locations"):
        storage.expand(f"https://h/{pattern}")


def test_braces_are_bounded() -> None:
    with pytest.raises(DataError, match="more than 64 braces"):
        storage.expand("{" * 100_000)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("https://h/d", "https://h/d/x.tar"),
        ("https://h/d/", "https://h/d/x.tar"),
        ("https://h", "https://h/x.tar"),
        ("https://h/d/manifest.json?sig=a/b.tar#f", "https://h/d/x.tar?sig=a/b.tar"),
        ("s3://b/d/0.tar.gz", "s3://b/d/x.tar"),
        ("s3://b/d/manifest.json", "s3://b/d/x.tar"),
        ("s3://b", "s3://b/x.tar"),
        ("/d/manifest.json", "/d/x.tar"),
        ("file:///d/e", "/d/e/x.tar"),
    ],
)
def test_a_name_is_joined_below_a_folder_and_beside_a_file(base: str, expected: str) -> None:
    assert storage.join(base, "x.tar") == expected


def test_a_joined_name_stays_a_name() -> None:
    assert storage.join("https://h/d", "a b?#%2e.tar") == "https://h/d/a%20b%3F%23%252e.tar"
    assert storage.join("s3://b/d", "a b.tar") == "s3://b/d/a b.tar"
    with pytest.raises(DataError, match="is a command"):
        storage.join("pipe:cat a.tar", "b.tar")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "a\0", "a\n", "pipe:id", "x" * 256]
    + ["http://h/a", "PIPE:/bin/id", "\ud800/"],
)
def test_a_manifest_names_files_beside_it_only(name: str) -> None:
    with pytest.raises(DataError, match="must be a plain file name"):
        storage.check_name(name)
    with pytest.raises(DataError, match="must be a plain file name"):
        storage.join("https://h/d", name)


def test_plain_names_pass() -> None:
    for name in ("000.tar", "a b.tar", "...", "ümlaut.tar", "-x"):
        assert storage.check_name(name) == name


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://me:secret@h:1/a.tar?sig=secret#secret", "https://h:1/a.tar"),
        ("https://h/a@b.tar", "https://h/a@b.tar"),
        ("s3://secret:secret@b/a.tar", "s3://b/a.tar"),
        ("filecache::https://me:secret@h/a?secret", "filecache::https://h/a"),
        ("pipe:KEY=secret curl -H 'Auth: secret' https://h/d/0.tar?secret", "pipe:curl ... 0.tar"),
        ("pipe:K='a secret' cat", "pipe:cat"),
        ("pipe:cat 'secret", "pipe:..."),
        ("/a?b.tar", "/a?b.tar"),
    ],
)
def test_messages_show_no_secrets(location: str, expected: str) -> None:
    assert storage.shown(location) == expected


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPSERVE_CACHE", "~/x")
    assert storage.cache_root() == Path.home() / "x"
    monkeypatch.setenv("CLIPSERVE_CACHE", "")
    assert storage.cache_root() == Path.home() / ".cache" / "clipserve"


# Downloads.


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


# gzip.


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


# The cache, with others.


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
