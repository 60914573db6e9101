import json
from pathlib import Path
from typing import Any

import pytest

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, Url, read_source


def read(path: Path, content: Any, **options: Any) -> list[Record | BadRecord]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return list(read_source(path, SourceOptions(**options)))


def test_coco_captions_belong_to_their_image(tmp_path: Path) -> None:
    coco = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "7.jpg", "coco_url": "http://x.org/7.jpg", "height": 3},
            {"id": 8, "file_name": "8.jpg"},
        ],
        "annotations": [
            {"image_id": 8, "caption": "eight"},
            {"image_id": 7, "caption": "seven"},
            {"image_id": 7, "caption": "7"},
        ],
    }
    seven, eight = read(tmp_path / "c.json", coco, image_folder=tmp_path / "val2017")
    assert isinstance(seven, Record)
    assert isinstance(eight, Record)
    assert (seven.image, seven.captions) == (tmp_path / "val2017/7.jpg", ("seven", "7"))
    assert (seven.metadata["id"], seven.metadata["height"]) == (7, 3)
    assert eight.captions == ("eight",)
    fetched = read(tmp_path / "c.json", coco, image_column="coco_url")
    assert isinstance(fetched[0], Record)
    assert fetched[0].image == Url("http://x.org/7.jpg")


def test_coco_with_missing_ids_names_what_does_not_fit(tmp_path: Path) -> None:
    coco = {
        "images": [{"file_name": "none.jpg"}, {"id": 2, "file_name": "2.jpg"}, "three"],
        "annotations": [
            {"image_id": 2, "caption": "two"},
            {"image_id": 9, "caption": "nine"},
            {"caption": "nobody's"},
            {"image_id": 2},
            None,
        ],
    }
    found = [(r.origin, getattr(r, "kind", "good")) for r in read(tmp_path / "c.json", coco)]
    assert sorted(found) == [
        ("c.json annotation 1", "missing_image"),
        ("c.json annotation 2", "bad_row"),
        ("c.json annotation 3", "bad_row"),
        ("c.json annotation 4", "bad_row"),
        ("c.json image 0", "empty_caption"),
        ("c.json image 1", "good"),
        ("c.json image 2", "bad_row"),
    ]


def test_karpathys_splits_can_be_chosen(tmp_path: Path) -> None:
    images = [
        {
            "filepath": "val2014",
            "filename": f"{i}.jpg",
            "sentids": [1],
            "sentences": [{"raw": f"one {i}", "tokens": ["one"]}, {"raw": f"two {i}"}],
            "split": split,
            "cocoid": i,
        }
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]
    karpathy = {"images": images, "dataset": "coco"}
    records = read(tmp_path / "k.json", karpathy, split="train,restval")
    assert [getattr(r, "image", None) for r in records] == [
        tmp_path / "val2014/0.jpg",
        tmp_path / "val2014/1.jpg",
    ]
    assert isinstance(records[0], Record)
    assert records[0].captions == ("one 0", "two 0")
    assert (records[0].metadata["split"], records[0].metadata["cocoid"]) == ("train", 0)
    assert len(read(tmp_path / "k.json", karpathy)) == 4


def test_a_list_of_objects_is_a_table(tmp_path: Path) -> None:
    entries = [{"image": "1.jpg", "caption": "a"}, {"image": "2.jpg", "caption": ["b", "c"]}, 3]
    records = read(tmp_path / "l.json", entries)
    assert [getattr(r, "captions", None) for r in records] == [("a",), ("b", "c"), None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"images": []}', "neither COCO"),
        ('{"images": {}, "annotations": []}', "neither COCO"),
        ("7", "neither COCO"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.json", content)


def test_a_file_too_large_to_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipserve.sources import annotations

    monkeypatch.setattr(annotations, "_MAX_BYTES", 10)
    with pytest.raises(DataError, match="at most 10; make it .jsonl"):
        read(tmp_path / "x.json", [{"image": "1.jpg", "caption": "a"}])
