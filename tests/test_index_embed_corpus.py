import io
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode, make_picture, tiny_architecture
from PIL import Image
from tars import Members, write_tar

import clipserve
from clipserve.checkpoint import save
from clipserve.errors import DataError, IndexStoreError
from clipserve.images import open_image
from clipserve.model import Model, create
from clipserve.shards import Sample, ShardSet
from clipserve.sources import Record, SourceOptions
from index import embed_corpus as module
from index import units
from index.collection import Collection, Item
from index.embed_corpus import embed_corpus
from index.search import Searcher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "t"
    save(create(tiny_architecture()), path, name="t")
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> Model:
    return clipserve.load(model_path, device="cpu", dtype="fp32")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 pictures in a table; number 7 is no picture, number 11 is missing, 13 has no caption."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    random = np.random.default_rng(0)
    for i in range(20):
        pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((400, 300)).save(folder / f"{i}.png", compress_level=0)
        captions = ["", "no"] if i == 13 else [f"picture {i}", f"the {i}th"]
        rows.append({"image": f"{i}.png", "caption": captions[: 1 + (i != 13)], "number": i})
    (folder / "7.png").write_bytes(b"no picture")
    (folder / "11.png").unlink()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_a_source_becomes_a_searchable_collection(
    model: Model, source: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int | None]] = []
    report = embed_corpus(
        model,
        source,
        tmp_path / "pets",
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (report.added, report.skipped, len(report.bad)) == (17, 0, 3)
    assert seen == [(4, 20), (8, 20), (12, 20), (16, 20), (20, 20)]
    pictures = [source.parent / f"{i}.png" for i in (0, 5, 19)]
    vectors = model.embed_images(pictures)
    with Searcher(tmp_path / "pets", fingerprint=model.info.fingerprint) as searcher:
        assert searcher.collection.model_name == "t"
        best = [hits[0] for hits in searcher.search(vectors, 3)]
        assert [hit.id for hit in best] == ["rows/000000000", "rows/000000005", "rows/000000019"]
        assert np.allclose([hit.score for hit in best], 1, atol=1e-5)
        assert best[1].caption == "picture 5 | the 5th"
        assert best[1].source == "rows.jsonl line 6"
        assert best[1].metadata["number"] == 5
        thumbnail = searcher.collection.thumbnail("rows/000000005")
    assert thumbnail is not None
    small = Image.open(io.BytesIO(thumbnail))
    assert (small.format, small.size) == ("JPEG", (256, 192))
    expected = np.asarray(open_image(pictures[1]).resize((256, 192)), dtype=float)
    assert np.abs(np.asarray(small, dtype=float) - expected).mean() < 5


def test_bad_records_are_named_with_their_reasons(
    model: Model, source: Path, tmp_path: Path
) -> None:
    report = embed_corpus(model, source, tmp_path / "pets", batch_size=64)
    bad = {record.key: (record.origin, record.kind, record.reason) for record in report.bad}
    assert set(bad) == {"rows/000000007", "rows/000000011", "rows/000000013"}
    assert bad["rows/000000007"][:2] == ("rows.jsonl line 8", "bad_image")
    assert "not a picture" in bad["rows/000000007"][2]
    assert "No such file" in bad["rows/000000011"][2]
    assert bad["rows/000000013"][1] == "empty_caption"


def test_a_second_run_skips_what_is_there(model: Model, source: Path, tmp_path: Path) -> None:
    embed_corpus(model, source, tmp_path / "pets", batch_size=4)
    with Collection.open(tmp_path / "pets") as collection:
        before = collection.generation()
        Image.new("RGB", (9, 9)).save(source.parent / "7.png")
        report = embed_corpus(model, source, tmp_path / "pets", batch_size=4)
        assert (report.added, report.skipped, len(report.bad)) == (1, 17, 2)
        assert collection.generation() == before + 1
        assert collection.count() == 18
        report = embed_corpus(model, source, tmp_path / "pets", batch_size=4, overwrite=True)
        assert (report.added, report.skipped) == (18, 0)
        assert collection.count() == 18


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: Model, source: Path, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done == 16:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"batch_size": 4, "unit_size": 8}
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(model, source, tmp_path / "pets", progress=interrupt, **settings)
    report = embed_corpus(model, source, tmp_path / "pets", **settings)
    assert (report.added, report.skipped) == (10, 7)
    embed_corpus(model, source, tmp_path / "whole", **settings)
    assert contents(tmp_path / "pets") == contents(tmp_path / "whole")


def contents(path: Path) -> dict[str, Any]:
    """All that a collection holds, to the last bit."""
    with Collection.open(path) as collection:
        rowids = collection.rowids()
        return {
            "items": collection.items_of(rowids),
            "vectors": collection.vectors_of(rowids).tobytes(),
            "texts": [(r.tolist(), v.tobytes()) for r, v in collection.vector_blocks(0, "text")],
            "thumbnails": collection.thumbnails_of(rowids),
            "units": collection.units(),
            "count": collection.count(),
        }


# Forks before it has threads, so that many runs are killed at the price of one start.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
import clipserve
from index.collection import Collection, Item
from index.embed_corpus import embed_corpus

model_path, source, folder, *points = sys.argv[1:]
torch.set_num_threads(1)
model = clipserve.load(model_path, device="cpu", dtype="fp32")
upsert, tell = Collection.upsert, print

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def run(name, where, count):
    commits = 0

    def progress(done, total):
        if where == "batch" and done >= count:
            die()

    def counted(*arguments, **keywords):
        nonlocal commits
        commits += 1
        if where == "before" and commits == count:
            die()
        upsert(*arguments, **keywords)
        if where == "after" and commits == count:
            die()

    Collection.upsert = counted
    out = Path(folder) / name
    embed_corpus(model, source, out, batch_size=2, unit_size=5, with_text=True, progress=progress)

for point in points:
    name, where, count = point.split(":")
    child = os.fork()
    if not child:
        status = 1
        try:
            run(name, where, float(count))
            status = 0
        finally:
            os._exit(status)
    if where == "later":
        time.sleep(float(count))
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tell(point, ended, flush=True)
"""


def run_killed(model: Path, source: Path, folder: Path, points: Sequence[str]) -> list[int]:
    """Runs into collections of `folder`, each killed at its point, and how they ended."""
    command = [sys.executable, "-c", KILLED, str(model), str(source), str(folder), *points]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ends = [line.split() for line in done.stdout.splitlines()]
    assert [point for point, _ in ends] == list(points)
    return [int(code) for _, code in ends]


def shard(path: Path, count: int, damaged: Sequence[int] = ()) -> Path:
    """A shard of small pictures; some of them are none."""
    members: Members = []
    for i in range(count):
        picture = b"none" if i in damaged else encode(make_picture(seed=i), "JPEG")
        members += [(f"{i:03d}.jpg", picture), (f"{i:03d}.txt", f"picture {i}".encode())]
    return write_tar(path, members)


def test_a_run_killed_again_and_again_leaves_what_an_unharmed_one_does(
    model_path: Path, source: Path, tmp_path: Path
) -> None:
    kills = ["before:1", "batch:4", "after:1", "before:2", "batch:12", "after:1"]
    points = [*(f"pets:{kill}" for kill in kills), "pets:none:0", "whole:none:0"]
    assert run_killed(model_path, source, tmp_path, points) == [-9] * 6 + [0, 0]
    assert contents(tmp_path / "pets") == contents(tmp_path / "whole")
    with Collection.open(tmp_path / "whole") as collection:
        assert collection.count() == 17


@pytest.mark.slow
def test_a_run_over_shards_killed_at_random_leaves_what_an_unharmed_one_does(
    model_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a.tar", "b.tar"):
        shard(folder / name, 40, damaged=[3])
    delays = random.Random(0)
    kills = [f"pets:later:{delays.uniform(0.01, 0.5):.3f}" for _ in range(40)]
    points = [*kills, "pets:none:0", "whole:none:0"]
    ends = run_killed(model_path, folder, tmp_path, points)
    assert ends[-2:] == [0, 0]
    assert -9 in ends
    assert contents(tmp_path / "pets") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "pets")["items"]) == 78


def test_a_finished_unit_of_a_shard_is_passed_over_without_a_look_at_its_samples(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "a.tar", 7, damaged=[2])
    report = embed_corpus(model, path, tmp_path / "pets", unit_size=3, batch_size=2)
    assert (report.added, report.num_bad) == (6, 1)
    reads: list[int] = []
    read = ShardSet.read

    def counted(self: ShardSet, i: int) -> Sample:
        reads.append(i)
        return read(self, i)

    monkeypatch.setattr(ShardSet, "read", counted)
    seen: list[tuple[int, int | None]] = []
    report = embed_corpus(
        model,
        path,
        tmp_path / "pets",
        unit_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (report.added, report.skipped, report.bad) == (0, 6, [])
    assert report.bad_by_kind == {"bad_before": 1}
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert reads == []
    with Collection.open(tmp_path / "pets") as collection:
        collection.delete(["a/001"])
    assert embed_corpus(model, path, tmp_path / "pets", unit_size=3).added == 0  # stays deleted
    report = embed_corpus(model, path, tmp_path / "pets", unit_size=3, overwrite=True)
    assert (report.added, report.num_bad, reads) == (6, 1, list(range(7)))


def test_a_shard_that_grew_is_looked_at_again_and_what_is_there_stays(
    model: Model, tmp_path: Path
) -> None:
    embed_corpus(model, shard(tmp_path / "a.tar", 3), tmp_path / "pets")
    with Collection.open(tmp_path / "pets") as collection:
        before = collection.rowids_of(["a/000", "a/001", "a/002"])
    report = embed_corpus(model, shard(tmp_path / "a.tar", 5), tmp_path / "pets")
    assert (report.added, report.skipped) == (2, 3)
    with Collection.open(tmp_path / "pets") as collection:
        assert collection.rowids_of(before) == before


def test_a_changed_picture_replaces_what_is_there_only_on_demand(
    model: Model, source: Path, tmp_path: Path
) -> None:
    embed_corpus(model, source, tmp_path / "pets")
    Image.new("RGB", (9, 9), "red").save(source.parent / "3.png")
    vector = model.embed_images([source.parent / "3.png"])[0]

    def stored() -> np.ndarray:
        with Collection.open(tmp_path / "pets") as collection:
            (rowid,) = collection.rowids_of(["rows/000000003"]).values()
            return collection.vectors_of(np.array([rowid]))[0]

    assert embed_corpus(model, source, tmp_path / "pets").added == 0
    assert not np.allclose(stored(), vector, atol=1e-3)
    embed_corpus(model, source, tmp_path / "pets", overwrite=True)
    assert np.allclose(stored(), vector, atol=1e-5)


def test_batches_end_where_their_unit_ends(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    embed = module.embed_pixels

    def counted(model: Model, pixels: Sequence[np.ndarray]) -> np.ndarray:
        sizes.append(len(pixels))
        return embed(model, pixels)

    monkeypatch.setattr(module, "embed_pixels", counted)
    path = shard(tmp_path / "a.tar", 13)
    embed_corpus(model, path, tmp_path / "pets", batch_size=4, unit_size=6)
    assert sizes == [4, 2, 4, 2, 1]


def test_decoding_goes_on_while_the_model_works_but_not_far_ahead(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    arrived = threading.Condition()
    taken = 0

    def records(source: object, options: object) -> Iterator[Record]:
        nonlocal taken
        for i in range(60):
            with arrived:
                taken += 1
                arrived.notify_all()
            yield Record(str(i), "here", tmp_path / "a.png", ("words",))

    ahead: list[int] = []
    embed = module.embed_pixels

    def slow(model: Model, pixels: Sequence[np.ndarray]) -> np.ndarray:
        done = 2 * len(ahead)
        with arrived:
            arrived.wait_for(lambda: taken >= min(60, done + 8), timeout=60)
            ahead.append(taken - done)
        return embed(model, pixels)

    monkeypatch.setattr(units, "read_source", records)
    monkeypatch.setattr(module, "embed_pixels", slow)
    embed_corpus(model, tmp_path, tmp_path / "pets", batch_size=2, unit_size=2)
    assert len(ahead) == 30
    assert all(count >= 8 for count in ahead[:-4])  # the others end with the source
    assert max(ahead) <= 12


def in_memory(records: Sequence[tuple[str, bytes]]) -> Any:
    """A stand-in for `read_source`: keys with their pictures' bytes."""
    given = [Record(key, f"row {i}", data, (key,)) for i, (key, data) in enumerate(records)]
    return lambda source, options: iter(given)


RED, BLUE = (encode(Image.new("RGB", (9, 9), colour)) for colour in ("red", "blue"))


@pytest.mark.parametrize("unit_size", [1, 2, 3, 10])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_a_key_used_twice_the_first_counts_and_the_others_are_reported(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unit_size: int,
    overwrite: bool,
) -> None:
    source = in_memory([("a", RED), ("a", BLUE), ("b", RED), ("c", RED), ("a", BLUE)])
    monkeypatch.setattr(units, "read_source", source)
    report = embed_corpus(
        model, "here", tmp_path / "pets", batch_size=1, unit_size=unit_size, overwrite=overwrite
    )
    assert (report.added, report.skipped) == (3, 0)
    assert [(bad.key, bad.origin, bad.kind) for bad in report.bad] == [
        ("a", "row 1", "duplicate_key"),
        ("a", "row 4", "duplicate_key"),
    ]
    with Collection.open(tmp_path / "pets") as collection:
        assert collection.get(["a"])["a"].source == "row 0"


def test_a_bad_picture_does_not_stand_in_the_way_of_its_key_in_a_later_unit(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "read_source", in_memory([("a", b"none"), ("b", RED), ("a", RED)]))
    report = embed_corpus(model, "here", tmp_path / "pets", batch_size=1, unit_size=2)
    assert (report.added, report.bad_by_kind) == (2, {"bad_image": 1})
    report = embed_corpus(model, "here", tmp_path / "pets", batch_size=1, unit_size=2)
    assert (report.added, report.skipped, report.bad_by_kind) == (0, 2, {"bad_before": 1})


def test_an_item_of_another_origin_is_left_alone(
    model: Model, source: Path, tmp_path: Path
) -> None:
    with Collection.create(
        tmp_path / "pets",
        fingerprint=str(model.info.fingerprint),
        model_name="t",
        embed_dim=model.embed_dim,
    ) as collection:
        vector = np.eye(1, model.embed_dim, dtype=np.float32)
        collection.upsert([Item("rows/000000004", "mine")], vector)
        report = embed_corpus(model, source, tmp_path / "pets")
        assert (report.added, report.skipped, report.num_bad) == (16, 1, 3)
        assert collection.get(["rows/000000004"])["rows/000000004"].caption == "mine"
        assert collection.count() == 17


def test_a_sample_that_could_not_be_read_is_tried_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "a.tar", 4)
    data = path.read_bytes()
    open_shards = units.ShardRecords

    def damaged(*arguments: Any) -> units.ShardRecords:
        opened = open_shards(*arguments)
        path.write_bytes(data.replace(b"picture 2", b"picture X"))
        return opened

    monkeypatch.setattr(units, "ShardRecords", damaged)
    report = embed_corpus(model, path, tmp_path / "pets")
    assert (report.added, report.bad_by_kind) == (3, {"changed": 1})
    monkeypatch.setattr(units, "ShardRecords", open_shards)
    path.write_bytes(data)
    report = embed_corpus(model, path, tmp_path / "pets")
    assert (report.added, report.skipped, report.num_bad) == (1, 3, 0)


def test_bad_records_are_all_counted_but_not_all_held(
    model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BAD_LISTED", 2)
    report = embed_corpus(model, source, tmp_path / "pets")
    assert (len(report.bad), report.num_bad) == (2, 3)
    assert report.bad_by_kind == Counter(bad_image=2, empty_caption=1)


def test_captions_are_embedded_beside_the_pictures(
    model: Model, source: Path, tmp_path: Path
) -> None:
    embed_corpus(model, source, tmp_path / "pets")
    with Collection.open(tmp_path / "pets") as collection:
        assert len(collection.rowids("text")) == 0
    report = embed_corpus(model, source, tmp_path / "pets", with_text=True)
    assert (report.added, report.skipped) == (0, 17)  # what is there keeps what it has
    report = embed_corpus(model, source, tmp_path / "pets", with_text=True, overwrite=True)
    assert (report.added, report.texts_cut) == (17, 0)
    with Collection.open(tmp_path / "pets") as collection:
        rowids = collection.rowids("text")
        assert rowids.tolist() == collection.rowids("image").tolist()
        firsts = [item.caption.split(" | ")[0] for item in collection.items_of(rowids).values()]
        expected = model.embed_texts(firsts)
        assert np.allclose(collection.vectors_of(rowids, "text"), expected, atol=1e-5)


def test_a_caption_that_is_too_long_is_counted(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(f"image,caption\na.png,{'word ' * 30}\na.png,word\n")
    report = embed_corpus(model, tmp_path / "rows.csv", tmp_path / "pets", with_text=True)
    assert (report.added, report.texts_cut) == (2, 1)


def test_vectors_are_stored_as_wide_as_asked(model: Model, source: Path, tmp_path: Path) -> None:
    embed_corpus(model, source, tmp_path / "half", dtype="float16", unit_size=8)
    embed_corpus(model, source, tmp_path / "half", unit_size=8)  # as it is
    embed_corpus(model, source, tmp_path / "whole")
    with pytest.raises(IndexStoreError, match="stores vectors in float16, not in float32"):
        embed_corpus(model, source, tmp_path / "half", dtype="float32")
    with (
        Collection.open(tmp_path / "half") as half,
        Collection.open(tmp_path / "whole") as whole,
    ):
        assert (half.dtype.name, whole.dtype.name) == ("float16", "float32")
        vectors = half.vectors_of(half.rowids()), whole.vectors_of(whole.rowids())
        assert np.allclose(*vectors, atol=1e-3)


@pytest.mark.parametrize("name", ["batch_size", "unit_size"])
def test_sizes_below_one_are_refused(model: Model, source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(IndexStoreError, match=f"{name} 0 must be at least 1"):
        embed_corpus(model, source, tmp_path / "pets", **{name: 0})  # type: ignore[arg-type]
    assert not (tmp_path / "pets").exists()


def test_a_failing_model_ends_the_run_and_what_was_committed_stays(
    model: Model, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = module.embed_pixels
    calls = 0

    def fail(model: Model, pixels: Sequence[np.ndarray]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return embed(model, pixels)

    monkeypatch.setattr(module, "embed_pixels", fail)
    with pytest.raises(MemoryError):
        embed_corpus(model, source, tmp_path / "pets", batch_size=2, unit_size=2)
    with Collection.open(tmp_path / "pets") as collection:
        assert collection.count() <= 4
    assert embed_corpus(model, source, tmp_path / "pets", unit_size=2).added >= 13


def test_an_item_that_cannot_be_stored_is_reported(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(f"sku,image,caption\na,a.png,x\n{'b' * 600},a.png,x\n")
    options = SourceOptions(id_column="sku")
    report = embed_corpus(model, tmp_path / "rows.csv", tmp_path / "pets", options=options)
    assert report.added == 1
    assert [(bad.key, bad.kind) for bad in report.bad] == [("b" * 600, "bad_item")]


def test_another_models_collection_is_left_alone(
    model: Model, source: Path, tmp_path: Path
) -> None:
    other = {"fingerprint": "b" * 64, "model_name": "other", "embed_dim": 16}
    Collection.create(tmp_path / "pets", **other).close()
    with pytest.raises(IndexStoreError, match=f"{'b' * 12}.*{str(model.info.fingerprint)[:12]}"):
        embed_corpus(model, source, tmp_path / "pets")


def test_a_source_that_is_not_there_makes_no_collection(model: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        embed_corpus(model, tmp_path / "none.csv", tmp_path / "pets")
    assert not (tmp_path / "pets").exists()


def test_a_model_that_was_never_saved_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="save it"):
        embed_corpus(create(tiny_architecture()), source, tmp_path / "pets")
    assert not (tmp_path / "pets").exists()


def test_pictures_behind_urls_are_embedded_and_failures_reported(
    model: Model, tmp_path: Path
) -> None:
    from test_clipserve_sources_fetch import Server

    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        rows = [f"{running.url(path).address},words" for path in ("/ok.jpg", "/no.jpg")]
        (tmp_path / "t.csv").write_text("\n".join(["url,caption", *rows]))
        report = embed_corpus(model, str(tmp_path / "t.csv"), tmp_path / "pets")
    finally:
        running.stop.set()
        running.shutdown()
        running.server_close()
        thread.join()
    assert report.added == 1
    assert [(bad.key, bad.kind) for bad in report.bad] == [("t/000000001", "fetch_failed")]
    with Collection.open(tmp_path / "pets") as collection:
        assert collection.units() == {}  # so that the next run tries again
