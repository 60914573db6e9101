from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, Url, count_records, read_source


def read(path: Path, **options: Any) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def good(path: Path, **options: Any) -> list[Record]:
    return [record for record in read(path, **options) if isinstance(record, Record)]


def test_pictures_as_bytes_paths_structs_and_urls(tmp_path: Path) -> None:
    data = encode(make_picture())
    columns: dict[str, list[Any]] = {
        "binary": [data],
        "path": ["sub/1.png"],
        "struct": [{"bytes": data, "path": "1.png"}],
        "only_path": [{"bytes": None, "path": "2.png"}],
        "url": ["https://x.org/1.png"],
        "captions": [["one", "two"]],
        "price": [Decimal("1.50")],
        "seen": [datetime(2024, 1, 2)],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = {
        name: good(tmp_path / "t.parquet", image_column=name)[0].image
        for name in ("binary", "path", "struct", "only_path", "url")
    }
    assert found == {
        "binary": data,
        "path": tmp_path / "sub/1.png",
        "struct": data,
        "only_path": tmp_path / "2.png",
        "url": Url("https://x.org/1.png"),
    }
    (record,) = good(tmp_path / "t.parquet", image_column="binary")
    assert record.captions == ("one", "two")
    assert (record.key, record.origin) == ("t/000000000", "t.parquet row 0")
    assert record.metadata["price"] == "1.50"
    assert record.metadata["seen"].startswith("2024-01-02")
    assert "binary" not in record.metadata


def test_a_folder_of_parquet_files_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        table = pa.table({"image": [f"{name}{i}.jpg" for i in range(3)], "text": ["x"] * 3})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert [r.key for r in good(tmp_path)] == [f"{n}/{i:09d}" for n in "ab" for i in range(3)]
    assert count_records(tmp_path) == 6


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    table = pa.table({"image": [f"{i}.jpg" for i in range(300)], "text": ["w" * 50] * 300})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=100, use_dictionary=False, compression="snappy")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    records = read(path)
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert [(r.origin, r.kind) for r in bad] == [("t.parquet rows 100 to 199", "bad_row_group")]
    assert [r.origin for r in good(path)] == [
        f"t.parquet row {i}" for i in [*range(100), *range(200, 300)]
    ]


def test_what_only_calls_itself_parquet_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PAR1", b"<html>no</html>" * 100, b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"t\.parquet is not a parquet file"):
            read(tmp_path / "t.parquet")


def test_columns_are_checked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"x"], "words": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no image column I know.*it has: jpg, words"):
        read(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no column 'colour'"):
        read(tmp_path / "t.parquet", image_column="jpg", caption_template="{colour}")
