import errno
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipserve.errors import IndexStoreError
from index import transfer
from index.build import build
from index.collection import Collection, Item
from index.npy_parts import open_npy
from index.transfer import (
    export_faiss,
    export_npy,
    export_parquet,
    import_faiss,
    import_npy,
    import_parquet,
)

faiss: Any = untyped_faiss
E = 8
Make = Callable[..., Collection]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(name, dtype) -> a new collection."""

    def create(
        name: str = "new", dtype: str = "float32", fingerprint: str = "a" * 64
    ) -> Collection:
        return Collection.create(
            tmp_path / name, fingerprint=fingerprint, model_name="m", embed_dim=E, dtype=dtype
        )

    return create


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, E))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def items(count: int) -> list[Item]:
    return [
        Item(f"id {i}", f"caption {i}", f"row {i}", {"n": i, "size": {"width": i / 2}, "tags": [i]})
        for i in range(count)
    ]


def fill(collection: Collection, count: int = 10, with_text: bool = False) -> Collection:
    text = unit_vectors(count, 1) if with_text else None
    collection.upsert(items(count), unit_vectors(count), text_vectors=text)
    return collection


def contents(collection: Collection) -> dict[str, Any]:
    """Everything by id, vectors to the last bit."""
    found: dict[str, Any] = {}
    for field in ("image", "text"):
        rowids = collection.rowids(field)
        vectors = collection.vectors_of(rowids, field)
        known = collection.items_of(rowids)
        for rowid, vector in zip(rowids.tolist(), vectors, strict=True):
            found.setdefault(known[rowid].id, [known[rowid]]).append((field, vector.tobytes()))
    return found


def write_npy(folder: Path, number: str, rows: int, **columns: list[Any]) -> None:
    """A part as clip-retrieval writes it."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    vectors = unit_vectors(rows, int(number)).astype(np.float16)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors)
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number}.parquet")


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


def test_files_of_clip_retrieval_are_imported_part_by_part_in_the_order_of_their_numbers(
    make: Make, tmp_path: Path
) -> None:
    for part in ("9", "10"):
        write_npy(
            tmp_path / "in",
            part,
            2,
            image_path=[f"{part}/a", f"{part}/b"],
            caption=["words", None],
            url=["http://x", "http://y"],
            width=[1.5, float("nan")],
        )
    collection = make()
    assert import_npy(tmp_path / "in", collection) == 4
    assert collection.get(["10/b"])["10/b"] == Item("10/b", "", "10/b", {"url": "http://y"})
    assert collection.get(["9/a"])["9/a"].metadata == {"url": "http://x", "width": 1.5}
    for number in (9, 10):
        (row,) = collection.rowids_of([f"{number}/b"]).values()
        stored = collection.vectors_of(np.array([row]))[0]
        assert np.allclose(stored, unit_vectors(2, number)[1], atol=1e-3)


def test_files_that_do_not_belong_together_are_named_and_nothing_is_imported(
    make: Make, tmp_path: Path
) -> None:
    collection, folder = make(), tmp_path / "in"
    for number in ("0", "1", "2"):
        write_npy(folder, number, 3, image_path=[f"{number}{i}" for i in range(3)])
    vectors = folder / "img_emb" / "img_emb_1.npy"
    np.save(vectors, unit_vectors(2))
    with pytest.raises(IndexStoreError, match=r"img_emb_1.npy has 2 rows and .*metadata_1.* 3:"):
        import_npy(folder, collection)
    vectors.unlink()
    with pytest.raises(
        IndexStoreError, match=r"metadata_1.parquet has no counterpart in .*img_emb"
    ):
        import_npy(folder, collection)
    np.save(vectors, unit_vectors(3))
    (folder / "metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(IndexStoreError, match=r"img_emb_2.npy has no counterpart in .*metadata"):
        import_npy(folder, collection)
    assert collection.count() == 0


def test_parts_that_are_missing_altogether_are_warned_of(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in ("0", "3"):
        write_npy(tmp_path / "in", number, 1, image_path=[number])
    assert import_npy(tmp_path / "in", make()) == 2
    assert "parts are missing between 0 and 3" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole .npy file"),
        (b"no numbers", "no whole .npy file"),
        (unit_vectors(3), None),
        (unit_vectors(3)[:, 1:], r"is of shape \(3, 7\); collection 'new' takes \(N, 8\)"),
        (unit_vectors(3)[0], r"is of shape \(8,\)"),
        (np.ones((3, E), int), "floating point"),
        (np.array([[None] * E] * 3), "no whole .npy file"),
        ("cut", "no whole .npy file"),
    ],
    ids=["empty", "text", "good", "narrow", "flat", "integers", "objects", "cut"],
)
def test_vectors_that_are_none_are_refused(
    make: Make, tmp_path: Path, content: Any, message: str | None
) -> None:
    write_npy(tmp_path / "in", "0", 3, image_path=["a", "b", "c"])
    file = tmp_path / "in" / "img_emb" / "img_emb_0.npy"
    if isinstance(content, np.ndarray):
        np.save(file, content, allow_pickle=True)
    else:
        file.write_bytes(file.read_bytes()[:-1] if content == "cut" else content)
    if message is None:
        assert import_npy(tmp_path / "in", make()) == 3
        return
    with pytest.raises(IndexStoreError, match=message):
        import_npy(tmp_path / "in", make())


def npy_with_header(text: str) -> bytes:
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8",  # TokenError
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**99,)}",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**40}, 8)}}",  # OverflowError
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, -8)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 8)}",
        "{[]: 1}",  # TypeError
        "(" * 5000,
    ],
)
def test_a_hostile_header_of_an_npy_file_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "bad.npy").write_bytes(npy_with_header(header))
    with pytest.raises(IndexStoreError, match=r"bad.npy is no .*\.npy file") as caught:
        open_npy(tmp_path / "bad.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["id", "image_vector", "size"])
def test_a_column_name_that_comes_twice_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    columns = {"id": ["a"], "image_vector": unit_vectors(1).tolist(), "size": [1]}
    arrays = [pa.array(column) for column in columns.values()]
    names = [*columns, name]
    table = pa.Table.from_arrays([*arrays, pa.array(columns[name])], names)
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(IndexStoreError, match=f"in.parquet has 2 columns '{name}'; give each"):
        import_parquet(tmp_path / "in.parquet", make())


def test_a_name_that_comes_twice_inside_a_column_is_refused(make: Make, tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"])
    table = pa.table({"id": ["a"], "image_vector": unit_vectors(1).tolist(), "size": twice})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(IndexStoreError, match="in.parquet cannot be read"):
        import_parquet(tmp_path / "in.parquet", make())


def test_an_id_that_comes_twice_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path
) -> None:
    collection = make()
    write_npy(tmp_path / "in", "0", 2, image_path=["a", "b"], key=[1, 2])
    write_npy(tmp_path / "in", "1", 2, image_path=["c", "a"], key=[3, 4])
    with pytest.raises(IndexStoreError, match=r"id 'a' is in .*metadata_0.* and again in .*_1"):
        import_npy(tmp_path / "in", collection)
    assert collection.count() == 0
    assert import_npy(tmp_path / "in", collection, id_column="key") == 4
    assert collection.contains(["1", "4", "a"]) == {"1", "4"}


@pytest.mark.parametrize("bad", [0.0, 2.0, float("nan"), float("inf")])
def test_a_vector_that_is_not_of_length_one_is_refused_or_scaled_on_demand(
    make: Make, tmp_path: Path, bad: float
) -> None:
    collection = make()
    write_npy(tmp_path / "in", "0", 2, image_path=["a", "b"])
    vectors = unit_vectors(2)
    np.save(tmp_path / "in" / "img_emb" / "img_emb_0.npy", vectors * np.array([[1], [bad]]))
    with pytest.raises(IndexStoreError, match="image vector of item 'b' has length .*normalized"):
        import_npy(tmp_path / "in", collection)
    if bad == 2:
        import_npy(tmp_path / "in", collection, normalize=True)
        assert np.allclose(collection.vectors_of(collection.rowids()), vectors)
    else:
        with pytest.raises(IndexStoreError, match="image vector of item 'b' has length"):
            import_npy(tmp_path / "in", collection, normalize=True)
        assert collection.count() == 0


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


def test_parquet_files_of_others_are_imported(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    vectors = unit_vectors(4).astype(np.float64)
    for part in range(2):
        rows = {
            "sku": [10 + part, 20 + part],
            "emb": vectors[2 * part : 2 * part + 2].tolist(),
            "colour": ["red", None],
        }
        pq.write_table(pa.table(rows), folder / f"{part}.parquet")
    collection = make()
    columns = {"image": "emb"}
    assert import_parquet(folder, collection, id_column="sku", vector_columns=columns) == 4
    assert collection.get(["10", "21"]) == {
        "10": Item("10", metadata={"colour": "red"}),
        "21": Item("21"),
    }
    assert np.allclose(collection.vectors_of(collection.rowids()), vectors, atol=1e-6)
    with pytest.raises(IndexStoreError, match=r"no column of ids \(name\); it has: sku, emb"):
        import_parquet(folder, collection, id_column="name", vector_columns=columns)
    with pytest.raises(IndexStoreError, match=r"no column of ids \(id, image_path, key\)"):
        import_parquet(folder, collection)
    with pytest.raises(IndexStoreError, match=r"no column of vectors \(image_vector, text_vector"):
        import_parquet(folder, collection, id_column="sku")
    with pytest.raises(IndexStoreError, match="holds no .parquet"):
        import_parquet(tmp_path, collection)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0] * 7, [1.0] * 9], "lists of 8 numbers"),
        ([[1.0] + [None] * 7, [1.0] + [0.0] * 7], "lists of 8 numbers"),
        ([["1"] * 8] * 2, "lists of 8 numbers"),
        ([1.0, 2.0], "lists of 8 numbers"),
        ([None, [1.0] + [0.0] * 7], "item 'a' has no vector"),
    ],
)
def test_a_column_that_holds_no_vectors_is_refused(
    make: Make, tmp_path: Path, values: list[Any], message: str
) -> None:
    table = pa.table({"id": ["a", "b"], "image_vector": values})
    pq.write_table(table, tmp_path / "in.parquet")
    collection = make()
    with pytest.raises(IndexStoreError, match=message):
        import_parquet(tmp_path / "in.parquet", collection)
    assert collection.count() == 0


@pytest.mark.parametrize("id", [None, "", "x" * 600])
def test_an_id_that_is_none_is_refused(make: Make, tmp_path: Path, id: str | None) -> None:
    table = pa.table({"id": ["a", id], "image_vector": unit_vectors(2).tolist()})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(IndexStoreError, match=r"in.parquet, column 'id': id .* is not allowed"):
        import_parquet(tmp_path / "in.parquet", make())


@pytest.mark.parametrize("metadata", ["{", "[1]", "7"])
def test_metadata_that_is_no_object_is_refused(make: Make, tmp_path: Path, metadata: str) -> None:
    rows = {"id": ["a"], "metadata": [metadata], "image_vector": unit_vectors(1).tolist()}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    with pytest.raises(IndexStoreError, match="metadata of item 'a'"):
        import_parquet(tmp_path / "in.parquet", make())


def test_what_is_no_parquet_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").write_bytes(b"no table")
    with pytest.raises(IndexStoreError, match="in.parquet cannot be read as Parquet"):
        import_parquet(tmp_path / "in.parquet", make())
    export_parquet(fill(make("old"), 500), tmp_path / "cut.parquet")
    data = bytearray((tmp_path / "cut.parquet").read_bytes())
    data[20:400] = bytes(380)
    (tmp_path / "cut.parquet").write_bytes(data)
    with pytest.raises(IndexStoreError, match="cut.parquet cannot be read as Parquet"):
        import_parquet(tmp_path / "cut.parquet", make("other"))


def test_vectors_of_another_model_are_refused(make: Make, tmp_path: Path) -> None:
    old = fill(make("old"))
    build(old)
    export_npy(old, tmp_path / "npy")
    export_parquet(old, tmp_path / "o.parquet")
    export_faiss(old, tmp_path / "faiss")
    other = make("other", fingerprint="b" * 64)
    message = f"{'a' * 12}.*{'b' * 12}"
    with pytest.raises(IndexStoreError, match=message):
        import_npy(tmp_path / "npy", other)
    with pytest.raises(IndexStoreError, match=message):
        import_parquet(tmp_path / "o.parquet", other)
    with pytest.raises(IndexStoreError, match=message):
        import_faiss(tmp_path / "faiss" / "index.faiss", tmp_path / "faiss" / "ids.parquet", other)


def test_an_export_goes_nowhere_where_something_is(make: Make, tmp_path: Path) -> None:
    collection = fill(make())
    build(collection)
    (tmp_path / "out").mkdir()
    for export in (export_npy, export_parquet, export_faiss):
        with pytest.raises(IndexStoreError, match="out is there already"):
            export(collection, tmp_path / "out")


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


def test_an_import_replaces_what_is_there(make: Make, tmp_path: Path) -> None:
    old, new = fill(make("old")), make("new")
    export_npy(old, tmp_path / "out")
    new.upsert([Item("id 3", "before"), Item("mine")], unit_vectors(2))
    import_npy(tmp_path / "out", new)
    assert new.count() == 11
    assert new.get(["id 3"])["id 3"].caption == "caption 3"


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


def ids_file(path: Path, count: int) -> Path:
    pq.write_table(pa.table({"id": [f"id {i}" for i in range(count)]}), path)
    return path


def write_faiss(path: Path, index: Any) -> Path:
    faiss.write_index(index, str(path))
    return path


def trained(factory: str, count: int = 300) -> Any:
    index = faiss.index_factory(E, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(unit_vectors(count))
    return index


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8,Flat"])
def test_faiss_indexes_of_others_are_imported_into_either_field(
    make: Make, tmp_path: Path, factory: str
) -> None:
    index = trained(factory)
    index.add(unit_vectors(300))
    ids = ids_file(tmp_path / "ids.parquet", 300)
    collection = make()
    import_faiss(write_faiss(tmp_path / "i", index), ids, collection, field="text")
    assert len(collection.rowids()) == 0
    rows = np.array(list(collection.rowids_of([f"id {i}" for i in range(300)]).values()))
    names = collection.ids_of(rows)
    order = np.array([int(names[row].split()[1]) for row in rows.tolist()])
    assert np.array_equal(collection.vectors_of(rows, "text"), unit_vectors(300)[order])
    import_faiss(tmp_path / "i", ids, collection)
    assert len(collection.rowids("text")) == len(collection.rowids()) == 300


def test_rows_of_the_ids_are_labels_of_the_index(make: Make, tmp_path: Path) -> None:
    labels = np.random.default_rng(3).permutation(50)
    index = faiss.IndexIDMap(faiss.IndexFlatIP(E))
    index.add_with_ids(unit_vectors(50), labels)
    collection = make()
    ids = ids_file(tmp_path / "ids.parquet", 50)
    import_faiss(write_faiss(tmp_path / "i", index), ids, collection)
    for place, label in enumerate(labels.tolist()):
        (row,) = collection.rowids_of([f"id {label}"]).values()
        assert np.array_equal(collection.vectors_of(np.array([row]))[0], unit_vectors(50)[place])


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IVF4,Flat"])
def test_labels_that_are_no_rows_are_refused(make: Make, tmp_path: Path, factory: str) -> None:
    index = trained(factory)
    index.add_with_ids(unit_vectors(3), np.array([0, 1, 7]))
    with pytest.raises(IndexStoreError, match="labels are not 0..2, each once"):
        import_faiss(
            write_faiss(tmp_path / "i", index), ids_file(tmp_path / "ids.parquet", 3), make()
        )


@pytest.mark.parametrize("factory", ["SQ8", "IVF4,SQ8", "PQ4x4", "OPQ4,PQ4x4"])
def test_an_index_that_keeps_no_exact_vectors_is_imported_only_on_demand(
    make: Make, tmp_path: Path, factory: str
) -> None:
    index = trained(factory)
    index.add(unit_vectors(300))
    files = write_faiss(tmp_path / "i", index), ids_file(tmp_path / "ids.parquet", 300)
    collection = make()
    with pytest.raises(IndexStoreError, match="may not give its vectors back"):
        import_faiss(*files, collection)
    assert import_faiss(*files, collection, lossy=True) == 300
    rows = collection.rowids_of(f"id {i}" for i in range(300))
    stored = collection.vectors_of(np.array([rows[f"id {i}"] for i in range(300)]))
    assert (stored * unit_vectors(300)).sum(axis=1).mean() > 0.8


def test_faiss_files_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(E)
    index.add(unit_vectors(3))
    good, ids = write_faiss(tmp_path / "i", index), ids_file(tmp_path / "ids.parquet", 3)
    with pytest.raises(IndexStoreError, match=r"i has 3 rows and .*four.parquet 4:"):
        import_faiss(good, ids_file(tmp_path / "four.parquet", 4), make("a"))
    with pytest.raises(IndexStoreError, match=r"is of shape \(0, 7\)"):
        import_faiss(write_faiss(tmp_path / "j", faiss.IndexFlatIP(7)), ids, make("b"))
    with pytest.raises(IndexStoreError, match="field 'sound'"):
        import_faiss(good, ids, make("c"), field="sound")
    for content in (b"", b"none", good.read_bytes()[:-5]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(IndexStoreError, match="bad cannot be read as a FAISS index"):
            import_faiss(tmp_path / "bad", ids, make(f"d{len(content)}"))
    with pytest.raises(IndexStoreError, match="none cannot be read as a FAISS index"):
        import_faiss(tmp_path / "none", ids, make("e"))
