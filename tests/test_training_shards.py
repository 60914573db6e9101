import gc
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.shards import ShardSet, verify
from clipserve.sources import SourceOptions
from training.shards import PackOptions, pack


def test_a_packed_table_is_read_back_whole(captioned: Any, tmp_path: Path) -> None:
    report = pack(captioned(7), tmp_path / "out")
    assert (report.num_good, report.bad) == (7, [])
    shards = ShardSet.open(tmp_path / "out")
    for i in range(7):
        sample = shards.read(i)
        assert sample.image == encode(make_picture(seed=i))
        assert sample.captions == (f"picture number {i}",)
        assert sample.metadata["colour"] == ("red" if i % 2 else "blue")
        assert sample.metadata["origin"] == f"captions.csv row {i + 2}"
    assert verify(tmp_path / "out")[1] == []


# webdataset leaves the files it read to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(captioned: Any, tmp_path: Path) -> None:
    pack(captioned(5), tmp_path / "out", PackOptions(samples_per_shard=2))
    urls = sorted(str(file) for file in (tmp_path / "out").glob("*.tar"))
    assert [Path(url).name for url in urls] == ["000000.tar", "000001.tar", "000002.tar"]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [
        f"picture number {i}" for i in range(5)
    ]
    assert samples[3]["png"] == encode(make_picture(seed=3))
    gc.collect()


def test_packing_is_deterministic(captioned: Any, tmp_path: Path) -> None:
    table = captioned(5)
    for name in ("a", "b"):
        pack(table, tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_bad_rows_are_listed_with_row_and_reason(captioned: Any, tmp_path: Path) -> None:
    from test_clipserve_images import png_header

    table = captioned(3)
    (table.parent / "cut.jpg").write_bytes(encode(make_picture(), "JPEG")[:200])
    (table.parent / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (table.parent / "text.jpg").write_text("I am no picture")
    with table.open("a") as file:
        file.write("nowhere.jpg,x,\n0.png,,\ncut.jpg,x,\nbomb.png,x,\ntext.jpg,x,\n1.png,again,\n")
    report = pack(table, tmp_path / "out")
    assert report.num_good == 4
    assert report.bad_fraction == 5 / 9
    found = [(bad.origin.removeprefix("captions.csv "), bad.kind) for bad in report.bad]
    assert found == [
        ("row 5", "missing_image"),
        ("row 6", "empty_caption"),
        ("row 7", "bad_image"),
        ("row 8", "bad_image"),
        ("row 9", "bad_image"),
    ]
    assert "at most 64000000 pixels" in report.bad[3].reason
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines] == [bad.origin for bad in report.bad]


def test_several_captions_and_other_formats(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(encode(make_picture(), "BMP"))
    (tmp_path / "t.jsonl").write_text('{"image": "a.bmp", "captions": ["one", "two"]}\n')
    pack(tmp_path / "t.jsonl", tmp_path / "out")
    sample = ShardSet.open(tmp_path / "out").read(0)
    assert sample.captions == ("one", "two")
    assert sample.image.startswith(b"\x89PNG")
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".png", ".txt", ".json"}


def test_shards_and_folders_pack_again(captioned: Any, tmp_path: Path) -> None:
    pack(captioned(4), tmp_path / "first")
    assert pack(tmp_path / "first", tmp_path / "second").num_good == 4
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.png").write_bytes(encode(make_picture()))
    (folder / "x.txt").write_text("a folder's caption")
    pack(folder, tmp_path / "third")
    assert ShardSet.open(tmp_path / "third").read(0).captions == ("a folder's caption",)


def test_equal_captions_never_straddle_the_split(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encode(make_picture()))
    rows = "".join(f"p.png,Caption {i % 40}\np.png,caption {i % 40}\n" for i in range(80))
    (tmp_path / "t.csv").write_text("image,caption\n" + rows)
    report = pack(tmp_path / "t.csv", tmp_path / "out", PackOptions(val_fraction=0.3))
    assert set(report.packed) == {"train", "val"}
    assert 0.1 < report.packed["val"] / 160 < 0.5

    def captions(part: str) -> set[str]:
        shards = ShardSet.open(tmp_path / "out" / part)
        return {shards.read(i).captions[0].lower() for i in range(len(shards))}

    assert captions("train").isdisjoint(captions("val"))
    assert len(captions("train") | captions("val")) == 40


def test_a_full_folder_and_an_empty_source_are_refused(captioned: Any, tmp_path: Path) -> None:
    table = captioned(2)
    pack(table, tmp_path / "out")
    with pytest.raises(DataError, match="is not an empty folder"):
        pack(table, tmp_path / "out")
    (tmp_path / "none.csv").write_text("image,caption\nx.jpg,words\n")
    for _ in range(2):  # nothing is left that would be in the way
        with pytest.raises(DataError, match=r"no usable sample: 1 missing_image.*none\.csv row 2"):
            pack(tmp_path / "none.csv", tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not an empty folder"):
        pack(table, tmp_path / "file")


def test_an_interrupted_pack_leaves_nothing_that_looks_whole(
    captioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import shards

    def broken(record: Any, limits: Any) -> Any:
        if record.origin.endswith("row 5"):
            raise KeyboardInterrupt
        return real(record, limits)

    real = shards._check
    monkeypatch.setattr(shards, "_check", broken)
    with pytest.raises(KeyboardInterrupt):
        pack(captioned(9), tmp_path / "out", PackOptions(samples_per_shard=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_column_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encode(make_picture()))
    (tmp_path / "t.csv").write_text("foto,words,caption\np.png,mine,other\n")
    pack(tmp_path / "t.csv", tmp_path / "out", PackOptions(SourceOptions("foto", "words")))
    assert ShardSet.open(tmp_path / "out").read(0).captions == ("mine",)
