"""What is exported, and that it comes back as it was."""

import errno
import io
import json
import re
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from transferred import E, Make, contents, fill, maker, unit_vectors

from clipserve.errors import IndexStoreError
from index import transfer
from index.build import build
from index.collection import Collection, Item
from index.transfer import (
    export_faiss,
    export_npy,
    export_parquet,
    import_faiss,
    import_npy,
    import_parquet,
)

faiss: Any = untyped_faiss


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return maker(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("with_text", [False, True])
def test_npy_files_bring_back_what_was_exported(
    make: Make, tmp_path: Path, dtype: str, with_text: bool
) -> None:
    old, new = fill(make("old", dtype), with_text=with_text), make("new", dtype)
    assert export_npy(old, tmp_path / "out", rows_per_part=4) == 10
    assert import_npy(tmp_path / "out", new) == 10
    assert contents(new) == contents(old)


def test_npy_files_lie_as_clip_retrieval_lays_them(make: Make, tmp_path: Path) -> None:
    old = fill(make(), with_text=True)
    export_npy(old, tmp_path / "out", dtype="float16", rows_per_part=6)
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*"))
    assert files == [
        "img_emb/img_emb_0000.npy",
        "img_emb/img_emb_0001.npy",
        "metadata/metadata_0000.parquet",
        "metadata/metadata_0001.parquet",
        "text_emb/text_emb_0000.npy",
        "text_emb/text_emb_0001.npy",
    ]
    second = np.load(tmp_path / "out" / "img_emb" / "img_emb_0001.npy")
    assert (second.dtype, second.shape) == (np.float16, (4, E))
    assert np.allclose(second, unit_vectors(10)[6:], atol=1e-3)
    # What embedding-reader looks for in the first line.
    line = (tmp_path / "out" / "img_emb" / "img_emb_0001.npy").read_bytes().split(b"\n")[0]
    assert re.search(rb"'shape': \(4, 8\)", line)
    assert re.search(rb"'descr': '<f2'", line)
    rows = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0001.parquet")
    assert rows.to_pylist()[0] == {
        "id": "id 6",
        "image_path": "id 6",
        "caption": "caption 6",
        "source": "row 6",
        "metadata": json.dumps({"n": 6, "size": {"width": 3.0}, "tags": [6]}),
        "n": 6,
        "size.width": 3.0,
        "tags": "[6]",
    }


def test_metadata_columns_have_the_type_that_holds_all_their_values(
    make: Make, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"flag": True, "count": 1, "price": 1, "mixed": 1, "large": 2**63, "id": "other", "s": "x"},
        {"flag": False, "price": 0.5, "mixed": "b", "large": 1, "nothing": None, "empty": {}},
    ]
    collection = make()
    given = [Item(str(i), metadata=fields) for i, fields in enumerate(rows)]
    collection.upsert(given, unit_vectors(2))
    export_npy(collection, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0000.parquet")
    own = ["id", "caption", "source", "metadata", "image_path"]
    assert table.drop_columns(own).to_pydict() == {
        "count": [1, None],
        "flag": [True, False],
        "large": [str(2**63), "1"],
        "mixed": ["1", "b"],
        "price": [1.0, 0.5],
        "s": ["x", None],
    }
    assert table["id"].to_pylist() == ["0", "1"]
    again = make("again")
    import_npy(tmp_path / "out", again)
    assert again.get(["0", "1"]) == {item.id: item for item in given}


def test_npy_files_take_no_items_without_the_vector(make: Make, tmp_path: Path) -> None:
    collection = fill(make())
    collection.upsert([Item("text only")], None, text_vectors=unit_vectors(1))
    with pytest.raises(IndexStoreError, match="1 of 11 items have no image vector"):
        export_npy(collection, tmp_path / "out")
    with pytest.raises(IndexStoreError, match="10 of 11 items have no text vector"):
        export_npy(collection, tmp_path / "out", fields=["text"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(IndexStoreError, match="field 'sound'"):
        export_npy(collection, tmp_path / "out", fields=["sound"])


def test_an_empty_collection_is_exported_and_imported(make: Make, tmp_path: Path) -> None:
    old, new = make("old"), make("new")
    assert export_npy(old, tmp_path / "out") == import_npy(tmp_path / "out", new) == 0
    assert export_parquet(old, tmp_path / "o.parquet") == 0
    assert import_parquet(tmp_path / "o.parquet", new) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_brings_back_items_with_either_vector_or_both(
    make: Make, tmp_path: Path, dtype: str
) -> None:
    old, new = fill(make("old", dtype)), make("new", dtype)
    old.upsert([Item("text"), Item("more")], None, text_vectors=unit_vectors(2, 3))
    old.upsert([Item("both")], unit_vectors(1, 4), text_vectors=unit_vectors(1, 5))
    seen: list[tuple[int, int]] = []
    assert export_parquet(old, tmp_path / "o.parquet", progress=lambda *n: seen.append(n)) == 13
    assert import_parquet(tmp_path / "o.parquet", new, progress=lambda *n: seen.append(n)) == 13
    assert seen == [(13, 13), (13, 13)]
    assert contents(new) == contents(old)
    assert len(contents(new)["both"]) == 3


def test_equal_collections_are_exported_byte_for_byte_alike(make: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        collection = fill(make(name), with_text=True)
        export_parquet(collection, tmp_path / f"{name}.parquet")
        export_npy(collection, tmp_path / f"{name}.npy")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    for file in (tmp_path / "one.npy").glob("*/*"):
        other = tmp_path / "two.npy" / file.relative_to(tmp_path / "one.npy")
        assert file.read_bytes() == other.read_bytes()


def test_an_export_goes_nowhere_where_something_is(make: Make, tmp_path: Path) -> None:
    collection = fill(make())
    build(collection)
    (tmp_path / "out").mkdir()
    for export in (export_npy, export_parquet, export_faiss):
        with pytest.raises(IndexStoreError, match="out is there already"):
            export(collection, tmp_path / "out")


@pytest.mark.parametrize("export", [export_npy, export_parquet])
def test_an_export_takes_no_place_that_was_taken_meanwhile(
    make: Make, tmp_path: Path, export: Any
) -> None:
    out = tmp_path / "out"

    def taken_meanwhile(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("x")

    with pytest.raises(IndexStoreError, match="out is there already"):
        export(fill(make()), out, progress=taken_meanwhile)
    assert [file.name for file in out.iterdir()] == ["theirs"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "out"]


@pytest.mark.parametrize("export", [export_npy, export_parquet, export_faiss])
def test_a_full_disk_leaves_no_half_of_an_export(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any
) -> None:
    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(self: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        return Full(io.FileIO(self, mode)) if "w" in mode else opened(self, mode)

    opened = Path.open

    collection = fill(make())
    build(collection)
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(IndexStoreError, match=r"out cannot be written.*No space left"):
            export(collection, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
    export(collection, tmp_path / "out")


def test_an_export_is_the_collection_at_one_moment(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BLOCK_ROWS", 3)
    collection = fill(make())
    before = contents(collection)
    writer = Collection.open(collection.path)

    def meddle(done: int, total: int) -> None:
        writer.delete([f"id {done}", "id 9"])
        writer.upsert([Item(f"new {done}")], unit_vectors(1))

    export_parquet(collection, tmp_path / "o.parquet", progress=meddle)
    export_npy(collection, tmp_path / "out", rows_per_part=3, progress=meddle)
    again = make("again")
    import_parquet(tmp_path / "o.parquet", again)
    assert contents(again) == before
    writer.close()


@pytest.mark.parametrize("name", ["dtype", "rows_per_part"])
def test_settings_out_of_range_are_refused(make: Make, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {name: "float64" if name == "dtype" else 0}
    with pytest.raises(IndexStoreError, match=f"{name} {settings[name]}"):
        export_npy(make(), tmp_path / "out", **settings)


@pytest.mark.parametrize("kind", ["exact", "IVF4,Flat"])
def test_a_built_index_becomes_faiss_files_and_comes_back(
    make: Make, tmp_path: Path, kind: str
) -> None:
    old, new = fill(make("old"), 200), make("new")
    with pytest.raises(IndexStoreError, match="no index is built.*index build"):
        export_faiss(old, tmp_path / "out")
    build(old, kind=kind)
    assert export_faiss(old, tmp_path / "out") == 200
    files = (tmp_path / "out" / "index.faiss", tmp_path / "out" / "ids.parquet")
    index = faiss.read_index(str(files[0]))
    scores, labels = index.search(unit_vectors(200)[:1], 1)
    assert (round(float(scores[0, 0]), 4), labels[0, 0]) == (1, 0)
    assert import_faiss(*files, new) == 200
    assert contents(new) == contents(old)
    old.delete(["id 7"])
    with pytest.raises(IndexStoreError, match="items changed since it was built"):
        export_faiss(old, tmp_path / "other")
