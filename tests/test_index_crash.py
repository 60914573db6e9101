"""A collection whose writer is killed, whose disk is full, or whose directory cannot be written to.

The writer and the readers are `crashes.py`, in processes of their own.
"""

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from crashes import EMBED_DIM, content, states

from clipserve.errors import IndexStoreError
from index.check import check
from index.collection import Collection, Item

SCRIPT = Path(__file__).parent / "crashes.py"
MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": EMBED_DIM}


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def readers(path: Path, count: int) -> Iterator[None]:
    """Processes that search meanwhile, and must not meet anything wrong."""
    running = [start("read", path) for _ in range(count)]
    try:
        yield
    finally:
        ended = [reader.communicate() for reader in running]  # closes their input, so they end
    for reader, (reads, errors) in zip(running, ended, strict=True):
        assert reader.returncode == 0, errors
        assert int(reads) > 0


def kill_one_writer(
    writers: "subprocess.Popen[str]", first: int, random: np.random.Generator
) -> int:
    """Let one write from number `first` on, and kill it; returns how many it acknowledged."""
    assert writers.stdin is not None
    assert writers.stdout is not None
    writers.stdin.write(f"{first}\n")
    writers.stdin.flush()
    pid = int(writers.stdout.readline())
    lines = [writers.stdout.readline() for _ in range(int(random.integers(1, 12)))]
    time.sleep(float(random.uniform(0, 0.01)))  # anywhere in a write: nothing to wait for
    os.kill(pid, signal.SIGKILL)
    lines += itertools.takewhile(lambda line: line != "killed\n", writers.stdout)
    acknowledged = [int(line) for line in lines]
    assert acknowledged == list(range(first, first + len(acknowledged)))
    return len(acknowledged)


def kill_writers(path: Path, kills: int) -> None:
    Collection.create(path, **MODEL).close()
    random = np.random.default_rng(kills)
    expected = states()
    state = next(expected)
    done = 0
    in_between = 0
    with readers(path, 2), start("write", path) as writers:
        for _ in range(kills):
            acknowledged = kill_one_writer(writers, done, random)
            *_, state = itertools.islice(expected, acknowledged)
            done += acknowledged
            with Collection.open(path) as collection:
                found = content(collection)
                assert collection.generation() in (done, done + 1)
                if collection.generation() == done + 1:  # whole, and not yet acknowledged
                    state = next(expected)
                    done += 1
                    in_between += 1
                assert found == state
            assert check(path).problems == []
        writers.communicate()  # closes its input, so it ends
    assert done > kills
    assert kills < 50 or in_between  # or it was never killed in the middle of a write


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    kill_writers(tmp_path / "pets", 12)


@pytest.mark.slow
def test_two_hundred_killed_writers_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    kill_writers(tmp_path / "pets", 200)


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes at `path`; where none can be mounted, files that short."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    mounted = not os.geteuid() and not subprocess.run(["mount", *options], check=False).returncode
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


def write_until_full(collection: Collection) -> list[str]:
    """The ids that were acknowledged."""
    acknowledged: list[str] = []

    def fill() -> None:
        for number in itertools.count():
            ids = [f"{number}-{i}" for i in range(3)]
            pictures = [os.urandom(20_000)] * 3
            collection.upsert([Item(id) for id in ids], np.eye(EMBED_DIM)[:3], pictures)
            acknowledged.extend(ids)

    with pytest.raises(IndexStoreError, match=r"nothing of this write was kept.* then repeat"):
        fill()
    return acknowledged


def test_a_full_disk_loses_nothing_and_room_makes_it_work_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4_000_000):
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(bytes(1_000_000))
        path = tmp_path / "disk" / "pets"
        with Collection.create(path, **MODEL) as collection:
            acknowledged = write_until_full(collection)
            assert len(acknowledged) > 10
            assert collection.contains(acknowledged) == set(acknowledged)
            with pytest.raises(IndexStoreError, match="nothing of this write was kept"):
                collection.upsert([Item("more")], np.eye(EMBED_DIM)[:1], [os.urandom(2_000_000)])
            ballast.unlink()
            collection.upsert([Item("more")], np.eye(EMBED_DIM)[:1], [os.urandom(20_000)])
        with Collection.open(path) as collection:
            assert {item.id for item in collection.scan(limit=1000)} == {*acknowledged, "more"}
        assert check(path).problems == []


def test_a_full_disk_in_the_middle_of_a_kill_loses_nothing(tmp_path: Path) -> None:
    """The disk is full, the process dies there and then, another finds everything."""
    with small_disk(tmp_path / "disk", 2_000_000):
        path = tmp_path / "disk" / "pets"
        Collection.create(path, **MODEL).close()
        code = (
            "import os, sys\n"
            f"sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parent.parent)!r}]\n"
            "import test_index_crash as test\n"
            "collection = test.Collection.open(test.Path(sys.argv[1]))\n"
            "sys.stdout.write(' '.join(test.write_until_full(collection)))\n"
            "sys.stdout.flush()\n"
            "os.kill(os.getpid(), 9)\n"
        )
        writer = subprocess.run(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, check=False
        )
        assert writer.returncode == -signal.SIGKILL
        with Collection.open(path) as collection:
            assert {item.id for item in collection.scan(limit=1000)} == set(writer.stdout.split())
        assert check(path).problems == []


def test_a_read_only_directory_refuses_writes_and_answers_reads() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pets"
        Path(folder).chmod(0o755)
        with Collection.create(path, **MODEL) as collection:
            collection.upsert([Item("a")], np.eye(EMBED_DIM)[:1])
        path.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)  # not even root may write there then
        try:
            report = check(path)
            assert (report.items, report.problems) == (1, [])
            with pytest.raises(IndexStoreError, match="read-only"):
                check(path, accept_loss=True)
            with Collection.open(path, read_only=True) as collection:
                with pytest.raises(IndexStoreError, match="it is read-only here; to write, make"):
                    collection.delete(["a"])
                assert collection.contains(["a"]) == {"a"}
        finally:
            if is_root:
                os.seteuid(0)
            path.chmod(0o755)
        with Collection.open(path) as collection:
            assert collection.delete(["a"]) == 1
