"""Every form of source, made of real data: what is packed is what went in, to the byte."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipserve.shards import Sample, ShardSet
from clipserve.sources import SourceOptions
from training.shards import PackOptions, pack

DATA = Path(__file__).parents[2] / "shared" / "data"
COUNT = 36

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")


def members(tar: Path, limit: int) -> dict[str, bytes]:
    """The first members of a tar, by name."""
    with tarfile.open(tar) as opened:
        found = {m.name: opened.extractfile(m) for m in islice(opened, limit) if m.isfile()}
        return {name: file.read() for name, file in found.items() if file is not None}


def packed(source: str | Path, out: Path, **options: Any) -> list[Sample]:
    """All samples after packing, in order; none may be bad."""
    report = pack(source, out, PackOptions(SourceOptions(**options), samples_per_shard=10))
    assert report.num_bad == 0, report.first_bad
    shards = ShardSet.open(out)
    samples = [shards.read(i) for i in range(len(shards))]
    shards.close()
    return samples


Item = tuple[str, bytes, dict[str, Any]]


@pytest.fixture(scope="module")
def tiles() -> list[Item]:
    """Aerial tiles: name, bytes, and the row of the JSONL, which has five captions."""
    pictures = members(DATA / "ucm" / "images.tar", COUNT)
    with (DATA / "ucm" / "captions.jsonl").open() as file:
        rows = {row["image"]: row for row in map(json.loads, file)}
    return [(name, data, rows[name]) for name, data in pictures.items()]


@pytest.fixture(scope="module")
def emoji() -> list[Item]:
    pictures = members(DATA / "noto_emoji" / "images.tar", COUNT)
    with (DATA / "noto_emoji" / "captions.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    return [(name, data, rows[name]) for name, data in pictures.items() if name in rows]


@pytest.fixture(scope="module")
def products() -> list[Item]:
    """Product photos: key, bytes, and the attributes, with the title under "txt"."""
    found = members(DATA / "fashion" / "train-00000.tar", 3 * COUNT)
    return [
        (
            key,
            found[f"{key}.jpg"],
            json.loads(found[f"{key}.json"]) | {"txt": found[f"{key}.txt"].decode()},
        )
        for key in (name[:-4] for name in found if name.endswith(".jpg"))
    ]


def unpack(items: list[Item], folder: Path) -> None:
    for name, data, _ in items:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def clean(*texts: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(" ".join(text.split()) for text in texts))


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_csv_and_tsv(emoji: list[Item], tmp_path: Path, suffix: str, delimiter: str) -> None:
    unpack(emoji, tmp_path)
    table = tmp_path / f"captions.{suffix}"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(emoji[0][2]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(row for _, _, row in emoji)
    samples = packed(table, tmp_path / "out")
    assert [s.image for s in samples] == [data for _, data, _ in emoji]
    assert [s.captions for s in samples] == [clean(row["caption"]) for _, _, row in emoji]
    for number, (sample, (_, _, row)) in enumerate(zip(samples, emoji, strict=True), start=2):
        expected = {k: v for k, v in row.items() if k != "caption" and v}
        assert sample.metadata == expected | {"origin": f"captions.{suffix} row {number}"}


def test_jsonl_with_five_captions(tiles: list[Item], tmp_path: Path) -> None:
    unpack(tiles, tmp_path)
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for _, _, row in tiles))
    samples = packed(table, tmp_path / "out")
    assert [s.image for s in samples] == [data for _, data, _ in tiles]
    assert [s.captions for s in samples] == [clean(*row["captions"]) for _, _, row in tiles]
    assert [s.metadata["class"] for s in samples] == [row["class"] for _, _, row in tiles]


def test_a_csv_with_a_row_for_each_caption(tiles: list[Item], tmp_path: Path) -> None:
    unpack(tiles, tmp_path)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((name, text) for name, _, row in tiles for text in row["captions"])
    samples = packed(tmp_path / "t.csv", tmp_path / "out", group_by="image")
    assert [s.image for s in samples] == [data for _, data, _ in tiles]
    assert [s.captions for s in samples] == [clean(*row["captions"]) for _, _, row in tiles]


@pytest.mark.parametrize("form", ["bytes", "paths"])
def test_parquet(products: list[Item], tmp_path: Path, form: str) -> None:
    unpack([(f"{key}.jpg", data, row) for key, data, row in products], tmp_path)
    table = pa.table(
        {
            "image": [data if form == "bytes" else f"{key}.jpg" for key, data, _ in products],
            "text": [row["txt"] for _, _, row in products],
            "year": [int(row["year"]) for _, _, row in products],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    samples = packed(tmp_path / "t.parquet", tmp_path / "out")
    assert [s.image for s in samples] == [data for _, data, _ in products]
    assert [s.captions for s in samples] == [clean(row["txt"]) for _, _, row in products]
    assert [s.metadata["year"] for s in samples] == [int(row["year"]) for _, _, row in products]


Write = Callable[[Path, dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".txt", lambda path, row: path.write_text("\n".join(row["captions"]))),
        (".json", lambda path, row: path.write_text(json.dumps(row))),
    ],
)
def test_a_folder_with_side_files(
    tiles: list[Item], tmp_path: Path, suffix: str, write: Write
) -> None:
    unpack(tiles, tmp_path / "in")
    for name, _, row in tiles:
        write((tmp_path / "in" / name).with_suffix(suffix), row)
    samples = packed(tmp_path / "in", tmp_path / "out")
    by_name = sorted(tiles, key=lambda item: item[0])
    assert [s.image for s in samples] == [data for _, data, _ in by_name]
    assert [s.captions for s in samples] == [clean(*row["captions"]) for _, _, row in by_name]


def test_a_folder_for_each_class(products: list[Item], tmp_path: Path) -> None:
    named = [
        (f"{row['articleType'].replace(' ', '_')}/{key}.jpg", data, row)
        for key, data, row in products
    ]
    unpack(named, tmp_path / "in")
    samples = packed(tmp_path / "in", tmp_path / "out", caption_template="a photo of {label}")
    named.sort(key=lambda item: item[0].split("/"))
    assert [s.image for s in samples] == [data for _, data, _ in named]
    labels = [name.split("/")[0] for name, _, _ in named]
    assert [s.metadata["label"] for s in samples] == labels
    assert samples[0].captions == (f"a photo of {labels[0]}",)
    plain = packed(tmp_path / "in", tmp_path / "plain")
    assert [s.captions for s in plain] == [clean(row["articleType"]) for _, _, row in named]


@pytest.mark.parametrize("form", ["coco", "karpathy"])
def test_coco_and_karpathy(tiles: list[Item], tmp_path: Path, form: str) -> None:
    unpack(tiles, tmp_path / "pictures")
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number, (name, _, row) in enumerate(tiles):
        if form == "coco":
            content["images"].append({"id": number, "file_name": name})
            content["annotations"] += [
                {"image_id": number, "caption": text} for text in row["captions"]
            ]
        else:
            folder, file = name.split("/")
            sentences = [{"raw": text} for text in row["captions"]]
            content["images"].append(
                {
                    "filepath": folder,
                    "filename": file,
                    "sentences": sentences,
                    "split": row["split"],
                }
            )
    (tmp_path / "c.json").write_text(json.dumps(content))
    samples = packed(tmp_path / "c.json", tmp_path / "out", image_folder=tmp_path / "pictures")
    assert [s.image for s in samples] == [data for _, data, _ in tiles]
    assert [s.captions for s in samples] == [clean(*row["captions"]) for _, _, row in tiles]
    if form == "karpathy":
        assert [s.metadata["split"] for s in samples] == [row["split"] for _, _, row in tiles]


def test_a_hugging_face_dataset(products: list[Item], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package `datasets` is missing")
    rows = {
        "image": [{"bytes": data, "path": None} for _, data, _ in products],
        "title": [row["title"] for _, _, row in products],
        "baseColour": [row["baseColour"] for _, _, row in products],
    }
    features = datasets.Features(
        image=datasets.Image(),
        title=datasets.Value("string"),
        baseColour=datasets.Value("string"),
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    template = "{title}, {baseColour}"
    samples = packed(tmp_path / "saved", tmp_path / "out", caption_template=template)
    assert [s.image for s in samples] == [data for _, data, _ in products]
    assert samples[0].captions == clean(template.format(**products[0][2]))


def test_img2dataset_output(products: list[Item], tmp_path: Path) -> None:
    """Tars with a JSON as img2dataset writes it, and its parquet with one row that failed."""
    (tmp_path / "in").mkdir()
    keys = [f"{number:09d}" for number in range(len(products))]
    with tarfile.open(tmp_path / "in" / "00000.tar", "w") as tar:
        for key, (_, data, row) in zip(keys, products, strict=True):
            facts = {"key": key, "caption": row["txt"], "status": "success", "width": 60}
            for name, content in (
                (f"{key}.jpg", data),
                (f"{key}.txt", row["txt"].encode()),
                (f"{key}.json", json.dumps(facts).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    status = ["success"] * len(keys) + ["failed_to_download"]
    log = pa.table({"key": [*keys, "000000999"], "status": status})
    pq.write_table(log, tmp_path / "in" / "00000.parquet")
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    report = pack(tmp_path / "in", tmp_path / "out")
    assert (report.num_good, report.bad_by_kind) == (len(products), {"failed_to_download": 1})
    shards = ShardSet.open(tmp_path / "out")
    assert [shards.read(i).image for i in range(len(shards))] == [d for _, d, _ in products]
    assert shards.read(3).metadata["width"] == 60


def test_webdataset_tars(tmp_path: Path) -> None:
    source = DATA / "fashion" / "val-00002.tar"
    shutil.copy(source, tmp_path / source.name)
    given = ShardSet.open(tmp_path / source.name)
    originals = [given.read(i) for i in range(len(given))]
    report = pack(tmp_path / source.name, tmp_path / "out")
    assert (report.num_good, report.num_bad) == (len(originals), 0)
    shards = ShardSet.open(tmp_path / "out")
    for i, original in enumerate(originals):
        sample = shards.read(i)
        assert (sample.image, sample.captions) == (original.image, clean(*original.captions))
        assert original.metadata.items() <= sample.metadata.items()
