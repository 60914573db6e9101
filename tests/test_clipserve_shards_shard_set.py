import contextlib
import errno
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import fsspec
import numpy as np
import pytest
from tars import Members, samples, to_tar, write_tar

from clipserve import shards
from clipserve.errors import DataError, SampleError
from clipserve.shards import ShardSet, shard_set
from clipserve.shards.manifest import encode_index
from clipserve.shards.scan import scan
from clipserve.storage import ShardCache
from clipserve.storage import cache as storage_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    return path


@pytest.fixture
def packed(folder: Path) -> Path:
    """Two shards of four samples, with a manifest."""
    names = ["000.tar", "001.tar"]
    for number, name in enumerate(names):
        write_tar(folder / name, samples(4, 4 * number))
    shards.write_manifest(folder, *scan(folder, names))
    return folder


def test_every_sample_is_read_from_its_place(folder: Path) -> None:
    write_tar(folder / "a.tar", samples(5))
    write_tar(folder / "b.tar", samples(4, start=5))
    opened = ShardSet.open(folder)
    assert len(opened) == 9
    for i in (8, 0, 5, 4, 3):
        sample = opened.read(i)
        assert opened.key(i) == (sample.shard, sample.key) == ("ab"[i > 4] + ".tar", f"{i:04d}")
        assert sample.image == b"J" * (100 + i)
        assert sample.captions == (f"caption {i}",)
        assert sample.metadata == {"n": i}
    opened.close()
    assert opened.read(0).key == "0000"  # opens again what it needs


def test_a_number_outside_the_set_is_an_index_error(packed: Path) -> None:
    opened = ShardSet.open(packed)
    for i in (-1, 8):
        with pytest.raises(IndexError, match=f"sample {i} of 8"):
            opened.read(i)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_each_tar_dialect(folder: Path, format: int) -> None:
    stem = "folder/" + "k" * 80 + "/" + "x" * 60 + "\u00e9"
    if format == tarfile.USTAR_FORMAT:
        stem = "folder/" + "k" * 60 + "/" + "x" * 60
    write_tar(folder / "a.tar", [(f"{stem}.png", b"P" * 700), (f"{stem}.txt", b"hi")], format)
    sample = ShardSet.open(folder).read(0)
    assert sample.key == stem
    assert sample.image == b"P" * 700


def test_members_far_apart_are_read_too(folder: Path) -> None:
    between: Members = [(f"x{i}.bin", b"x" * 5000) for i in range(10)]
    write_tar(folder / "a.tar", [("a.txt", b"words"), *between, ("a.jpg", b"picture")])
    sample = ShardSet.open(folder).read(0)
    assert (sample.image, sample.captions) == (b"picture", ("words",))


def test_captions_in_the_json_win(folder: Path) -> None:
    fields = json.dumps({"captions": ["one", "two"], "n": 1}).encode()
    write_tar(folder / "a.tar", [("a.jpg", b"1"), ("a.json", fields)])
    sample = ShardSet.open(folder).read(0)
    assert sample.captions == ("one", "two")
    assert sample.metadata == {"n": 1}


def test_starts_and_text_bytes_come_from_the_index(packed: Path) -> None:
    opened = ShardSet.open(packed)
    assert opened.shard_starts.tolist() == [0, 4, 8]
    assert opened.shard_starts.dtype == np.int64
    wanted = np.array([7, 0, 3, 7, 5])
    shutil.rmtree(packed / "000.tar", ignore_errors=True)
    assert opened.text_bytes(wanted).tolist() == [len(f"caption {i}") for i in wanted]
    assert opened.text_bytes(wanted[:0]).tolist() == []


def test_a_local_set_needs_no_fetching(packed: Path, own_cache: Path) -> None:
    opened = ShardSet.open(packed)
    assert not opened.is_remote
    opened.fetch(1)
    assert not own_cache.exists()
    assert opened.location == str(packed)


def test_the_manifest_gives_what_a_scan_gives(packed: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(packed, tmp_path / "bare"))
    (bare / "manifest.json").unlink()
    with_manifest, scanned = ShardSet.open(packed), ShardSet.open(bare)
    assert with_manifest.manifest == scanned.manifest
    assert with_manifest.manifest.fingerprint == scanned.manifest.fingerprint
    assert [with_manifest.read(i) for i in range(8)] == [scanned.read(i) for i in range(8)]


@pytest.mark.parametrize("member", [0, 1, 2], ids=["picture", "caption", "json"])
def test_a_sample_that_changed_is_noticed_when_it_is_read(packed: Path, member: int) -> None:
    opened = ShardSet.open(packed)
    data = bytearray((packed / "001.tar").read_bytes())
    data[512 + 1024 * member] ^= 4
    (packed / "001.tar").write_bytes(data)
    with pytest.raises(SampleError, match=r"001\.tar:0004 of .* changed since") as caught:
        opened.read(4)
    assert caught.value.kind == "changed"
    assert opened.read(5).key == "0005"


def test_a_shard_that_shrinks_costs_only_what_was_cut(packed: Path) -> None:
    opened = ShardSet.open(packed)
    (packed / "001.tar").write_bytes((packed / "001.tar").read_bytes()[: 3 * 3 * 1024])
    assert opened.read(6).key == "0006"
    with pytest.raises(SampleError, match="changed"):
        opened.read(7)


def test_a_shard_that_vanished_stops_a_run(packed: Path) -> None:
    opened = ShardSet.open(packed)
    (packed / "001.tar").unlink()
    with pytest.raises(DataError, match=r"shard 001\.tar of .*: No such file") as caught:
        opened.read(4)
    assert not isinstance(caught.value, SampleError)
    assert opened.read(0).key == "0000"


@pytest.mark.parametrize(
    ("number", "fatal"),
    [(errno.EIO, False), (errno.ESTALE, False), (errno.EACCES, True), (errno.ENOSPC, True)],
)
def test_read_errors_are_retried_unless_they_are_for_the_user(
    packed: Path, monkeypatch: pytest.MonkeyPatch, number: int, fatal: bool
) -> None:
    monkeypatch.setattr(shard_set, "_RETRY_AFTER_S", (0.0, 0.0))
    opened, attempts = ShardSet.open(packed), []

    def pread(*_: int) -> bytes:
        attempts.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(DataError, match=os.strerror(number)) as caught:
        opened.read(0)
    assert isinstance(caught.value, SampleError) != fatal
    assert len(attempts) == (1 if fatal else 3)
    if isinstance(caught.value, SampleError):
        assert caught.value.kind == "read_error"


def test_a_read_that_fails_once_is_not_noticed(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_set, "_RETRY_AFTER_S", (0.0, 0.0))
    opened, real, failures = ShardSet.open(packed), os.pread, [OSError(errno.EIO, "broken")]

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise failures.pop()
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert opened.read(0).key == "0000"


def test_many_shards_need_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_set, "_MAX_OPEN_FILES", 2)
    monkeypatch.setattr(shard_set, "_MAX_OPEN_INDEXES", 2)
    for i in range(5):
        write_tar(folder / f"{i}.tar", samples(1, i))
    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))
    opened = ShardSet.open(folder)
    assert [opened.read(i).metadata["n"] for i in (0, 1, 2, 3, 4, 0, 3)] == [0, 1, 2, 3, 4, 0, 3]
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    opened.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_read_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_set, "_MAX_OPEN_FILES", 1)  # each pushes the others' files out
    for i in range(4):
        write_tar(folder / f"{i}.tar", samples(10, 10 * i))
    opened = ShardSet.open(folder)
    wrong: list[object] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(40):
            try:
                if opened.read(int(i)).metadata != {"n": int(i)}:
                    wrong.append(i)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _read_in_child(opened: ShardSet, queue: "multiprocessing.Queue[list[int]]") -> None:
    queue.put([opened.read(i).metadata["n"] for i in range(8)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_may_read_the_same_set(packed: Path) -> None:
    opened = ShardSet.open(packed)
    opened.read(0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(opened, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [list(range(8))] * 2
    for child in children:
        child.join()
    assert opened.read(7).metadata == {"n": 7}


def test_a_set_can_be_pickled_also_a_scanned_one(folder: Path) -> None:
    write_tar(folder / "a.tar", samples(2))
    opened = ShardSet.open(folder)
    opened.read(0)
    assert pickle.loads(pickle.dumps(opened)).read(1) == opened.read(1)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """Twenty shards of one sample, far away."""
    names = [f"{i:02d}.tar" for i in range(20)]
    for i, name in enumerate(names):
        write_tar(tmp_path / name, samples(1, i))
    shards.write_manifest(tmp_path, *scan(tmp_path, names))
    files = fsspec.filesystem("memory")
    for file in tmp_path.iterdir():
        files.pipe(f"/far/{file.name}", file.read_bytes())
    yield "memory://far"
    files.rm("/far", recursive=True)


def open_files(folder: Path) -> list[str]:
    """Targets of this process's descriptors in a folder; removed ones end in (deleted)."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [target for target in found if target.startswith(str(folder))]


def test_copies_that_the_cache_removed_are_not_kept_open(bucket: str, tmp_path: Path) -> None:
    size = len(to_tar(samples(1)))
    cache = ShardCache(tmp_path / "copies", 3 * size)
    opened = ShardSet.open(bucket, cache)
    for i in range(20):
        assert opened.read(i).metadata == {"n": i}
        assert len(open_files(cache.folder)) <= 3
        assert not [name for name in open_files(cache.folder) if name.endswith("(deleted)")]


def test_copies_that_another_process_removed_are_closed_too(bucket: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "copies", 2**30)
    opened = ShardSet.open(bucket, cache)
    opened.read(0)
    for copy in cache.folder.glob("*.tar"):
        copy.unlink()
    assert opened.read(0).metadata == {"n": 0}  # still open
    opened.read(1)
    assert len(open_files(cache.folder)) == 1
    assert opened.read(0).metadata == {"n": 0}


def test_few_copies_are_open_at_once(bucket: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "copies", 2**30)
    opened = ShardSet.open(bucket, cache)
    assert [opened.read(i).metadata["n"] for i in range(20)] == list(range(20))
    assert len(open_files(cache.folder)) == shard_set._MAX_OPEN_COPIES < 20


def test_a_shard_that_cannot_be_fetched_now_costs_its_samples_and_is_not_asked_for_each(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    cache = ShardCache(tmp_path / "copies", 2**30, retries=1, backoff_s=0.0)
    opened = ShardSet.open(f"pipe:echo >> {tries}; cat {packed}/000.tar", cache)
    (copy,) = cache.folder.glob("*.tar")
    copy.unlink()
    (packed / "000.tar").rename(packed / "away.tar")
    assert opened.is_remote
    tries.unlink()
    for i in range(4):
        with pytest.raises(SampleError, match="No such file") as caught:
            pickle.loads(pickle.dumps(opened)).read(i)  # as another worker would
        assert caught.value.kind == "read_error"
    assert tries.read_text() == "\n\n"
    (packed / "away.tar").rename(packed / "000.tar")
    monkeypatch.setattr(storage_cache, "_REFUSED_S", 0.0)
    assert opened.read(0).key == "0000"


def test_a_forged_index_makes_no_reader_fall_over(packed: Path) -> None:
    index = np.load(packed / "000.index")
    index["image_size"][0] = index["text_size"][0] = index["json_size"][0] = 0
    index["image_offset"][1] = 2**61
    index["text_size"][2] = 2**19
    manifest = shards.read_manifest(packed)
    first = replace(manifest.shards[0], index_sha256=sha256(encode_index(index)).hexdigest())
    second = np.load(packed / "001.index")
    forged = replace(manifest, shards=(first, manifest.shards[1]))
    shards.write_manifest(packed, forged, [index, second])
    opened = ShardSet.open(packed)
    for i in range(3):
        with pytest.raises(SampleError, match="changed"):
            opened.read(i)


def test_two_sets_of_one_file_share_nothing(packed: Path) -> None:
    first, second = ShardSet.open(packed), ShardSet.open(packed)
    first.close()
    assert second.read(3).key == "0003"
    assert to_tar(samples(4)) == (packed / "000.tar").read_bytes()
