import contextlib
import errno
import itertools
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import apsw
import numpy as np
import pytest

from clipserve.errors import DiskFull, IndexStoreError
from index import acknowledged
from index.acknowledged import ACKNOWLEDGED
from index.check import check
from index.collection import DATABASE, Collection, Item
from index.database import Database
from index.log import is_whole, num_frames
from index.sqlite import connect, store_errors

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 8}
LOG = f"{DATABASE}-wal"
PAGE = 16384


def fill(path: Path, count: int = 400) -> None:
    """A collection of many pages, closed cleanly: without a log."""
    with Collection.create(path, **MODEL) as collection:
        vectors = np.eye(8, dtype=np.float32)[np.arange(count) % 8]
        collection.upsert([Item(f"{i:03d}", "x" * 400) for i in range(count)], vectors)
    assert not (path / LOG).exists()


def flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        (value,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([value ^ 1 << bit]))


def everything(path: Path) -> tuple[list[Item], bytes]:
    with Collection.open(path) as collection:
        items = collection.scan(limit=1000)
        return items, collection.vectors_of(collection.rowids()).tobytes()


def read_every_tree(path: Path) -> None:
    with Collection.open(path) as collection:
        collection.scan(limit=1000)
        collection.vectors_of(collection.rowids())
        for index in ("items_id", "items_fields"):
            collection._select(f"SELECT rowid FROM items INDEXED BY {index}")
        for table in ("vectors_text", "thumbnails", "deletions", "units", "sqlite_sequence"):
            collection._select(f"SELECT * FROM {table}")


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from index.collection import Collection, Item
collection = Collection.create(
    Path(sys.argv[1]), fingerprint="a" * 64, model_name="tiny", embed_dim=8)
for i in range(5):
    collection.upsert([Item(f"{i}-{j}") for j in range(8)], np.eye(8))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed_writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a writer left that was killed after its fifth write: all of them are in the log."""
    path = tmp_path_factory.mktemp("killed") / "pets"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert (path / LOG).stat().st_size > 5 * PAGE
    return path


@pytest.fixture
def left(killed_writer: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(killed_writer, tmp_path / "left")


def test_every_page_carries_a_checksum_that_is_checked(tmp_path: Path) -> None:
    fill(tmp_path)
    size = (tmp_path / DATABASE).stat().st_size
    random = np.random.default_rng(0)
    for page in range(size // PAGE):
        place = page * PAGE + int(random.integers(100, PAGE))
        flip(tmp_path / DATABASE, place, 3)
        with pytest.raises(IndexStoreError, match="damaged: a page's checksum is wrong"):
            read_every_tree(tmp_path)
        flip(tmp_path / DATABASE, place, 3)


@pytest.mark.parametrize("bit", range(8))
def test_a_header_that_turns_the_checksums_off_is_refused(tmp_path: Path, bit: int) -> None:
    fill(tmp_path)
    flip(tmp_path / DATABASE, 20, bit)  # bytes kept at the end of a page: 8, or no checksums
    with pytest.raises(IndexStoreError, match="its pages are not checked: the database is damaged"):
        Collection.open(tmp_path)


def test_a_read_that_meets_a_damaged_page_never_ends_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.BLOCK_ROWS", 16)
    fill(tmp_path)
    with contextlib.closing(connect(tmp_path / DATABASE, "mode=ro")) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'items'"
        ((root,),) = connection.execute(query).fetchall()
    data = (tmp_path / DATABASE).read_bytes()
    last = int.from_bytes(data[(root - 1) * PAGE + 8 :][:4], "big")  # its rightmost child
    flip(tmp_path / DATABASE, (last - 1) * PAGE + 5000, 0)
    with Collection.open(tmp_path) as collection:
        with pytest.raises(IndexStoreError, match="checksum"):
            collection.scan(limit=1000)
        blocks = collection.metadata_blocks()
        assert len(next(blocks)[0]) == 16  # the first pages are good
        with pytest.raises(IndexStoreError, match="checksum"):
            list(blocks)


def test_other_users_of_apsw_keep_their_own_vfs(tmp_path: Path) -> None:
    default = apsw.vfs_names()[0]
    fill(tmp_path)
    assert apsw.vfs_names()[0] == default != "cksmvfs"
    with contextlib.closing(apsw.Connection(str(tmp_path / "theirs"))) as theirs:
        theirs.execute("CREATE TABLE t (x)")
        assert theirs.reserve_bytes("main") == 0


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    Collection.create(tmp_path, **MODEL).close()
    with contextlib.closing(connect(tmp_path / DATABASE, "mode=rw")) as database:
        database.execute("PRAGMA user_version = 3")
    with pytest.raises(IndexStoreError, match="format 3; this clipserve reads up to 2: install"):
        Collection.open(tmp_path)


def test_the_first_format_is_refused_saying_what_to_do(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        database.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
        database.execute(f"PRAGMA application_id = {0x436C5376}")
        database.execute("PRAGMA user_version = 1")
    with pytest.raises(IndexStoreError, match="made by an earlier clipserve; embed the source"):
        Collection.open(tmp_path)


def test_a_killed_writers_log_is_read(left: Path) -> None:
    with Collection.open(left) as collection:
        assert (collection.generation(), collection.count()) == (5, 40)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_log_that_lost_its_end_is_refused(left: Path, part: float) -> None:
    size = (left / LOG).stat().st_size
    flip(left / LOG, int(size * part), 5)
    with pytest.raises(IndexStoreError, match=r"writes are missing: [1-5] of 5, .* --accept-loss"):
        Collection.open(left)


def test_a_database_without_its_log_is_refused(left: Path) -> None:
    (left / LOG).unlink()
    for read_only in (False, True):
        with pytest.raises(IndexStoreError, match="writes are missing: 5 of 5"):
            Collection.open(left, read_only=read_only)


def test_looking_at_a_damaged_log_leaves_it_as_it_is(left: Path) -> None:
    before = (left / LOG).read_bytes()
    flip(left / LOG, len(before) // 2, 0)
    for _ in range(2):
        with pytest.raises(IndexStoreError, match="writes are missing"):
            Collection.open(left)
    flip(left / LOG, len(before) // 2, 0)
    assert (left / LOG).read_bytes() == before
    with Collection.open(left) as collection:
        assert collection.count() == 40
    assert not (left / LOG).exists()  # tidied away by the last to close


def test_one_flipped_bit_anywhere_gives_no_wrong_answer(left: Path, tmp_path: Path) -> None:
    right = everything(shutil.copytree(left, tmp_path / "copy"))
    random = np.random.default_rng(1)
    outcomes = {"right": 0, "refused": 0}
    for name in (DATABASE, LOG, f"{DATABASE}-shm", ACKNOWLEDGED):
        size = (left / name).stat().st_size
        header = range(0, min(size, 100), 4)
        for position in [*header, *random.integers(0, size, 25).tolist()]:
            damaged = tmp_path / "damaged"
            shutil.copytree(left, damaged)
            flip(damaged / name, position, int(random.integers(8)))
            try:
                assert everything(damaged) == right, f"byte {position} of {name}"
                outcomes["right"] += 1
            except IndexStoreError:
                outcomes["refused"] += 1
            shutil.rmtree(damaged)
    assert outcomes["refused"] > 50  # the log and the note of the last write
    assert outcomes["right"] > 20  # what SQLite makes anew, and pages that are newer in the log


def test_a_log_damaged_while_it_is_in_use_is_noticed(tmp_path: Path) -> None:
    """SQLite would read the wrong page, and then give it a right checksum in the database."""
    with Collection.create(tmp_path, **MODEL) as collection:
        collection.upsert([Item("a", "x" * 200)], np.eye(8)[:1])
        place = (tmp_path / LOG).read_bytes().rindex(b"x" * 200)
        flip(tmp_path / LOG, place, 0)
        with pytest.raises(IndexStoreError, match="log is damaged; end every process that uses"):
            Collection.open(tmp_path)
        assert any("log is damaged" in line for line in check(tmp_path).problems)
        assert (tmp_path / LOG).exists()
    with pytest.raises(IndexStoreError, match="writes are missing: 1 of 1"):
        Collection.open(tmp_path)


def test_a_damaged_log_is_not_copied_into_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.database._LOG_FRAMES", 20)
    with Collection.create(tmp_path, **MODEL) as collection:
        collection.upsert([Item("a", "x" * 200)], np.eye(8)[:1])
        flip(tmp_path / LOG, (tmp_path / LOG).read_bytes().rindex(b"x" * 200), 0)
        with pytest.raises(IndexStoreError, match="log is damaged"):
            write_one_by_one(collection, 10)
    assert b"y" + b"x" * 199 not in (tmp_path / DATABASE).read_bytes()


def write_one_by_one(collection: Collection, count: int) -> None:
    for i in range(count):
        collection.upsert([Item(f"{i}")], np.eye(8)[:1])


def test_the_log_is_copied_and_begun_anew_when_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.database._LOG_FRAMES", 50)
    with Collection.create(tmp_path, **MODEL) as collection:
        write_one_by_one(collection, 50)  # seven or more pages each
        assert (tmp_path / LOG).stat().st_size < 80 * PAGE
        with collection.snapshot():
            writer = threading.Thread(target=write_one_by_one, args=(collection, 50))
            writer.start()
            writer.join()
            assert (tmp_path / LOG).stat().st_size > 80 * PAGE  # a reader needs it
        write_one_by_one(collection, 50)
        connection = collection._database.connection()
        frames, copied = num_frames(connection)
        assert frames < 80
        assert is_whole(connection, tmp_path / LOG)
    assert not (tmp_path / LOG).exists()


def test_a_write_goes_on_while_others_are_at_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is kept, nothing may say that it is not."""
    monkeypatch.setattr("index.database._LOG_FRAMES", 10)
    monkeypatch.setattr("index.log._WAIT_S", 0.0)
    seen = []

    def busy(connection: object, wait_s: float = 0) -> tuple[int, int]:
        seen.append(wait_s)
        raise apsw.BusyError("BusyError: database is locked")

    with Collection.create(tmp_path, **MODEL) as collection:
        write_one_by_one(collection, 2)
        for place in ("index.database.num_frames", "index.log.num_frames"):
            with monkeypatch.context() as patch:
                patch.setattr(place, busy)
                write_one_by_one(collection, 20)
        assert len(seen) > 20
        assert collection.count() == 20


def test_a_write_goes_on_while_its_thread_is_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.database._LOG_FRAMES", 10)
    monkeypatch.setattr("index.collection.BLOCK_ROWS", 1)
    with Collection.create(tmp_path, **MODEL) as collection:
        write_one_by_one(collection, 3)
        for i, _ in zip(range(3), collection.vector_blocks(), strict=False):
            collection.upsert([Item(f"new {i}")], np.eye(8)[:1])
        assert collection.count() == 6


def test_a_damaged_log_is_told_of_before_a_write_not_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.database._LOG_FRAMES", 1)
    with Collection.create(tmp_path, **MODEL) as collection:
        collection.upsert([Item("a", "x" * 200)], np.eye(8)[:1])
        monkeypatch.setattr("index.database.is_whole", lambda *_: False)
        with pytest.raises(IndexStoreError, match="log is damaged"):
            collection.upsert([Item("b")], np.eye(8)[:1])
        assert collection.contains(["a", "b"]) == {"a"}
        assert collection.generation() == 1


class Frames:
    """A connection that says how many frames there are, or that others are at the log."""

    def __init__(self, *answers: int | apsw.Error) -> None:
        self.answers = list(answers)

    def wal_checkpoint(self, mode: int) -> tuple[int, int]:
        answer = self.answers.pop(0)
        if isinstance(answer, apsw.Error):
            raise answer
        return answer, 0


def test_who_opens_waits_for_those_at_the_log_but_not_for_ever() -> None:
    busy = apsw.BusyError("BusyError: database is locked")
    assert num_frames(cast(Any, Frames(busy, busy, 7))) == (7, 0)
    with pytest.raises(apsw.BusyError, match="copying its write-ahead log for 0 s; try again"):
        num_frames(cast(Any, Frames(busy, busy, 7)), wait_s=0)


def test_opening_waits_for_those_at_the_log_as_long_as_a_write_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    now = itertools.count()
    monkeypatch.setattr("index.log.time.monotonic", lambda: float(next(now)))
    monkeypatch.setattr("index.log._PAUSE_S", 0.0)
    waited = []

    class Busy:
        def wal_checkpoint(self, mode: int) -> tuple[int, int]:
            waited.append(mode)
            raise apsw.BusyError("BusyError: database is locked")

    database = Database(tmp_path, "mode=rw")
    with database, monkeypatch.context() as patch:
        patch.setattr(database, "connection", Busy)
        with pytest.raises(
            IndexStoreError, match="another process has been copying .* for 30 s; try again"
        ):
            database.log_problem()
    assert len(waited) == 30


def test_a_log_that_is_begun_anew_while_it_is_verified_is_not_damaged(
    left: Path, tmp_path: Path
) -> None:
    """Between the count and the look at the file: the count is that of the log before."""
    log = tmp_path / "log"
    shutil.copy(left / LOG, log)
    whole = log.read_bytes()
    with contextlib.closing(connect(left / DATABASE, "mode=rw")) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        count, _ = num_frames(connection)

    class BegunAnew(Frames):
        def wal_checkpoint(self, mode: int) -> tuple[int, int]:
            begun = len(self.answers) == 1
            log.write_bytes(whole if begun else b"\0" * 16 + whole[16:])
            return super().wal_checkpoint(mode)

    assert is_whole(cast(Any, BegunAnew(count + 5, count)), log)
    assert not is_whole(cast(Any, Frames(count + 5)), log)  # nobody wrote meanwhile
    log.unlink()
    assert not is_whole(cast(Any, Frames(count)), log)
    assert is_whole(cast(Any, Frames(-1)), log)


def test_a_log_that_cannot_be_copied_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("index.database._LOG_FRAMES", 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Collection.create(tmp_path, **MODEL) as collection:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 * PAGE, hard))  # the database has no room
        try:
            count = 0
            while "stays long: reading or writing failed" not in caplog.text:
                collection.upsert([Item(f"{count}")], np.eye(8)[:1], [b"x" * 100_000])
                count += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert collection.count() == count
    assert check(tmp_path).problems == []


def test_every_bit_of_a_log_that_counts_is_verified(left: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    with Collection.open(left) as collection:
        connection = collection._database.connection()
        frames, _ = num_frames(connection)
        assert is_whole(connection, left / LOG)
        size = 32 + frames * (PAGE + 24)
        copy = Path(shutil.copy(left / LOG, tmp_path / "log"))
        header = [*range(32), *(32 + PAGE + 24 + i for i in range(24))]
        for position in [*header, size - 1, *random.integers(0, size, 30).tolist()]:
            bit = int(random.integers(8))
            flip(copy, position, bit)
            assert not is_whole(connection, copy), position
            flip(copy, position, bit)
        assert is_whole(connection, copy)
        with copy.open("r+b") as file:
            file.truncate(size - 1)
        assert not is_whole(connection, copy)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.unlink(), "'acknowledged' is missing; was the collection copied"),
        (lambda file: flip(file, 9, 2), "'acknowledged' is damaged"),
        (lambda file: file.write_bytes(b""), "'acknowledged' is damaged"),
        (
            lambda file: acknowledged.write(file.parent, "0" * 32, 1),
            "'acknowledged' belongs to another collection",
        ),
    ],
)
def test_a_note_of_the_last_write_that_cannot_be_used_is_named(
    tmp_path: Path, damage: object, says: str
) -> None:
    fill(tmp_path)
    assert callable(damage)
    damage(tmp_path / ACKNOWLEDGED)
    with pytest.raises(IndexStoreError, match=f"{says}.*clipserve index check DIR"):
        Collection.open(tmp_path)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_a_lost_database_is_not_made_anew_over_what_was_promised(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    fill(tmp_path)
    promised = acknowledged.promised(tmp_path)
    assert promised > 0
    for file in tmp_path.glob(f"{DATABASE}-*"):
        file.unlink()
    damage(tmp_path / DATABASE)
    with pytest.raises(IndexStoreError, match=f"{promised} writes were acknowledged; restore"):
        Collection.open_or_create(tmp_path, **MODEL)
    assert acknowledged.promised(tmp_path) == promised
    (tmp_path / ACKNOWLEDGED).unlink()
    assert acknowledged.promised(tmp_path) == 0
    with Collection.open_or_create(tmp_path, **MODEL) as collection:
        assert collection.count() == 0


def test_each_write_is_noted_before_it_returns(tmp_path: Path) -> None:
    with Collection.create(tmp_path, **MODEL) as collection:
        for generation in range(1, 4):
            collection.upsert([Item("a")], np.eye(8)[:1])
            assert acknowledged.read(tmp_path, collection.identity) == generation
        collection.delete(["a"])
        assert acknowledged.read(tmp_path, collection.identity) == 4


def test_the_note_is_never_lowered(tmp_path: Path) -> None:
    identity = "1" * 32
    acknowledged.write(tmp_path, identity, 0)
    threads = [
        threading.Thread(target=acknowledged.advance, args=(tmp_path, identity, generation))
        for generation in np.random.default_rng(0).permutation(50).tolist()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert acknowledged.read(tmp_path, identity) == 49


def test_a_write_that_cannot_be_noted_says_that_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with Collection.create(tmp_path, **MODEL) as collection:
        with monkeypatch.context() as patch:
            patch.setattr("index.acknowledged.advance", fail)
            with pytest.raises(IndexStoreError, match=r"was kept, .* \(Input/output error\)"):
                collection.upsert([Item("a")], np.eye(8)[:1])
        collection.upsert([Item("a")], np.eye(8)[:1])
        assert collection.count() == 1


def test_a_writer_waits_for_another_and_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.sqlite.BUSY_S", 0.05)
    with Collection.create(tmp_path, **MODEL) as collection:
        with contextlib.closing(connect(tmp_path / DATABASE, "mode=rw")) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(IndexStoreError, match="another process has been writing"):
                collection.delete(["a"])
        collection.delete(["a"])


def test_a_thread_that_ends_leaves_no_connection_open(tmp_path: Path) -> None:
    with Collection.create(tmp_path, **MODEL) as collection:
        for _ in range(20):
            thread = threading.Thread(target=collection.count)
            thread.start()
            thread.join()
        assert len(collection._database._connections) == 1


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (apsw.SQLITE_FULL, "the disk is full"),
        (apsw.SQLITE_IOERR_WRITE, "reading or writing failed"),
        (apsw.SQLITE_IOERR_DATA, "a page's checksum is wrong"),
        (apsw.SQLITE_READONLY_DBMOVED, "read-only here"),
        (apsw.SQLITE_CORRUPT_VTAB, "the database is damaged"),
        (apsw.SQLITE_BUSY_RECOVERY, "another process has been writing"),
    ],
)
def test_errors_of_sqlite_say_what_to_do(code: int, says: str) -> None:
    with pytest.raises(IndexStoreError, match=f"pets: .*{says}"), store_errors("pets"):
        raise apsw.exception_for(code)


@pytest.mark.parametrize("code", [apsw.SQLITE_FULL, apsw.SQLITE_IOERR_SHMSIZE])
def test_a_full_disk_is_an_error_of_its_own(code: int) -> None:
    with pytest.raises(DiskFull, match="make room"), store_errors("pets"):
        raise apsw.exception_for(code)
    with pytest.raises(IndexStoreError) as other, store_errors("pets"):
        raise apsw.exception_for(apsw.SQLITE_IOERR_READ)
    assert not isinstance(other.value, DiskFull)


def test_a_collection_that_finds_no_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(acknowledged, "write", fail)
    with pytest.raises(DiskFull, match="No space left"):
        Collection.create(tmp_path, **MODEL)
