import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_architecture
from PIL import Image

import clipserve
from clipserve.checkpoint import save
from clipserve.errors import DataError, IndexStoreError
from clipserve.images import open_image
from clipserve.model import Model, create
from clipserve.sources import Record, SourceOptions
from index.collection import Collection
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
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_corpus(model, source, tmp_path / "pets", batch_size=4, progress=interrupt)
    report = embed_corpus(model, source, tmp_path / "pets", batch_size=4)
    assert (report.added, report.skipped) == (10, 7)
    embed_corpus(model, source, tmp_path / "whole")
    with Collection.open(tmp_path / "pets") as one, Collection.open(tmp_path / "whole") as two:
        assert one.scan() == two.scan()
        assert np.allclose(one.vectors_of(one.rowids()), two.vectors_of(two.rowids()), atol=1e-6)


KILLED = """
import os, signal, sys
from pathlib import Path
import clipserve
from index.embed_corpus import embed_corpus

def progress(done, total):
    if done >= 12:
        os.kill(os.getpid(), signal.SIGKILL)

model = clipserve.load(sys.argv[1], device="cpu", dtype="fp32")
embed_corpus(model, Path(sys.argv[2]), Path(sys.argv[3]), batch_size=4, progress=progress)
"""


def test_a_killed_run_goes_on_where_it_stopped(
    model: Model, model_path: Path, source: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(model_path), str(source), str(tmp_path / "pets")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    report = embed_corpus(model, source, tmp_path / "pets", batch_size=4)
    assert (report.added, report.skipped) == (7, 10)


def test_a_key_used_twice_is_reported(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index import embed_corpus as module

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    record = Record("a", "here", tmp_path / "a.png", ("twice",))
    monkeypatch.setattr(module, "read_source", lambda source, options: iter([record, record]))
    report = embed_corpus(model, tmp_path, tmp_path / "pets")
    assert report.added == 1
    assert [(bad.key, bad.kind) for bad in report.bad] == [("a", "duplicate_key")]


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
