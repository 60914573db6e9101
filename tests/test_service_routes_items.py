"""/v1/collections/{name}/items."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import apsw
import numpy as np
import pytest
from conftest import encode, make_picture
from served import COUNT, World, b64, check_refusal, error, post_json, serving

from index import collection as collection_module
from index.collection import Collection, Item
from service import replies
from service.settings import load_settings


def test_items_are_added_found_replaced_and_deleted(own_world: World):
    put, get = own_world.client.put, own_world.client.get
    new = [encode(make_picture(seed=100 + i)) for i in range(2)]
    vectors = own_world.model.embed_images(new)
    items = [
        {"id": "a/b?c#d/image", "image": b64(new[0]), "caption": "odd", "metadata": {"x": 10**30}},
        {"id": "vector", "vector": (3 * vectors[1]).tolist()},
        {"id": "text", "text": "a red heart"},
    ]
    answer = put("/v1/collections/toys/items", json={"items": items})
    assert (answer.status_code, answer.json()["upserted"]) == (200, 3)
    found = own_world.post("/v1/search", image=b64(new[0]), k=1).json()["hits"][0]
    assert (found["id"], found["metadata"]) == ("a/b?c#d/image", {"x": 10**30})
    assert get(found["image_url"]).content[:2] == b"\xff\xd8"
    item_url = found["image_url"].rpartition("/image?")[0]
    assert get(item_url).json()["caption"] == "odd"
    assert own_world.post("/v1/search", image=b64(new[1]), k=1).json()["hits"][0]["id"] == "vector"
    assert get("/v1/collections/toys/items/vector/image").status_code == 404
    put("/v1/collections/toys/items", json={"items": [items[1] | {"caption": "new"}]})
    assert get("/v1/collections/toys/items/vector").json()["caption"] == "new"
    assert get("/v1/collections/toys").json()["count"] == COUNT + 3
    assert own_world.client.delete(item_url).json()["deleted"] == 1
    assert own_world.client.delete(item_url).status_code == 404
    assert get("/v1/collections/toys").json()["count"] == COUNT + 2


def test_an_item_may_have_a_picture_and_a_text(own_world: World):
    picture = encode(make_picture(seed=50))
    items = [
        {"id": "both", "image": b64(picture), "text": "a red heart"},
        {"id": "given", "vector": own_world.vectors[0].tolist(), "text": "a blue car"},
        {"id": "picture", "image": b64(picture)},
        {"id": "words", "text": "a dog " * 50},
    ]
    answer = own_world.put("/v1/collections/toys/items", items=items).json()
    assert (answer["upserted"], answer["truncated"]) == (4, [3])
    collection = own_world.registry.collections["toys"].collection
    rowids = collection.rowids_of(item["id"] for item in items)
    images = collection.vectors_of(np.array([rowids[item["id"]] for item in items]))
    texts = own_world.model.embed_texts(["a red heart", "a blue car", "a dog " * 50])
    pictures = own_world.model.embed_images([picture])
    want = [pictures[0], own_world.vectors[0], pictures[0], texts[2]]
    np.testing.assert_allclose(images, want, atol=1e-5)
    worded = np.array([rowids[name] for name in ("both", "given", "words")])
    np.testing.assert_allclose(collection.vectors_of(worded, "text"), texts, atol=1e-5)
    assert rowids["picture"] not in collection.rowids("text")
    assert collection.thumbnail("both") is not None


def test_an_acknowledged_write_is_on_disk(own_world: World, tmp_path: Path):
    item = {"id": "kept", "text": "x"}
    own_world.put("/v1/collections/toys/items", items=[item])
    with Collection.open(tmp_path / "toys", read_only=True) as other:
        assert other.contains(["kept"]) == {"kept"}


@pytest.mark.parametrize(
    ("items", "status", "word"),
    [
        ([], 400, "empty"),
        ([{"id": f"{i}", "text": "x"} for i in range(257)], 400, "at most 256"),
        ([{"id": "n", "text": "x"}] * 2, 400, "items[1].id is given twice"),
        ([{"id": "n"}], 400, "items[0] has nothing"),
        ([{"id": "n", "image": "eHh4", "vector": [1.0]}], 400, "keep one"),
        ([{"id": "", "text": "x"}], 400, "items[0]"),
        ([{"id": "i" * 513, "text": "x"}], 400, "items[0]"),
        ([{"id": ".", "text": "x"}], 400, "items[0] cannot be stored: an id is"),
        ([{"id": "good", "text": "x"}, {"id": "..", "text": "x"}], 400, 'not "." or ".."'),
        ([{"id": "n", "text": "x", "metadata": {"a": "x" * 2**20}}], 413, "items[0] has over"),
        ([{"id": "n", "text": "x", "caption": "x" * 2**20}], 413, "1048576 bytes of caption"),
        ([{"id": "n", "text": "x", "metadata": {"a": float("inf")}}], 400, "items[0]"),
        ([{"id": "n", "text": "x", "metadata": []}], 422, "metadata"),
        ([{"id": "n", "vector": [1.0] * 15}], 400, "items[0].vector"),
        ([{"id": "n", "vector": [float("nan")] * 16}], 400, "items[0].vector"),
        ([{"id": "good", "text": "x"}, {"id": "n", "text": "x" * 20_000}], 422, "items[1].text"),
        ([{"id": "good", "text": "x"}, {"id": "n", "image": "eHh4"}], 422, "items[1]"),
        ([{"id": "good", "text": "x"}, {"id": "n", "image": "http://x"}], 400, "items[1].image"),
    ],
)
def test_a_wrong_item_is_named_and_nothing_is_stored(world: World, items, status, word):
    response = world.client.put(
        "/v1/collections/toys/items",
        content=json.dumps({"items": items}),
        headers={"Content-Type": "application/json"},
    )
    check_refusal(response, status, word)
    assert world.get("/v1/collections/toys").json()["count"] == COUNT


def test_items_are_listed_page_by_page(world: World):
    first = world.get("/v1/collections/toys/items", limit=5).json()["data"]
    rest = world.get("/v1/collections/toys/items", limit=100, start_after=first[-1]["id"])
    ids = [item["id"] for item in first + rest.json()["data"]]
    assert ids == sorted(f"toys/{i}" for i in range(COUNT))
    assert world.get("/v1/collections/toys/items", limit=0).status_code == 422


def test_many_items_are_deleted_in_one_write(own_world: World):
    before = own_world.get("/v1/collections/toys").json()["generation"]
    given = ["toys/1", "toys/2", "toys/2", "nope"]
    answer = own_world.post("/v1/collections/toys/items:delete", ids=given).json()
    assert (answer["deleted"], answer["generation"]) == (2, before + 1)
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT - 2
    assert own_world.get("/v1/collections/toys/items/toys%2F1").status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"ids": []}, 400, "ids is empty"),
        ({"ids": ["x"] * 10_001}, 400, "at most 10000"),
        ({"ids": "x"}, 422, "ids"),
        ({}, 422, "ids"),
    ],
)
def test_a_wrong_deletion_says_what_is_wrong(world: World, body, status, word):
    check_refusal(post_json(world, "/v1/collections/toys/items:delete", body), status, word)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/collections/nope",
        "/v1/collections/..%2Ftoys/items/x",
        "/v1/collections/toys/items/..%2F..%2F..%2Fetc%2Fpasswd",
        "/v1/collections/toys/items/..%2F..%2Fetc%2Fpasswd/image",
        "/v1/collections/toys/items/%00",
        "/v1/collections/toys/items/%FF%FE",
        "/v1/collections/toys/items/%FF/image",
    ],
)
def test_what_is_not_here_is_404(world: World, path: str):
    check_refusal(world.client.get(path), 404, "no")


def test_a_collection_may_be_called_items(tmp_path: Path, model_dir: Path):
    with serving(tmp_path, model_dir, load_settings(collections_root=tmp_path)) as world:
        place = "/v1/collections/items/items"
        assert world.put("/v1/collections/items").status_code == 201
        picture = b64(world.pictures[0])
        given = [
            {"id": id, "image": picture, "caption": id} for id in ("x", "items/x", "a/items/x")
        ]
        assert world.put(place, items=given).json()["upserted"] == 3
        for id in ("x", "items/x", "a/items/x"):
            quoted = quote(id, safe="")
            assert world.client.get(f"{place}/{quoted}").json()["caption"] == id
            assert world.client.get(f"{place}/{quoted}/image").content[:2] == b"\xff\xd8"
        assert world.client.delete(f"{place}/x").json()["deleted"] == 1
        assert [one["id"] for one in world.get(place).json()["data"]] == ["a/items/x", "items/x"]


def test_a_slash_in_a_collections_name_does_not_shift_the_id(world: World):
    path = "/v1/collections/toys%2Fitems/items/toys%2F1"
    assert world.client.get(path).status_code == 404


def test_a_page_that_is_too_large_is_refused_before_it_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replies, "MAX_ANSWER_BYTES", 200)
    assert world.get("/v1/collections/toys/items", limit=2).status_code == 200
    monkeypatch.setattr(Collection, "scan", None)
    response = world.get("/v1/collections/toys/items", limit=COUNT)
    check_refusal(response, 400, "at most 200 are allowed")
    assert (error(response)["code"], error(response)["param"]) == ("answer_too_large", "limit")


def test_an_old_item_of_an_id_that_no_path_can_name_is_read_and_deleted(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    collection = own_world.registry.collections["toys"].collection
    with monkeypatch.context() as earlier:
        earlier.setattr("index.items._NOT_NEW_IDS", ())
        collection.upsert([Item(".."), Item(".")], own_world.vectors[:2])
    listed = own_world.get("/v1/collections/toys/items", limit=2).json()["data"]
    assert [item["id"] for item in listed] == [".", ".."]
    assert own_world.post("/v1/search", id="..", k=1).status_code == 200
    answer = own_world.post("/v1/collections/toys/items:delete", ids=[".", ".."])
    assert answer.json()["deleted"] == 2
    assert own_world.get("/v1/collections/toys").json()["count"] == COUNT


def test_a_full_disk_is_told_in_one_line(
    own_world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any, **__: Any) -> None:
        raise apsw.exception_for(apsw.SQLITE_FULL)

    monkeypatch.setattr("index.collection._remove", fail)
    item = {"id": "a", "text": "x"}
    answer = own_world.put("/v1/collections/toys/items", items=[item])
    check_refusal(answer, 507, "disk is full")
    assert error(answer)["code"] == "disk_full"
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1
    assert told[0].exc_info is None
    monkeypatch.undo()
    assert own_world.put("/v1/collections/toys/items", items=[item]).status_code == 200


def test_of_a_request_that_fails_half_way_nothing_is_kept(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    remove = collection_module._remove

    def fail(connection: apsw.Connection, ids: list[str], generation: int) -> int:
        if "words" in ids:
            raise apsw.exception_for(apsw.SQLITE_FULL)
        return remove(connection, ids, generation)

    monkeypatch.setattr(collection_module, "_remove", fail)
    before = own_world.get("/v1/collections/toys").json()
    vector = own_world.vectors[0].tolist()
    items = [{"id": "bare", "vector": vector}, {"id": "words", "text": "x"}]
    answer = own_world.put("/v1/collections/toys/items", items=items)
    check_refusal(answer, 507, "disk is full")
    assert own_world.get("/v1/collections/toys").json() == before
    assert own_world.client.get("/v1/collections/toys/items/bare").status_code == 404
