import gc
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.shards import ShardSet
from clipserve.shards.scan import scan
from clipserve.sources import SourceOptions
from clipserve.sources.fetch import FetchLimits
from training.shards import PackOptions, pack


def test_a_packed_table_is_read_back_whole(captioned: Any, tmp_path: Path) -> None:
    report = pack(captioned(7), tmp_path / "out")
    assert (report.num_good, report.num_bad) == (7, 0)
    shards = ShardSet.open(tmp_path / "out")
    for i in range(7):
        sample = shards.read(i)
        assert sample.image == encode(make_picture(seed=i))
        assert sample.captions == (f"picture number {i}",)
        assert sample.metadata["colour"] == ("red" if i % 2 else "blue")
        assert sample.metadata["origin"] == f"captions.csv row {i + 2}"
    assert scan(tmp_path / "out", ["000000.tar"])[0] == shards.manifest


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
    found = [(bad.origin.removeprefix("captions.csv "), bad.kind) for bad in report.first_bad]
    assert found == [
        ("row 5", "missing_image"),
        ("row 6", "empty_caption"),
        ("row 7", "bad_image"),
        ("row 8", "bad_image"),
        ("row 9", "bad_image"),
    ]
    assert "at most 64000000 pixels" in report.first_bad[3].reason
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines] == [
        bad.origin for bad in report.first_bad
    ]
    assert [json.loads(line)["record"] for line in lines] == [4, 5, 6, 7, 8]
    assert report.bad_by_kind == {"missing_image": 1, "empty_caption": 1, "bad_image": 3}


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
    for _ in range(2):  # what is left is not in the way
        with pytest.raises(DataError, match=r"no usable sample: 1 missing_image.*none\.csv row 2"):
            pack(tmp_path / "none.csv", tmp_path / "other")
    assert len((tmp_path / "other" / "bad_samples.jsonl").read_text().splitlines()) == 1
    pack(table, tmp_path / "other")  # another source: no shard was finished
    (tmp_path / "nothing.jsonl").write_text("")
    with pytest.raises(DataError, match="it is empty"):
        pack(tmp_path / "nothing.jsonl", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not an empty folder"):
        pack(table, tmp_path / "file")


def test_what_never_straddles_can_be_chosen(tmp_path: Path) -> None:
    rows = ["image,caption,product"]
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(encode(make_picture(seed=i % 20)))
        rows.append(f"{i}.png,caption {i},{i % 15 or ''}")
    (tmp_path / "t.csv").write_text("\n".join(rows))

    def parts(out: str, value: Any, **options: Any) -> list[set[Any]]:
        packing = PackOptions(val_fraction=0.4, **options)
        report = pack(tmp_path / "t.csv", tmp_path / out, packing)
        assert sum(report.packed.values()) == 60 - report.num_bad
        sets = [ShardSet.open(tmp_path / out / name) for name in ("train", "val")]
        return [{value(shards.read(i)) for i in range(len(shards))} for shards in sets]

    train, val = parts("by_image", lambda sample: sample.image, split_by="image")
    assert train.isdisjoint(val)
    assert len(train | val) == 20
    train, val = parts("by_column", lambda s: s.metadata["product"], split_by="product")
    assert train.isdisjoint(val)
    assert len(train | val) == 14
    lines = (tmp_path / "by_column" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["no_split"] * 4
    with pytest.raises(DataError, match="no column 'sku'"):
        parts("by_nothing", None, split_by="sku")
    assert not (tmp_path / "by_nothing").exists()


def test_urls_are_fetched_side_by_side_and_failures_listed(tmp_path: Path) -> None:
    from test_clipserve_sources_fetch import PICTURE, Server

    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        paths = [*["/busy"] * 20, "/no.jpg", "/hang", "/ok.jpg", "/moved"]
        rows = "".join(f"{running.url(path).address},caption\n" for path in paths)
        (tmp_path / "t.csv").write_text("url,caption\n" + rows + "ftp://x/y,caption\n")
        limits = FetchLimits(threads=8, timeout_s=3, tries=1)
        report = pack(tmp_path / "t.csv", tmp_path / "out", PackOptions(fetch=limits))
    finally:
        running.stop.set()
        running.shutdown()
        running.server_close()
        thread.join()
    assert report.num_good == 22
    assert 2 <= running.most_busy <= 8
    assert [(bad.origin, bad.kind) for bad in report.first_bad] == [
        ("t.csv row 22", "fetch_failed"),
        ("t.csv row 23", "fetch_failed"),
        ("t.csv row 26", "missing_image"),
    ]
    assert "status 404" in report.first_bad[0].reason
    shards = ShardSet.open(tmp_path / "out")
    assert {shards.read(i).image for i in range(len(shards))} == {PICTURE}


def test_texts_longer_than_shards_hold_are_bad(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encode(make_picture()))
    rows = [
        {"image": "p.png", "text": "x" * (2**20 + 1)},
        {"image": "p.png", "text": "a", "more": ["y" * 2**19] * 3},
        {"image": "p.png", "text": "x" * 2**20},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = pack(tmp_path / "t.jsonl", tmp_path / "out")
    assert report.bad_by_kind == {"long_text": 2}
    assert len(ShardSet.open(tmp_path / "out")) == 1


def test_the_report_holds_a_few_bad_ones_however_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encode(make_picture()))
    (tmp_path / "t.csv").write_text("image,caption\n" + "no.png,x\n" * 3000 + "p.png,x\n")
    report = pack(tmp_path / "t.csv", tmp_path / "out")
    assert report.bad_by_kind == {"missing_image": 3000}
    assert len(report.first_bad) == 20
    assert len((tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()) == 3000


def test_progress_knows_the_total_of_a_table(captioned: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    pack(captioned(3), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_column_by_name(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encode(make_picture()))
    (tmp_path / "t.csv").write_text("foto,words,caption\np.png,mine,other\n")
    pack(tmp_path / "t.csv", tmp_path / "out", PackOptions(SourceOptions("foto", "words")))
    assert ShardSet.open(tmp_path / "out").read(0).captions == ("mine",)


def test_the_command_takes_every_option_and_prints_json(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from clipserve.cli import app

    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "p.png").write_bytes(encode(make_picture()))
    rows = ["photo,title,colour,sku,split", "p.png,Polo,red,a,train", "p.png,Clog,,b,train"]
    rows += ["p.png,Hat,blue,c,val", "q.png,Cap,grey,d,train"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    arguments = [tmp_path / "t.csv", tmp_path / "out", "--image-column", "photo"]
    arguments += ["--caption-template", "{title}, {colour}", "--id-column", "sku", "--split"]
    arguments += ["train", "--image-folder", tmp_path / "pictures", "--group-by", "sku"]
    arguments += ["--val-fraction", 0.5, "--split-by", "sku", "--samples-per-shard", 1, "--json"]
    done = CliRunner().invoke(app, ["pack", *map(str, arguments)])
    assert done.exit_code == 1  # two of three are bad
    shown = json.loads(done.stdout)
    assert sum(shown["packed"].values()) == 1
    assert shown["bad_by_kind"] == {"empty_field": 1, "missing_image": 1}
    assert [bad["origin"] for bad in shown["first_bad"]] == ["t.csv row 3", "t.csv row 5"]
    assert Path(shown["bad_file"]).is_file()
