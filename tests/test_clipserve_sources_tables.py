import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from clipserve.errors import ConfigError, DataError
from clipserve.sources import BadRecord, Record, SourceOptions, Url, count_records, read_source


def read(path: Path, **options: Any) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def kinds(records: list[Record | BadRecord]) -> list[str]:
    return [getattr(record, "kind", "good") for record in records]


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(text)
    return path


def test_a_template_makes_the_caption_and_its_columns_stay_metadata(tmp_path: Path) -> None:
    table = csv(
        tmp_path,
        "image,title,colour,articleType\n1.jpg,Polo,navy blue,shirt\n2.jpg,Clog,,shoe\n",
    )
    whole, gap = read(table, caption_template="{title}, {colour} {{{articleType}}}")
    assert isinstance(whole, Record)
    assert whole.captions == ("Polo, navy blue {shirt}",)
    assert whole.metadata["colour"] == "navy blue"
    assert isinstance(gap, BadRecord)
    assert gap.kind == "empty_field"
    assert "'colour'" in gap.reason


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title}, {color}", "no column 'color'; it has: image, title"),
        ("{title", "a brace without a column name"),
        ("{}", "a brace without a column name"),
        ("words", "names no column"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        read(csv(tmp_path, "image,title\n1.jpg,a\n"), caption_template=template)


def test_several_caption_columns_give_several_captions(tmp_path: Path) -> None:
    table = csv(tmp_path, "image,short,long,n\n1.jpg,a dog,a big dog,1\n2.jpg,,same,2\n")
    first, second = read(table, caption_column="short, long")
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.captions, second.captions) == (("a dog", "a big dog"), ("same",))
    assert set(first.metadata) == {"image", "n"}


def test_neighbouring_rows_are_joined_and_strays_named(tmp_path: Path) -> None:
    table = csv(
        tmp_path,
        "image,caption,id\n1.jpg,one,a\n1.jpg,two,a\n1.jpg,,a\n1.jpg,two,a\n2.jpg,x,b\n1.jpg,y,a\n3.jpg,z,\n",
    )
    records = read(table, group_by="image", id_column="id")
    assert [(r.key, getattr(r, "captions", None)) for r in records if isinstance(r, Record)] == [
        ("a", ("one", "two")),
        ("b", ("x",)),
    ]
    bad = [r for r in records if isinstance(r, BadRecord)]
    assert sorted((r.origin, r.kind) for r in bad) == [
        ("t.csv row 4", "empty_caption"),
        ("t.csv row 7", "bad_group"),
        ("t.csv row 8", "bad_id"),
    ]
    with pytest.raises(DataError, match="no column 'sku'"):
        read(table, group_by="sku")
    with pytest.raises(ConfigError, match="it is the caption"):
        read(table, group_by="caption")


def test_urls_are_urls_and_other_schemes_bad(tmp_path: Path) -> None:
    table = csv(
        tmp_path,
        "url,caption\nhttps://x.org/1.jpg,a\nHTTP://x.org/2,b\nftp://x/3,c\nfile:///etc/passwd,d\n",
    )
    records = read(table)
    assert isinstance(records[0], Record)
    assert records[0].image == Url("https://x.org/1.jpg")
    assert kinds(records) == ["good", "good", "missing_image", "missing_image"]


def test_only_the_wanted_splits_and_pictures_from_elsewhere(tmp_path: Path) -> None:
    table = csv(
        tmp_path, "image,caption,split\n1.jpg,a,train\n2.jpg,b,val\n3.jpg,c,restval\n,d,x\n"
    )
    records = read(table, split="train,restval", image_folder=tmp_path / "pictures")
    assert [getattr(r, "image", None) for r in records] == [
        tmp_path / "pictures/1.jpg",
        tmp_path / "pictures/3.jpg",
    ]
    with pytest.raises(DataError, match="no column 'split'"):
        read(csv(tmp_path, "image,caption\n1.jpg,a\n"), split="train")


def test_a_header_with_a_million_columns_is_refused_in_one_short_line(tmp_path: Path) -> None:
    table = csv(tmp_path, ",".join(f"c{i}" for i in range(1_000_000)) + "\n")
    with pytest.raises(DataError, match="1000000 columns, at most 10000") as caught:
        read(table)
    assert len(str(caught.value)) < 300
    table = csv(tmp_path, ",".join(f"c{i}" for i in range(9_000)) + "\n")
    with pytest.raises(DataError, match="no image column I know") as caught:
        read(table)
    assert len(str(caught.value)) < 1000


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipserve.sources import tables

    monkeypatch.setattr(tables, "_MAX_LINE", 1000)
    with pytest.raises(DataError, match="line 2 is longer than 1000"):
        read(csv(tmp_path, "image,caption\n" + "x" * 5000))
    lines = ['{"image": "1.jpg", "text": "a"}', "x" * 2500, '{"image": "2.jpg", "text": "b"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    assert kinds(read(tmp_path / "t.jsonl")) == ["good", "bad_row", "good"]


def test_a_huge_field_two_equal_columns_and_utf_16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="field larger than field limit"):
        read(csv(tmp_path, "image,caption\n1.jpg," + "x" * 200_000 + "\n"))
    with pytest.raises(DataError, match="2 columns named 'caption'"):
        read(csv(tmp_path, "image,caption,caption\n1.jpg,a,b\n"))
    (tmp_path / "t.csv").write_bytes("image,caption\n1.jpg,a\n".encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16; save it as UTF-8"):
        read(tmp_path / "t.csv")


def test_a_nul_in_a_caption_is_named(tmp_path: Path) -> None:
    assert kinds(read(csv(tmp_path, "image,caption\n1.jpg,a\0b\n2.jpg,c\n"))) == [
        "bad_caption",
        "good",
    ]


def test_json_nested_without_end_costs_its_own_row_only(tmp_path: Path) -> None:
    deep = "[" * 500 + "]" * 500
    rows = [
        '{"image": "1.jpg", "text": "a"}',
        '{"image": "2.jpg", "text": "b", "x": ' + deep + "}",
        '{"image": "3.jpg", "text": "c", "x": ' + "[" * 200_000 + "}",
        '{"image": "4.jpg", "text": "d", "x": 1' + "0" * 9000 + "}",
        '{"image": "5.jpg", "text": "e", "x": [[1, {"y": NaN}]]}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    records = read(tmp_path / "t.jsonl")
    assert kinds(records) == ["good", "bad_row", "bad_row", "bad_row", "good"]
    assert isinstance(records[4], Record)
    assert records[4].metadata["x"] == [[1, {"y": None}]]


def test_a_column_may_begin_in_a_later_json_object(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "1.jpg", "caption": "a"},
        {"image": "2.jpg", "caption": "b", "colour": "red"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kinds(read(tmp_path / "t.jsonl", caption_template="{colour} {caption}")) == [
        "empty_field",
        "good",
    ]
    (tmp_path / "t.jsonl").write_text("[1]\n" * 100)
    with pytest.raises(DataError, match="none of its first 100"):
        read(tmp_path / "t.jsonl")


def test_rows_are_counted_without_being_read(tmp_path: Path) -> None:
    table = csv(tmp_path, 'image,caption\n1.jpg,"two\nlines ""quoted"""\n2.jpg,b\n3.jpg,c')
    assert count_records(table) == len(read(table)) == 3
    (tmp_path / "t.jsonl").write_text('{"image": "1.jpg", "text": "a\\""}\n' * 4)
    assert count_records(tmp_path / "t.jsonl") == 4
    assert count_records(table, SourceOptions(split="x")) is None
    assert count_records("hf:name") is None


def test_rows_are_not_held(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with table.open("w") as file:
        file.write("image,caption,id\n")
        file.writelines(f"{i}.jpg,caption {i} {'x' * 3000},{i}\n" for i in range(8000))
    tracemalloc.start()
    count = sum(1 for _ in read_source(table, SourceOptions(id_column="id")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < 4 * 2**20  # the file has 24 MB
