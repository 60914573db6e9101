"""Files of others: what is taken from them, and what is refused."""

from pathlib import Path
from typing import Any

import faiss as untyped_faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transferred import E, Make, fill, maker, unit_vectors, write_npy

from clipserve.errors import IndexStoreError
from index.build import build
from index.collection import Item
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


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return maker(tmp_path)


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


def test_an_import_replaces_what_is_there(make: Make, tmp_path: Path) -> None:
    old, new = fill(make("old")), make("new")
    export_npy(old, tmp_path / "out")
    new.upsert([Item("id 3", "before"), Item("mine")], unit_vectors(2))
    import_npy(tmp_path / "out", new)
    assert new.count() == 11
    assert new.get(["id 3"])["id 3"].caption == "caption 3"


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
