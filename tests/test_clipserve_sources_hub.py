import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, count_records, read_source

PICTURES = [encode(make_picture(seed=i)) for i in range(4)]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return pytest.importorskip("datasets", reason="the optional package `datasets` is missing")


def make(datasets: Any, start: int, stop: int) -> Any:
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    rows = {
        "image": [{"bytes": PICTURES[i], "path": None} for i in range(start, stop)],
        "caption": [f"number {i}" for i in range(start, stop)],
        "label": [i % 2 for i in range(start, stop)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def good(source: str | Path, **options: Any) -> list[Record]:
    records = list(read_source(source, SourceOptions(**options)))
    assert not [record for record in records if isinstance(record, BadRecord)]
    return [record for record in records if isinstance(record, Record)]


def test_a_saved_dataset_gives_the_bytes_as_they_are(datasets: Any, tmp_path: Path) -> None:
    make(datasets, 0, 4).save_to_disk(str(tmp_path / "saved"))
    records = good(tmp_path / "saved")
    assert [record.image for record in records] == PICTURES
    assert [record.captions for record in records] == [(f"number {i}",) for i in range(4)]
    assert records[1].metadata == {"label": "dog"}
    assert records[1].origin == "saved row 1"
    assert count_records(tmp_path / "saved") == 4
    by_label = good(tmp_path / "saved", caption_template="a photo of a {label}")
    assert by_label[0].captions == ("a photo of a cat",)


def test_of_several_splits_all_or_the_wanted_are_read(datasets: Any, tmp_path: Path) -> None:
    parts = datasets.DatasetDict(train=make(datasets, 0, 3), test=make(datasets, 3, 4))
    parts.save_to_disk(str(tmp_path / "saved"))
    everything = good(tmp_path / "saved")
    assert [record.metadata["split"] for record in everything] == ["train"] * 3 + ["test"]
    assert len({record.key for record in everything}) == 4
    assert [r.image for r in good(tmp_path / "saved", split="test")] == PICTURES[3:]
    with pytest.raises(DataError, match=r"no split 'val'; it has: train, test"):
        good(tmp_path / "saved", split="val")


def test_a_named_dataset_is_streamed(datasets: Any, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    make(datasets, 0, 3).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    make(datasets, 3, 4).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    train = good(f"hf:{folder}")
    assert [record.image for record in train] == PICTURES[:3]
    assert train[0].metadata["split"] == "train"
    assert [r.image for r in good(f"hf:{folder}:test")] == PICTURES[3:]
    assert [r.image for r in good(f"hf:{folder}", split="test,train")] == [
        PICTURES[3],
        *PICTURES[:3],
    ]


def test_what_cannot_be_read_is_one_line(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no dataset"):
        good("hf:")
    with pytest.raises(DataError, match=r"dataset hf:\S+ cannot be read: ") as caught:
        good(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        good(folder)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'clipserve\[hf\]'"):
        good("hf:some/name")
