import json
from pathlib import Path

import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, read_source


def read(path: Path, **options: str) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def good(path: Path, **options: str) -> list[Record]:
    records = read(path, **options)
    assert all(isinstance(record, Record) for record in records), records
    return [record for record in records if isinstance(record, Record)]


def test_csv_rows_become_records_with_their_metadata(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('\ufeffimage,caption,price\na/1.jpg,"a ""red""\n  hat",3\n/x/2.jpg,b,\n')
    first, second = good(table)
    assert (first.key, first.origin) == ("t/000000000", "t.csv row 2")
    assert first.image == tmp_path / "a/1.jpg"
    assert first.captions == ('a "red" hat',)
    assert first.metadata == {"image": "a/1.jpg", "price": "3"}
    assert second.image == Path("/x/2.jpg")
    assert second.metadata == {"image": "/x/2.jpg"}


def test_a_quote_that_is_never_closed_swallows_nothing(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('image,caption\n1.jpg,"open\n2.jpg,b\n3.jpg,c\n')
    with pytest.raises(DataError, match="is a quote missing"):
        read(table)


def test_names_that_are_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"caf\xe9,caption\nx,y\n")
    with pytest.raises(DataError, match=r"it has: caf\\udce9, caption"):
        read(tmp_path / "t.csv")


def test_tsv_and_columns_by_choice(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("id\tPicture\ttitle\tlong\n7\t1.jpg\tshort\ta long one\n")
    (record,) = good(table, image_column="Picture", caption_column="long")
    assert record.captions == ("a long one",)
    with pytest.raises(DataError, match=r"no column 'Foto'; it has: id, Picture, title, long"):
        read(table, image_column="Foto")
    with pytest.raises(DataError, match=r"no image column I know.*--image-column"):
        read(table)


def test_bad_rows_are_named_and_the_rest_go_on(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(
        b"image,caption\n1.jpg,\n,words\n2.jpg,caf\xe9\n\n3.jpg,fine\n4.jpg\n5.jpg,red, running\n"
        b"6\0.jpg,words\n"
    )
    kinds = [(r.origin, getattr(r, "kind", "good")) for r in read(table)]
    assert kinds == [
        ("t.csv row 2", "empty_caption"),
        ("t.csv row 3", "missing_image"),
        ("t.csv row 4", "bad_caption"),
        ("t.csv row 6", "good"),
        ("t.csv row 7", "empty_caption"),
        ("t.csv row 8", "bad_row"),
        ("t.csv row 9", "missing_image"),
    ]


def test_ids_from_a_column_must_be_there_and_unique(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("sku,image,caption\na1,1.jpg,x\na1,2.jpg,y\n,3.jpg,z\nb2,4.jpg,w\n")
    records = read(table, id_column="sku")
    assert [(r.key, getattr(r, "kind", "good")) for r in records] == [
        ("a1", "good"),
        ("a1", "bad_id"),
        ("t/000000002", "bad_id"),
        ("b2", "good"),
    ]
    with pytest.raises(DataError, match="no column 'ean'"):
        read(table, id_column="ean")


def test_jsonl_with_one_or_several_captions(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [
        {"image": "1.jpg", "captions": ["a", " b  c ", ""]},
        {"image": "2.jpg", "captions": "d"},
    ]
    table.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert [record.captions for record in good(table)] == [("a", "b c"), ("d",)]


def test_broken_json_lines_are_bad_rows(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"image": "1.jpg", "text": "a"}\n{"image": \n[1]\n{"text": "b"}\n')
    with table.open("a") as file:
        file.write("[" * 100_000 + "\n" + '{"image": "1.jpg", "text": "\\ud800"}\n')
    kinds = [getattr(record, "kind", "good") for record in read(table)]
    assert kinds == ["good", "bad_row", "bad_row", "missing_image", "bad_row", "bad_caption"]


def test_a_folder_pairs_pictures_with_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("b.png", "second"), ("sub/c.JPG", "third"), ("a.webp", None)):
        (tmp_path / name).write_bytes(encode(make_picture()))
        if text:
            (tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / "notes.md").write_text("ignored")
    records = read(tmp_path)
    assert [(r.key, getattr(r, "kind", "good")) for r in records] == [
        ("a", "missing_caption"),
        ("b", "good"),
        ("sub/c", "good"),
    ]


def test_what_is_no_source_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "no.csv")
    with pytest.raises(DataError, match="https://x.org/t.csv is remote and no shards"):
        list(read_source("https://me:secret@x.org/t.csv?token=1"))
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"give a \.csv"):
        read(tmp_path / "a.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        read(tmp_path / "empty")
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(DataError, match="it has: none"):
        read(tmp_path / "e.csv")
