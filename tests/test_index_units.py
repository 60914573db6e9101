import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tars import Members, samples, write_tar

from clipserve.errors import DataError
from clipserve.shards import ShardSet
from clipserve.sources import BadRecord, Record, SourceOptions, Url
from index import units
from index.units import SourceUnit, open_units

OPTIONS = SourceOptions()


def read(
    source: str | Path,
    size: int | None = 2,
    settings: object = "settings",
    options: SourceOptions = OPTIONS,
) -> list[SourceUnit]:
    with open_units(source, options, settings, size) as opened:
        return list(opened.units)


def digests(*given: Any, **settings: Any) -> list[str]:
    return [unit.digest for unit in read(*given, **settings)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"P" * i)
    rows = "".join(f"{i}.png,number {i},{i}\n" for i in range(5))
    (tmp_path / "rows.csv").write_text("image,caption,price\n" + rows)
    return tmp_path / "rows.csv"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "a.tar", samples(5))
    write_tar(folder / "b.tar", samples(3))
    return folder


def keys(unit: SourceUnit) -> list[str]:
    return [record.key for record in unit.records()]


def test_a_table_becomes_runs_of_its_records(table: Path) -> None:
    found = read(table)
    assert [keys(unit) for unit in found] == [
        ["rows/000000000", "rows/000000001"],
        ["rows/000000002", "rows/000000003"],
        ["rows/000000004"],
    ]
    names = [unit.name.partition("@") for unit in found]
    assert [(name, rest[12:]) for name, _, rest in names] == [
        ("rows.csv", "[0:2]"),
        ("rows.csv", "[2:4]"),
        ("rows.csv", "[4:5]"),
    ]
    assert read(table, None)[0].name.endswith("[0:5]")
    with open_units(table, OPTIONS, "", 2) as opened:
        assert opened.count() == 5
        assert list(opened.bad) == []


def test_each_shard_has_units_of_its_own_and_no_sample_is_read_for_them(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_sample = ShardSet.read
    monkeypatch.delattr(ShardSet, "read")
    with open_units(shards, OPTIONS, "", 2) as opened:
        found = list(opened.units)
        assert opened.count() == 8
        assert len({unit.digest for unit in found}) == len({unit.name for unit in found}) == 5
        assert [unit.name[:6] + unit.name[18:] for unit in found] == [
            *("a.tar@[0:2]", "a.tar@[2:4]", "a.tar@[4:5]", "b.tar@[0:2]", "b.tar@[2:3]"),
        ]
        monkeypatch.setattr(ShardSet, "read", read_sample, raising=False)
        assert [keys(unit) for unit in found[2:4]] == [["a/0004"], ["b/0000", "b/0001"]]


def test_the_same_source_has_the_same_units_wherever_it_is_read_from(
    table: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [(unit.name, unit.digest) for unit in read(table)]
    monkeypatch.chdir(table.parent)
    assert [(unit.name, unit.digest) for unit in read("rows.csv")] == here
    before = [(unit.name, unit.digest) for unit in read(shards)]
    moved = shards.rename(shards.with_name("moved"))
    assert [(unit.name, unit.digest) for unit in read(moved)] == before


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.write_text(table.read_text().replace("number 2", "number 9")),
        lambda table: table.write_text(table.read_text().replace("2,2\n", "2,9\n")),
        lambda table: (table.parent / "2.png").write_bytes(b"QQQ"),
        lambda table: os.utime(table.parent / "2.png", ns=(1, 1)),
        lambda table: (table.parent / "2.png").unlink(),
        lambda table: table.write_text(table.read_text().replace("2.png", "http://x/2.png")),
        lambda table: table.write_text(table.read_text().replace("2.png,number 2", "2.png,")),
    ],
    ids=["caption", "metadata", "size", "time", "missing", "address", "bad"],
)
def test_a_unit_changes_with_what_is_in_it_and_no_other_does(table: Path, change: Any) -> None:
    before = digests(table)
    change(table)
    after = digests(table)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_a_picture_that_appears_changes_its_unit(table: Path) -> None:
    (table.parent / "4.png").rename(table.parent / "away")
    before = digests(table)
    (table.parent / "away").rename(table.parent / "4.png")
    assert digests(table)[-1] != before[-1]


def test_a_shard_of_another_content_has_other_units(shards: Path) -> None:
    before = digests(shards)
    write_tar(shards / "b.tar", samples(3, start=7))
    after = digests(shards)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("which", ["table", "shards"])
def test_other_settings_or_options_make_other_units(
    which: str, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(which)
    given = [
        read(source),
        read(source, settings="others"),
        read(source, options=SourceOptions(caption_template="a {caption}")),
    ]
    for part in ("name", "digest"):
        assert len({getattr(found[0], part) for found in given}) == 3


def in_memory(monkeypatch: pytest.MonkeyPatch, records: Sequence[Record | BadRecord]) -> None:
    monkeypatch.setattr(units, "read_source", lambda source, options: iter(records))


def test_bytes_count_where_pictures_are_given_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory(monkeypatch, [Record(key, "", b"12345", ("",)) for key in "abc"])
    before = digests("here", 3)
    in_memory(monkeypatch, [Record(key, "", b"12845", ("",)) for key in "abc"])
    assert digests("here", 3) != before


def test_pictures_given_inline_end_a_unit_before_they_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "_UNIT_BYTES", 10)
    in_memory(monkeypatch, [Record(key, "", b"12345", ("",)) for key in "abcde"])
    assert [keys(unit) for unit in read("here", 3)] == [["a", "b"], ["c", "d"], ["e"]]


def test_bad_records_are_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = BadRecord("b", "row 2", "bad_row", "no reason")
    in_memory(monkeypatch, [Record("a", "", Url("http://x"), ("",)), bad])
    (unit,) = read("here", 3)
    assert unit.bad == [bad]
    assert keys(unit) == ["a", "b"]


def test_samples_a_manifest_says_are_bad_belong_to_no_unit(tmp_path: Path) -> None:
    members: Members = [*samples(2), ("lone.txt", b"no picture")]
    with open_units(write_tar(tmp_path / "a.tar", members), OPTIONS, "") as opened:
        assert [bad.key for bad in opened.bad] == ["lone"]
        assert [keys(unit) for unit in opened.units] == [["a/0000", "a/0001"]]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.csv")
