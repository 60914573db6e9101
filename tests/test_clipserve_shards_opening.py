"""From a location to shards: folders, patterns, remote sets, and scans that are kept."""

import gzip
import json
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tars import samples, write_tar

from clipserve.errors import DataError
from clipserve.shards import ShardSet, opening
from clipserve.shards.manifest import write_manifest
from clipserve.shards.places import is_shard_source
from clipserve.shards.scan import scan


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train-0.tar and train-1.tar of three samples, val-0.tar of two."""
    path = tmp_path / "shards"
    path.mkdir()
    write_tar(path / "train-0.tar", samples(3))
    write_tar(path / "train-1.tar", samples(3, 3))
    write_tar(path / "val-0.tar", samples(2, 6))
    return path


NAMES = ["train-0.tar", "train-1.tar", "val-0.tar"]


@pytest.fixture
def packed(folder: Path) -> Path:
    write_manifest(folder, *scan(folder, NAMES))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    requests: list[str]

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.requests.append(self.path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder's URL, and the paths that were asked for."""
    handler = type("Handler", (Quiet,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def numbers(location: str | Path) -> list[int]:
    opened = ShardSet.open(location)
    found = [opened.read(i).metadata["n"] for i in range(len(opened))]
    opened.close()
    return found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", range(8)),
        ("train-*.tar", range(6)),
        ("train-{0..1}.tar", range(6)),
        ("train-{1,0}.tar", [3, 4, 5, 0, 1, 2]),
        ("{train,val}-0.tar", [0, 1, 2, 6, 7]),
        ("val-0.tar", [6, 7]),
    ],
)
def test_a_local_location_names_its_shards(
    folder: Path, pattern: str, expected: list[int] | range
) -> None:
    assert numbers(folder / pattern) == list(expected)
    assert numbers(f"file://{folder}/{pattern}") == list(expected)


@pytest.mark.parametrize("typo", ["typo", "missing.tar", "nofolder/", "000.tra"])
def test_a_mistyped_path_never_opens_its_parent(packed: Path, typo: str) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar shards"):
        ShardSet.open(packed / typo)
    with pytest.raises(DataError, match="no file matches"):
        ShardSet.open(packed / "typo-*.tar")
    with pytest.raises(DataError, match=r"val-1\.tar cannot be read: No such file"):
        ShardSet.open(packed / "val-{0..1}.tar")


def test_equal_names_in_several_folders_are_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "more")
    write_tar(tmp_path / "more" / "val-0.tar", samples(1, 50))
    opened = ShardSet.open(tmp_path / "{shards,more}" / "val-0.tar")
    assert [opened.key(i)[0] for i in (0, 2)] == ["shards-val-0.tar", "more-val-0.tar"]
    assert opened.read(2).metadata == {"n": 50}
    with pytest.raises(DataError, match="named twice"):
        ShardSet.open(f"{folder}/{{val-0,val-0}}.tar")


def test_a_file_that_is_named_may_be_called_anything(folder: Path) -> None:
    (folder / "val-0.tar").rename(folder / "download")
    assert numbers(folder / "download") == [6, 7]
    (folder / "packed").write_bytes(gzip.compress((folder / "download").read_bytes()))
    assert numbers(folder / "packed") == [6, 7]


def test_a_scan_is_kept_until_a_shard_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    scans = []
    real = opening.scan_places

    def counted(*arguments: object) -> object:
        scans.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "scan_places", counted)
    assert numbers(folder) == numbers(folder) == list(range(8))
    assert len(scans) == 1
    assert not (folder / "manifest.json").exists()
    os.utime(folder / "val-0.tar", ns=(1, 1))
    assert numbers(folder) == list(range(8))
    assert len(scans) == 2
    write_tar(folder / "val-1.tar", samples(1, 8))
    assert numbers(folder) == list(range(9))
    assert len(scans) == 3


def test_without_a_place_to_keep_it_a_scan_is_still_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "file" / "cache"))
    assert numbers(folder) == list(range(8))


def test_a_kept_scan_that_was_damaged_is_made_again(folder: Path, own_cache: Path) -> None:
    numbers(folder)
    (kept,) = own_cache.glob("manifests/*/manifest.json")
    kept.write_text("{")
    assert numbers(folder) == list(range(8))
    kept.with_name("val-0.index").unlink()
    assert numbers(folder) == list(range(8))


def test_a_shard_beside_the_manifest_is_not_overlooked(packed: Path) -> None:
    write_tar(packed / "new.tar", samples(2, 8))
    with pytest.raises(DataError, match=r"does not list: new\.tar"):
        ShardSet.open(packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 9}, "format 9; this version reads up to 2: install a newer"),
        ({"format_version": 1}, "format 1, of an older clipserve; .*--rescan"),
        ({"format_version": "2"}, "cannot be read"),
        ({"fingerprint": "0"}, "was changed"),
        ({"shards": 3}, "cannot be read"),
        ({"shards": [{"name": "a"}]}, "cannot be read"),
        ({"bad": [[]]}, "cannot be read"),
    ],
)
def test_a_bad_manifest_says_what_to_do(
    packed: Path, change: dict[str, object], words: str
) -> None:
    file = packed / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=words):
        ShardSet.open(packed)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "pipe:id", "a/b.tar", ""])
def test_a_manifest_names_only_files_beside_it(packed: Path, name: str) -> None:
    from dataclasses import replace

    from clipserve.shards.manifest import Manifest, read_manifest

    manifest = read_manifest(packed)
    shards = (replace(manifest.shards[0], name=name), *manifest.shards[1:])
    content = json.loads((packed / "manifest.json").read_text())
    content["shards"][0]["name"] = name
    content["fingerprint"] = Manifest(shards, ()).fingerprint
    (packed / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="plain file name"):
        ShardSet.open(packed)


def test_a_remote_folder_is_opened_by_its_manifest(
    packed: Path, served: tuple[str, list[str]], own_cache: Path
) -> None:
    url, requests = served
    opened = ShardSet.open(url)
    assert opened.is_remote
    assert len(opened) == 8
    assert not [path for path in requests if path.endswith(".tar")]
    opened.fetch(2)
    assert [path for path in requests if path.endswith(".tar")] == ["/val-0.tar"]
    assert opened.read(7).metadata == {"n": 7}
    assert [opened.read(i).metadata["n"] for i in range(8)] == list(range(8))
    assert requests.count("/val-0.tar") == 1
    requests.clear()
    assert numbers(f"{url}/manifest.json") == list(range(8))
    assert requests == ["/manifest.json"]  # everything else is kept
    assert opened.manifest == ShardSet.open(packed).manifest


def test_a_remote_shard_other_than_the_manifests_is_refused(
    packed: Path, served: tuple[str, list[str]]
) -> None:
    url, _ = served
    opened = ShardSet.open(url)
    opened._cache.backoff_s = 0.0
    opened._cache.retries = 1
    write_tar(packed / "val-0.tar", samples(2, 60))
    with pytest.raises(DataError, match="sha256"):
        opened.read(7)


HTML = b"<html>please log in</html>"


def test_a_page_in_place_of_an_index_is_never_kept(
    packed: Path, served: tuple[str, list[str]], own_cache: Path
) -> None:
    url, requests = served
    good = (packed / "val-0.index").read_bytes()
    (packed / "val-0.index").write_bytes(HTML)
    for _ in range(2):
        requests.clear()
        with pytest.raises(DataError, match=r"/val-0\.index is not the index that the") as caught:
            ShardSet.open(f"{url}?signature=secret")
        assert len([path for path in requests if path.startswith("/val-0.index")]) == 2
        assert not any(word in str(caught.value) for word in ("secret", "unsafe", "\n"))
    assert len(list(own_cache.glob("indexes/*"))) == 2  # of the other two shards
    (packed / "val-0.index").write_bytes(good)
    assert numbers(url) == list(range(8))


def test_an_index_that_is_bad_once_is_fetched_again(
    packed: Path, served: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pages = opening.read_bytes, [HTML]

    def read_bytes(location: str) -> bytes:
        return pages.pop() if location.endswith("/val-0.index") and pages else real(location)

    monkeypatch.setattr(opening, "read_bytes", read_bytes)
    assert numbers(served[0]) == list(range(8))
    assert not pages


def test_a_kept_index_that_was_damaged_is_fetched_again(
    packed: Path, served: tuple[str, list[str]], own_cache: Path
) -> None:
    url, _ = served
    numbers(url)
    for kept in own_cache.glob("indexes/*"):
        kept.write_bytes(kept.read_bytes()[:-8] + bytes(8))
    assert numbers(url) == list(range(8))


def test_shards_with_equal_indexes_are_no_trouble(folder: Path, served: Any) -> None:
    names = [f"{i}.tar" for i in range(40)]
    for name in names:
        write_tar(folder / name, samples(1))
    write_manifest(folder, *scan(folder, names))
    assert numbers(served[0]) == [0] * 40


@pytest.mark.parametrize("damage", [b"", HTML, b"\x93NUMPY", b"PK\x03\x04", None])
def test_a_damaged_index_is_named(packed: Path, damage: bytes | None) -> None:
    file = packed / "val-0.index"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data if damage is None else damage)
    opened = ShardSet.open(packed)
    assert opened.read(0).metadata == {"n": 0}
    for call in (opened.read, opened.key):
        with pytest.raises(DataError, match=r"val-0\.index is damaged: its sha256 .*--rescan"):
            call(7)


@pytest.mark.parametrize("content", [HTML, b"PK\x03\x04", b"\x93NUMPY\1\0\2\0[\n"])
def test_what_a_forged_manifest_calls_an_index_is_none(packed: Path, content: bytes) -> None:
    from hashlib import sha256

    (packed / "val-0.index").write_bytes(content)
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"][2]["index_sha256"] = sha256(content).hexdigest()
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"val-0\.index is not the index of val-0\.tar; .*rescan"):
        ShardSet.open(packed).read(7)


@pytest.mark.parametrize("digest", ["", "../../x", 3, None])
def test_a_digest_that_is_none_is_refused(packed: Path, digest: object) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"][2]["index_sha256"] = digest
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"describes shard 'val-0\.tar' wrongly"):
        ShardSet.open(packed)


def test_the_fingerprint_is_of_the_shards_not_of_their_indexes(packed: Path) -> None:
    from dataclasses import replace

    from clipserve.shards.manifest import read_manifest

    manifest = read_manifest(packed)
    first, *others = manifest.shards
    for change, is_other in (({"index_sha256": "0" * 64}, False), ({"sha256": "0" * 64}, True)):
        changed = replace(manifest, shards=(replace(first, **change), *others))
        assert (changed.fingerprint != manifest.fingerprint) == is_other


@pytest.fixture
def bucket(packed: Path) -> Iterator[str]:
    """The folder as a bucket's; `memory:` goes the way of s3: and gs:."""
    files = fsspec.filesystem("memory")
    for file in packed.iterdir():
        files.pipe(f"/bucket/shards/{file.name}", file.read_bytes())
    yield "memory://bucket/shards"
    files.rm("/bucket", recursive=True)


def test_a_folder_of_a_bucket_is_opened(bucket: str) -> None:
    assert numbers(bucket) == numbers(f"{bucket}/") == numbers(f"{bucket}/manifest.json")
    opened = ShardSet.open(bucket)
    assert not opened._is_scanned
    fsspec.filesystem("memory").rm("/bucket/shards/manifest.json")
    assert ShardSet.open(bucket)._is_scanned
    assert numbers(bucket) == list(range(8))


def test_a_remote_folder_without_shards_says_what_to_name(
    bucket: str, folder: Path, served: tuple[str, list[str]]
) -> None:
    (folder / "manifest.json").unlink()
    for location in (f"{bucket}/empty", f"{served[0]}/?key=secret", f"{served[0]}/a.parquet"):
        with pytest.raises(DataError, match="name manifest.json or a pattern") as caught:
            ShardSet.open(location)
        assert "secret" not in str(caught.value)


def test_remote_shards_without_a_manifest_are_scanned_once(
    folder: Path, served: tuple[str, list[str]]
) -> None:
    url, requests = served
    (folder / "train-1.tar").write_bytes(gzip.compress((folder / "train-1.tar").read_bytes()))
    assert numbers(f"{url}/train-{{0..1}}.tar?signature=secret") == list(range(6))
    first = len(requests)
    assert sorted({path.partition("?")[0] for path in requests}) == ["/train-0.tar", "/train-1.tar"]
    opened = ShardSet.open(f"{url}/train-{{0..1}}.tar?signature=secret")
    assert opened.key(5) == ("train-1.tar", "0005")
    assert "secret" not in opened.location
    assert opened.read(5).metadata == {"n": 5}
    assert len(requests) == first


def test_missing_remote_shards_and_manifests_are_errors(served: tuple[str, list[str]]) -> None:
    url, _ = served
    with pytest.raises(DataError, match=r"train-2\.tar"):
        ShardSet.open(f"{url}/train-{{0..2}}.tar")
    with pytest.raises(DataError, match=r"manifest\.json"):
        ShardSet.open(url)


def test_a_pipe_is_a_shard(folder: Path) -> None:
    assert numbers(f"pipe:cat {folder}/train-{{0..1}}.tar") == list(range(6))
    (folder / "val-0.tar").rename(folder / "download")
    assert numbers(f"pipe:cat {folder}/download") == [6, 7]


def test_what_counts_as_shards(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    yes = [
        packed,
        packed / "manifest.json",
        "anywhere/a.tar",
        "a-{000..009}.tar",
        "a-*.tar.gz",
        "a.tgz",
        "https://host/d/{000..099}.tar?key=1",
        "s3://bucket/d/manifest.json",
        "pipe:curl -s https://host/{0..9}.tar",
    ]
    no = [tmp_path / "empty", "table.csv", "https://host/table.parquet", "hf:name", "s3://b/folder"]
    assert [is_shard_source(location) for location in yes] == [True] * len(yes)
    assert [is_shard_source(location) for location in no] == [False] * len(no)
