"""The commands on collections: filled once by a two-layer model, then asked in this process."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, make_picture

import clipserve
from clipserve.cli import main

COUNT = 12


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def ids(self) -> list[str]:
        return [hit["id"] for hit in self.json]


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def run_it(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["clipserve", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipserve.cli._check_ownership", lambda: None)  # looks at all packages
    return run_it


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with COUNT pictures and a table, `n` and `colour` beside each caption."""
    folder = tmp_path_factory.mktemp("source")
    rows = []
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
        colour = "red" if i % 3 == 0 else "blue"
        row = {"id": f"p{i}", "image": f"{i}.png", "caption": f"number {i}", "n": i}
        rows.append(row | {"colour": colour})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def filled(model_dir: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of the pictures and their captions; tests must not write into it."""
    from clipserve.sources import SourceOptions
    from index.embed_corpus import embed_corpus

    path = tmp_path_factory.mktemp("collections") / "items"
    options = SourceOptions(id_column="id")
    embed_corpus(
        clipserve.load(model_dir), source / "t.jsonl", path, options=options, with_text=True
    )
    return path


@pytest.fixture
def items(filled: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(filled, tmp_path / "items"))


@pytest.fixture(scope="module")
def vectors(filled: Path) -> dict[str, np.ndarray]:
    """Id -> image vector (E,)."""
    from index.collection import Collection

    with Collection.open(filled, read_only=True) as opened:
        rowids = opened.rowids()
        ids = opened.ids_of(rowids)
        pairs = zip(rowids.tolist(), opened.vectors_of(rowids), strict=True)
        return {ids[rowid]: vector for rowid, vector in pairs}


def nearest(vectors: dict[str, np.ndarray], query: np.ndarray, k: int) -> list[str]:
    return sorted(vectors, key=lambda id: -float(vectors[id] @ query))[:k]


def test_the_parts_of_a_search_are_added_up_by_their_weights(
    run: Run, filled: Path, model_dir: Path, source: Path, vectors: dict[str, np.ndarray]
) -> None:
    model = clipserve.load(model_dir)
    red, blue, dark = model.embed_texts(["red", "blue", "dark"])
    (picture,) = model.embed_images([source / "4.png"])
    search = ("search", filled, "--model", model_dir, "-k", 4, "--json")
    assert run(*search, "red").ids() == nearest(vectors, red, 4)
    assert run(*search, "red", "blue").ids() == nearest(vectors, red + blue, 4)
    assert run(*search, "--image", source / "4.png").ids()[0] == "p4"
    mixed = run(*search, "red", "--image", source / "4.png", "--text-weight", 0.4)
    assert mixed.ids() == nearest(vectors, picture + 0.4 * red, 4)
    away = run(*search, "red", "--minus-text", "dark", "--minus-weight", 0.5)
    assert away.ids() == nearest(vectors, red - 0.5 * dark, 4)


def test_more_like_an_item_needs_no_model_and_leaves_it_out(
    run: Run, filled: Path, vectors: dict[str, np.ndarray]
) -> None:
    found = run("search", filled, "--like", "p3", "-k", 3, "--json").ids()
    assert found == nearest(vectors, vectors["p3"], 4)[1:]
    both = run("search", filled, "--like", "p3", "--like", "p5", "-k", 20, "--json").ids()
    assert set(both) == set(vectors) - {"p3", "p5"}


def test_a_search_is_narrowed_by_filter_page_score_and_likeness(
    run: Run, filled: Path, vectors: dict[str, np.ndarray]
) -> None:
    like = ("search", filled, "--like", "p0", "--json")
    order = nearest(vectors, vectors["p0"], COUNT)[1:]
    reds = [id for id in order if int(id[1:]) % 3 == 0]
    assert run(*like, "--filter", '{"colour": "red"}').ids() == reds
    late = run(*like, "--filter", '{"n": {"gte": 6}, "colour": {"ne": "red"}}').ids()
    assert late == [id for id in order if int(id[1:]) >= 6 and int(id[1:]) % 3]
    assert run(*like, "-k", 3, "--offset", 2).ids() == order[2:5]
    scores = [hit["score"] for hit in run(*like, "-k", COUNT).json]
    least = (scores[3] + scores[4]) / 2
    assert run(*like, "--min-score", least).ids() == order[:4]
    kept: list[str] = []
    limit = 0.9
    for id in order:
        if all(float(vectors[id] @ vectors[other]) < limit for other in kept):
            kept.append(id)
    assert run(*like, "--unique", limit, "-k", 20).ids() == kept


def test_lines_of_a_file_are_searches_of_their_own(
    run: Run, filled: Path, model_dir: Path, vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "asked.txt").write_text("red\n\n blue \n")
    asked = ("search", filled, "--model", model_dir, "--queries", "asked.txt", "-k", 2)
    answers = run(*asked, "--json").json
    red, blue = clipserve.load(model_dir).embed_texts(["red", "blue"])
    assert [answer["query"] for answer in answers] == ["red", "blue"]
    for answer, query in zip(answers, (red, blue), strict=True):
        assert [hit["id"] for hit in answer["hits"]] == nearest(vectors, query, 2)
    lines = run(*asked).out.splitlines()
    assert (lines[0], lines[3], len(lines)) == ("red", "blue", 6)


def test_captions_are_searched_as_a_field_of_their_own(
    run: Run, filled: Path, model_dir: Path
) -> None:
    search = ("search", filled, "number 7", "--model", model_dir, "--field", "text", "--json")
    (first, *_) = run(*search).json
    assert first["id"] == "p7"
    assert first["score"] == pytest.approx(1.0, abs=1e-3)


def test_hits_are_ordered_again_by_matching(run: Run, source: Path, tmp_path: Path) -> None:
    from albefs import tiny_albef

    from clipserve import checkpoint
    from index.collection import Collection
    from index.rerank import rerank
    from index.search import Hit

    model = tiny_albef(tmp_path / "words")
    checkpoint.save(model, tmp_path / "albef", name="albef")
    run("embed", "albef", source / "t.jsonl", "--collection", "c", "--id-column", "id")
    search = ("search", "c", "a red house", "--model", "albef", "--dtype", "fp32", "--json")
    plain = run(*search, "-k", COUNT).json
    again = run(*search, "-k", 3, "--offset", 1, "--rerank", 8, "--rerank-score", "matching")
    assert again.err.startswith("matched at ")
    with Collection.open(tmp_path / "c") as opened:
        hits = [Hit(**hit) for hit in plain]
        done = rerank(model, ["a red house"], [hits], opened, k_test=8, score="matching")
    assert again.ids() == [hit.id for hit in done.hits[0][1:4]]
    assert all(0 < hit["matching"] < 1 for hit in again.json)
    refused = run(*search, "--rerank", 3, "--like", "p1")
    assert (refused.code, refused.out) == (2, "")
    assert "--rerank orders by how one text fits" in refused.err


def test_an_index_is_built_and_described(
    run: Run, items: Path, vectors: dict[str, np.ndarray]
) -> None:
    from index.collection import Collection, Item

    before = run("index", "info", items)
    assert f"image: {COUNT} vectors, no index; all of them are compared" in before.out
    built = run("index", "build", items, "--json").json
    assert (built["kind"], built["count"]) == ("exact", COUNT)
    assert run("index", "build", items, "--field", "text").code == 0
    facts = run("index", "info", items, "--json").json
    assert (facts["items"], facts["vectors"]) == (COUNT, "float32")
    assert facts["counts"] == {"image": COUNT, "text": COUNT}
    assert set(facts["indexes"]) == {"image", "text"}
    with Collection.open(items) as opened:
        opened.delete(["p0", "p1"])
        opened.upsert([Item("new")], vectors["p4"][None])
    shown = run("index", "info", items).out
    assert "image: 11 vectors; index exact of 12; since then 1 written, 2 deleted" in shown
    assert "text: 10 vectors; index exact of 12; since then 0 written, 2 deleted" in shown


def test_captions_of_the_collection_tune_its_index(run: Run, items: Path, model_dir: Path) -> None:
    build = ("index", "build", items, "--kind", "IVF2,SQ8", "--recall", 0.9, "--memory", 1)
    built = run(*build, "--model", model_dir, "--json").json
    assert built["kind"] == "IVF2,SQ8"
    assert "12" in built["queries"]
    assert built["tuned"]["10"]["recall"] >= 0.9
    texts = run(*build, "--model", model_dir, "--field", "text", "--json").json
    assert texts["queries"] == "12 noisy copies of stored vectors"  # captions are what is stored
    shown = run("index", "info", items).out
    assert "recall target 0.9" in shown
    header, *table = shown[shown.index("recall target") :].splitlines()[1:]
    assert header.split() == ["k", "breadth", "fetch", "recall", "ms", "a", "query"]
    assert any(line.split()[:2] == ["*", "10"] for line in table)


def test_check_names_what_is_damaged(run: Run, items: Path) -> None:
    clean = run("index", "check", items)
    assert (clean.code, clean.out) == (0, f"{COUNT} items, 0 problems\n")
    database = items / "collection.sqlite3"
    data = bytearray(database.read_bytes())
    data[-1000] ^= 4
    database.write_bytes(data)
    damaged = run("index", "check", items)
    assert damaged.code == 1
    assert "bad: " in damaged.out
    assert damaged.err == f"clipserve: {items} is damaged, " + damaged.err.split(", ", 1)[1]
    report = json.loads(run("index", "check", items, "--json", "--no-write").out)
    assert report["problems"]


def test_missing_acknowledged_writes_are_told_and_accepted(run: Run, items: Path) -> None:
    from index.collection import Collection

    old = (items / "collection.sqlite3").read_bytes()
    with Collection.open(items) as opened:
        opened.delete(["p1"])
    (items / "collection.sqlite3").write_bytes(old)
    refused = run("search", items, "--like", "p2")
    assert refused.code == 2
    assert "acknowledged" in refused.err
    assert run("index", "check", items).code == 1
    accepted = run("index", "check", items, "--accept-loss")
    assert accepted.code == 0, accepted.err
    assert "mended: " in accepted.out
    assert run("search", items, "--like", "p2").code == 0


def test_a_collection_is_compacted_and_copied(run: Run, items: Path, tmp_path: Path) -> None:
    from index.collection import Collection

    with Collection.open(items) as opened:
        opened.delete([f"p{i}" for i in range(8)])
    report = run("index", "compact", items, "--json").json
    assert 0 < report["after"] <= report["before"]
    assert " MiB before, " in run("index", "compact", items).out
    assert run("index", "snapshot", items, "copy").out == "written: copy\n"
    assert run("index", "info", "copy", "--json").json["items"] == COUNT - 8
    again = run("index", "snapshot", items, "copy")
    assert again.code == 2
    assert "copy is there already" in again.err


def test_captions_and_halves_are_embedded_on_request(
    run: Run, model_dir: Path, source: Path
) -> None:
    embed = ("embed", model_dir, source / "t.jsonl", "--collection", "c", "--id-column", "id")
    first = run(*embed, "--text", "--vectors", "float16", "--json").json
    assert (first["added"], first["bad_by_kind"], first["texts_cut"]) == (COUNT, {}, 0)
    facts = run("index", "info", "c", "--json").json
    assert (facts["vectors"], facts["counts"]) == ("float16", {"image": COUNT, "text": COUNT})
    again = run(*embed, "--text")  # its vectors are as they are there
    assert f"added 0, skipped {COUNT} there or embedded before, 0 bad" in again.out
    other = run(*embed, "--vectors", "float32")
    assert other.code == 2
    assert "stores vectors in float16" in other.err


def everything(path: Path) -> dict[str, Any]:
    """Of a collection: each item as it is, with its vectors."""
    from index.collection import FIELDS, Collection

    with Collection.open(path, read_only=True) as opened:
        found: dict[str, Any] = {}
        for field in FIELDS:
            rowids = opened.rowids(field)
            kept = opened.items_of(rowids)
            for rowid, vector in zip(
                rowids.tolist(), opened.vectors_of(rowids, field), strict=True
            ):
                item = kept[rowid]
                found.setdefault(item.id, {"item": item})[field] = vector.tobytes()
    return found


@pytest.mark.parametrize(("form", "name"), [("npy", "out"), ("parquet", "out.parquet")])
def test_what_is_exported_comes_back_as_it_was(
    run: Run, filled: Path, model_dir: Path, form: str, name: str
) -> None:
    written = run("index", "export", filled, name, "--to", form)
    assert written.out == f"written: {name}, {COUNT} items\n"
    back = ("index", "import", name, "back")
    unknown = run(*back)
    assert unknown.code == 2
    assert "--model MODEL, which made the vectors, is required" in unknown.err
    assert run(*back, "--model", model_dir, "--json").json["items"] == COUNT
    assert everything(Path("back")) == everything(filled)
    assert run(*back).out == f"imported {COUNT} items into back\n"  # replaced by themselves
    assert run("index", "info", "back", "--json").json["items"] == COUNT


def test_an_index_is_exported_and_read_back(run: Run, items: Path, model_dir: Path) -> None:
    unbuilt = run("index", "export", items, "out", "--to", "faiss")
    assert unbuilt.code == 2
    assert "no index is built" in unbuilt.err
    run("index", "build", items, "--field", "text")
    run("index", "export", items, "out", "--to", "faiss", "--field", "text")
    again = run("index", "import", "out", "back", "--model", model_dir, "--field", "text")
    assert again.code == 0, again.err
    before, after = everything(items), everything(Path("back"))
    assert {id: one["text"] for id, one in after.items()} == {
        id: one["text"] for id, one in before.items()
    }
    alone = run("index", "import", "out/index.faiss", "back", "--ids", "out/ids.parquet")
    assert (alone.code, set(everything(Path("back"))["p0"])) == (0, {"item", "image", "text"})
    run("index", "build", items, "--kind", "IVF1,SQ8")
    run("index", "export", items, "rounded", "--to", "faiss")
    refused = run("index", "import", "rounded", "back")
    assert refused.code == 2
    assert "allow a lossy import" in refused.err
    assert run("index", "import", "rounded", "back", "--lossy").code == 0


def test_tables_of_others_are_imported_by_their_columns(
    run: Run, model_dir: Path, vectors: dict[str, np.ndarray]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "sku": list(vectors),
        "emb": [(3 * vector).tolist() for vector in vectors.values()],
        "price": list(range(COUNT)),
    }
    pq.write_table(pa.table(columns), "t.parquet")
    wanted = ("index", "import", "t.parquet", "c", "--model", model_dir, "--id-column", "sku")
    wanted = (*wanted, "--image-vectors", "emb", "--vectors", "float16")
    longer = run(*wanted)
    assert longer.code == 2
    assert "has length 3, not 1" in longer.err
    assert run(*wanted, "--normalize").code == 0
    cheap = run("search", "c", "--like", "p5", "--filter", '{"price": {"lt": 3}}', "--json").ids()
    assert cheap == nearest({id: vectors[id] for id in ("p0", "p1", "p2")}, vectors["p5"], 3)


def test_an_import_that_is_refused_leaves_nothing_of_a_new_collection(
    run: Run, model_dir: Path, vectors: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("index.transfer.ROWS_PER_WRITE", 4)
    rows = [vector.tolist() for vector in vectors.values()]

    def write(rows: list[list[float]]) -> None:
        pq.write_table(pa.table({"id": list(vectors), "image_vector": rows}), "t.parquet")

    wanted = ("index", "import", "t.parquet", "c", "--model", model_dir)
    for bad, says in (
        ([*rows[:-1], [2 * number for number in rows[-1]]], "has length 2, not 1"),  # the last
        ([row[:-1] for row in rows], "must hold lists of 16 numbers"),
    ):
        write(bad)
        refused = run(*wanted)
        assert refused.code == 2
        assert says in refused.err
        assert sorted(file.name for file in Path().iterdir()) == ["t.parquet"]
    Path("c").mkdir()  # an empty directory is as good as none
    write(rows)
    assert run(*wanted).code == 0
    before = everything(Path("c"))
    assert len(before) == COUNT
    write(bad)
    assert run(*wanted).code == 2
    assert everything(Path("c")) == before


def test_an_import_goes_nowhere_where_something_else_is(
    run: Run, filled: Path, model_dir: Path
) -> None:
    run("index", "export", filled, "out.parquet", "--to", "parquet")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    refused = run("index", "import", "out.parquet", "notes", "--model", model_dir)
    assert refused.code == 2
    assert "notes is there, and is no collection; choose a new directory" in refused.err
    assert [file.name for file in Path("notes").iterdir()] == ["a.txt"]


def test_what_was_deleted_stays_away_until_it_is_embedded_again(
    run: Run, model_dir: Path, source: Path
) -> None:
    from index.collection import Collection

    embed = ("embed", model_dir, source / "t.jsonl", "--collection", "c", "--id-column", "id")
    run(*embed)
    with Collection.open(Path("c")) as opened:
        opened.delete(["p3"])
    assert f"added 0, skipped {COUNT} there or embedded before" in run(*embed).out
    assert "p3" not in everything(Path("c"))
    assert run(*embed, "--overwrite", "--json").json["added"] == COUNT
    assert "p3" in everything(Path("c"))


def test_check_builds_a_damaged_index_again(run: Run, items: Path) -> None:
    run("index", "build", items, "--kind", "IVF2,Flat", "--recall", 0.8)
    (file,) = (items / "indexes" / "image").glob("*.vectors")
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    seen = run("index", "check", items, "--no-write")
    assert seen.code == 1
    assert f"bad: the index of image vectors: {file.name} is damaged" in seen.out
    mended = run("index", "check", items)
    assert mended.code == 0
    assert f"{file.name} is damaged; built again as it was asked for: IVF2,Flat" in mended.out
    index = run("index", "info", items, "--json").json["indexes"]["image"]
    assert (index["kind"], index["recall_target"]) == ("IVF2,Flat", 0.8)
    assert run("index", "check", items).out == f"{COUNT} items, 0 problems\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "items"], "give a TEXT to search for, --image FILE, --like ID or --queries"),
        (["search", "items", "--like", "nobody"], "no item 'nobody'"),
        (["search", "items", "--like", "p1", "--field", "sound"], "'sound'"),
        (["search", "items", "--like", "p1", "--filter", "{colour: red}"], "is not JSON"),
        (["search", "items", "--like", "p1", "--filter", '{"n": {"near": 3}}'], "near"),
        (["search", "items", "--like", "p1", "-k", "9999", "--offset", "9999"], "at most 10000"),
        (["search", "items", "--like", "p1", "--minus-text", "x"], "--model MODEL is required"),
        (["search", "items", "--image", "no.png", "--model", "m"], "picture no.png does not exist"),
        (["search", "items", "x", "--queries", "q.txt", "--model", "m"], "a search for each"),
        (["search", "items", "--queries", "empty.txt", "--model", "m"], "has no text in it"),
        (["search", "items", "--queries", "no.txt", "--model", "m"], "no.txt"),
        (["search", "items", "x", "--model", "m", "--rerank", "3", "--rerank-score", "y"], "'y'"),
        (["search", "items", "--like", "p1", "--rerank-score", "matching"], "needs --rerank K"),
        (["index", "build", "items", "--kind", "magic"], "'magic'"),
        (["index", "build", "items", "--recall", "nan"], "--recall nan"),
        (["index", "build", "items", "--memory", "inf"], "--memory inf"),
        (["index", "build", "items", "--model", "nowhere"], "nowhere"),
        (["index", "build", "nowhere"], "nowhere"),
        (["index", "check", "nowhere"], "nowhere"),
        (["index", "check", "items", "--accept-loss", "--no-write"], "leave --no-write out"),
        (["index", "compact", "nowhere"], "nowhere"),
        (["index", "snapshot", "nowhere", "copy"], "nowhere"),
        (["index", "export", "items", "out", "--to", "csv"], "'csv'"),
        (["index", "export", "items", "q.txt", "--to", "npy"], "q.txt is there already"),
        (["index", "export", "items", "o", "--to", "parquet", "--field", "text"], "--field text"),
        (["index", "export", "items", "o", "--to", "faiss", "--vectors", "float16"], "--vectors"),
        (["index", "import", "nowhere", "items"], "nowhere does not exist"),
        (["index", "import", "q.txt", "items"], "of no known form"),
        (["index", "import", "t.parquet", "items", "--lossy"], "--lossy is for faiss"),
        (["index", "import", "t.parquet", "items", "--vectors", "float16"], "made now"),
        (["index", "import", "t.parquet", "new", "--model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_code_two(
    run: Run, items: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "q.txt").write_text("a\n")
    (tmp_path / "t.parquet").touch()
    done = run(*arguments)
    assert done.code == 2
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert words in done.err
