import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, make_picture

from clipserve.errors import ConfigError, DataError, SampleError
from clipserve.sources import BadRecord, Record, SourceOptions, read_source
from clipserve.sources.numeric import to_number


def read(path: Path, **options: Any) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def metadata(records: list[Record | BadRecord]) -> list[dict[str, Any]]:
    good = [record for record in records if isinstance(record, Record)]
    assert len(good) == len(records), records
    return [{k: v for k, v in one.metadata.items() if k not in ("image", "url")} for one in good]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("45", 45),
        (" -7 ", -7),
        ("+007", 7),
        ("45.0", 45.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("9007199254740993", 2**53 + 1),
        (45, 45),
        (4.5, 4.5),
        (Decimal("12.50"), 12.5),
        (Decimal("12"), 12),
        (["1", "", 2.5, None], [1, 2.5]),
        ("", None),
        (" \t", None),
        (None, None),
        (float("nan"), None),
        ([], []),
    ],
)
def test_a_text_becomes_the_number_it_says(value: Any, number: Any) -> None:
    found = to_number("n", value)
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("45 EUR", "'45 EUR'"),
        ("12,50", "'12,50'"),
        ("1_000", "'1_000'"),
        ("\u0661\u0662", "'\u0661\u0662'"),
        ("0x10", "'0x10'"),
        ("inf", "'inf'"),
        ("nan", "'nan'"),
        ("1e999", "'1e999'"),
        ("9" * 5000, "'" + "9" * 40 + "'"),
        (float("inf"), "inf"),
        (True, "True"),
        (["1", "x"], "'x'"),
        ([["1"]], "a list"),
        ({"amount": 1}, "a dict"),
        ("\udcff", "'\\\\udcff'"),
    ],
)
def test_what_is_no_finite_number_is_named(value: Any, shown: str) -> None:
    with pytest.raises(SampleError) as caught:
        to_number("n", value)
    assert str(caught.value) == f"column 'n' holds {shown}, no finite number"
    assert caught.value.kind == "bad_number"


def test_columns_of_a_csv_hold_numbers_and_a_wrong_cell_costs_its_row(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv",
        "image,title,price,year,size\n"
        "1.jpg,Hat,45,2012,7\n2.jpg,Cap,,2013.5,8\n3.jpg,Tie,4 EUR,1,9\n",
    )
    template = "{title} for {price}"
    *good, bad = read(table, number_columns="price, year", caption_column="title")
    assert metadata(good) == [
        {"price": 45, "year": 2012, "size": "7"},
        {"year": 2013.5, "size": "8"},
    ]
    assert bad == BadRecord(
        "t/000000002",
        "t.csv row 4",
        "bad_number",
        "column 'price' holds '4 EUR', no finite number",
    )
    (first, *_) = read(table, number_columns="price", caption_template=template)
    assert isinstance(first, Record)
    assert (first.captions, first.metadata["price"]) == (("Hat for 45",), 45)


def test_every_kind_of_table_has_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "1.jpg", "caption": "a", "n": "4"},
        {"image": "2.jpg", "caption": "b", "n": 4.5},
        {"image": "3.jpg", "caption": "c"},
    ]
    wanted = [{"n": 4}, {"n": 4.5}, {}]
    lines = "\n".join(map(json.dumps, rows))
    assert metadata(read(write(tmp_path / "t.jsonl", lines), number_columns="n")) == wanted
    listed = write(tmp_path / "t.json", json.dumps(rows))
    assert metadata(read(listed, number_columns="n")) == wanted
    tabs = write(tmp_path / "t.tsv", "image\tcaption\tn\n1.jpg\ta\t4\n2.jpg\tb\t4.5\n3.jpg\tc\t\n")
    assert metadata(read(tabs, number_columns="n")) == wanted
    columns = {name: [row.get(name) for row in rows] for name in ("image", "caption")}
    for values in (["4", "4.5", None], [Decimal("4"), Decimal("4.5"), None]):
        pq.write_table(pa.table(columns | {"n": values}), tmp_path / "t.parquet")
        found = metadata(read(tmp_path / "t.parquet", number_columns="n"))
        assert [one.get("n") for one in found] == [4, 4.5, None]


def test_fields_of_side_files_are_numbers_where_they_are(tmp_path: Path) -> None:
    for name, side in {"a": {"n": "4"}, "b": {}, "c": {"n": "four"}}.items():
        (tmp_path / f"{name}.png").write_bytes(encode(make_picture()))
        write(tmp_path / f"{name}.json", json.dumps({"caption": name} | side))
    *good, bad = read(tmp_path, number_columns="n")
    assert metadata(good) == [{"n": 4}, {}]
    assert isinstance(bad, BadRecord)
    assert (bad.origin, bad.kind) == ("c.png", "bad_number")


def test_a_column_may_have_a_comma_in_its_name_and_join_rows(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", 'image,caption,"a,b"\n1.jpg,x,1\n1.jpg,y,1.0\n2.jpg,z,2\n')
    records = read(table, number_columns="a,b", group_by="a,b")
    assert metadata(records) == [{"a,b": 1}, {"a,b": 2}]


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "image,caption,price,year\n1.jpg,a,1,2\n")
    with pytest.raises(
        DataError, match=r"no column 'prise'; it has: image, .*; did you mean 'price'\?"
    ):
        read(table, number_columns="year,prise")
    with pytest.raises(ConfigError, match="'caption' cannot hold numbers: it is the caption"):
        read(table, number_columns="caption")
