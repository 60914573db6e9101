import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, read_source
from clipserve.sources.tars import ShardRecords

PICTURE = encode(make_picture(), "JPEG")


def write_tar(path: Path, samples: dict[str, dict[str, Any]]) -> None:
    """key -> {extension: bytes, text or JSON}"""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                data = content if isinstance(content, bytes) else str(content).encode()
                data = json.dumps(content).encode() if isinstance(content, dict) else data
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read(path: Path, **options: Any) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def test_captions_as_they_are_or_made_of_the_json(tmp_path: Path) -> None:
    fields = {"title": "Polo", "colour": "red", "split": "train"}
    write_tar(
        tmp_path / "a.tar",
        {
            "1": {"jpg": PICTURE, "txt": "words", "json": fields},
            "2": {"jpg": PICTURE, "txt": "others", "json": {"title": "Clog", "split": "val"}},
        },
    )
    assert [getattr(r, "captions", None) for r in read(tmp_path)] == [("words",), ("others",)]
    made = read(tmp_path, caption_template="{caption}: {title}, {colour}")
    assert isinstance(made[0], Record)
    assert made[0].captions == ("words: Polo, red",)
    assert made[0].metadata == fields
    assert getattr(made[1], "kind", "") == "empty_field"
    assert [r.key for r in read(tmp_path, split="val")] == ["a/2"]
    assert [r.key for r in read(tmp_path, id_column="title")] == ["Polo", "Clog"]
    by_title = read(tmp_path, caption_column="title")[0]
    assert isinstance(by_title, Record)
    assert by_title.captions == ("Polo",)
    with pytest.raises(DataError, match="is no table: image_column"):
        read(tmp_path, image_column="jpg")


def test_fields_of_the_json_are_numbers_where_they_are(tmp_path: Path) -> None:
    jsons: list[dict[str, Any]] = [{"price": "45", "n": "1"}, {"n": "2"}, {"price": "cheap"}]
    samples = {f"{i}": {"jpg": PICTURE, "txt": "a", "json": each} for i, each in enumerate(jsons)}
    write_tar(tmp_path / "a.tar", samples)
    first, second, bad = read(tmp_path, number_columns="price")
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.metadata, second.metadata) == ({"price": 45, "n": "1"}, {"n": "2"})
    assert isinstance(bad, BadRecord)
    assert (bad.origin, bad.kind) == ("a.tar:2", "bad_number")
    assert bad.reason == "column 'price' holds 'cheap', no finite number"


def test_what_img2dataset_could_not_download_is_bad(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"000000000": {"jpg": PICTURE, "txt": "a", "json": {}}})
    pq.write_table(
        pa.table(
            {
                "key": ["000000000", "000000001", "000000002"],
                "url": ["http://x/0", "http://x/1", "http://x/2"],
                "status": ["success", "failed_to_download", "failed_to_resize"],
                "error_message": [None, "HTTP Error 404", "too small"],
            }
        ),
        tmp_path / "00000.parquet",
    )
    found = [(r.key, getattr(r, "kind", "good")) for r in read(tmp_path)]
    assert found == [
        ("000000001", "failed_to_download"),
        ("000000002", "failed_to_resize"),
        ("00000/000000000", "good"),
    ]


def test_a_sample_that_changes_meanwhile_is_bad_and_the_others_good(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {str(i): {"jpg": PICTURE, "txt": f"caption {i}"} for i in range(3)})
    records = read_source(path)
    assert isinstance(next(records), Record)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"caption 1", b"caption X"))
    assert [getattr(r, "kind", "good") for r in records] == ["changed", "good"]


def test_an_id_that_comes_again_is_refused(tmp_path: Path) -> None:
    sample = {"jpg": PICTURE, "txt": "a", "json": {"id": "same"}}
    write_tar(tmp_path / "a.tar", {"1": sample, "2": sample, "3": {"jpg": PICTURE, "txt": "b"}})
    assert [getattr(r, "kind", "good") for r in read(tmp_path, id_column="id")] == [
        "good",
        "bad_id",
        "bad_id",
    ]


def test_some_samples_are_read_by_their_numbers_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {str(i): {"jpg": PICTURE, "txt": f"caption {i}"} for i in range(5)})
    everything = read(tmp_path)
    with ShardRecords(tmp_path, SourceOptions()) as source:
        assert [*source.records(0, 2), *source.records(2, 5)] == everything
        assert list(source.records(3, 3)) == []
        assert list(source.bad()) == []
        path.write_bytes(path.read_bytes().replace(b"caption 1", b"caption X"))
        assert list(source.records(2, 5)) == everything[2:]


def test_of_some_samples_those_of_another_split_are_left_out(tmp_path: Path) -> None:
    splits = ["train", "val", "train", "val"]
    samples = {
        str(i): {"jpg": PICTURE, "txt": "a", "json": {"split": split}}
        for i, split in enumerate(splits)
    }
    write_tar(tmp_path / "a.tar", samples)
    with ShardRecords(tmp_path, SourceOptions(split="val")) as source:
        assert [record.key for record in source.records(0, 3)] == ["a/1"]
