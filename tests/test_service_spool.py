"""The lines of a job on disk."""

from pathlib import Path

import pytest

from service import spool
from service.spool import Position, Spool


@pytest.fixture
def empty(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / "job-1")
    made.create({"id": "job-1"})
    return made


def add(target: Spool, *chunks: bytes) -> int:
    writer = target.add()
    for chunk in chunks:
        writer.write(chunk)
    writer.finish()
    return writer.count


def test_lines_come_back_whole_however_they_were_cut(empty: Spool):
    assert add(empty, b"on", b"e\ntw", b"o\n\n  \nthr", b"ee") == 3
    assert add(empty, b"four\n") == 1
    (first, second) = empty.batches(Position(), 10)
    assert first.lines == [b"one\n", b"two\n", b"three\n"]
    assert (second.index, second.lines) == (3, [b"four\n"])
    assert empty.count() == 4


def test_work_goes_on_after_any_position(empty: Spool):
    add(empty, b"a\nb\nc\n")
    add(empty, b"d\ne\n")
    batches = list(empty.batches(Position(), 2))
    assert [batch.lines for batch in batches] == [[b"a\n", b"b\n"], [b"c\n"], [b"d\n", b"e\n"]]
    for done, batch in enumerate(batches, start=1):
        position = Position.parse(str(batch.end))
        assert position == batch.end
        rest = list(empty.batches(position, 2))
        assert [one.lines for one in rest] == [one.lines for one in batches[done:]]
        assert [one.index for one in rest] == [one.index for one in batches[done:]]


def test_a_batch_is_bounded_by_its_bytes(empty: Spool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spool, "_BATCH_BYTES", 5)
    add(empty, b"aaa\nbbb\nccc\n")
    assert [len(batch.lines) for batch in empty.batches(Position(), 10)] == [2, 1]


def test_lines_that_were_not_finished_are_not_there(empty: Spool):
    add(empty, b"a\n")
    writer = empty.add()
    writer.write(b"b\nc\n")
    assert empty.count() == 1  # as after a crash
    writer.discard()
    assert add(empty, b"d\n") == 1
    lines = [line for batch in empty.batches(Position(), 10) for line in batch.lines]
    assert lines == [b"a\n", b"d\n"]


def test_nothing_sent_leaves_no_file(empty: Spool):
    assert add(empty, b"\n \n") == 0
    assert empty.count() == 0
    assert list(empty.batches(Position(), 10)) == []


def test_a_folder_that_does_not_say_what_it_is_is_no_job(tmp_path: Path, empty: Spool):
    assert empty.about() == {"id": "job-1"}
    assert Spool(tmp_path / "job-2").about() is None
    empty.remove()
    assert empty.about() is None
    assert not empty.folder.exists()


def test_failures_are_kept(empty: Spool):
    assert empty.failures() == []
    empty.set_failures([{"index": 3}, {"index": 7}])
    assert empty.failures() == [{"index": 3}, {"index": 7}]
