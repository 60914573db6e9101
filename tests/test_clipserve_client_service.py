"""The client and the service, over loopback: what a call returns is what the model would."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import make_picture
from toys import listening

import clipserve
from clipserve.client import Client, Ranked
from clipserve.errors import (
    AccessDenied,
    ItemRefused,
    NotThere,
    RequestRefused,
    ServiceUnreachable,
    TextTruncated,
)
from clipserve.model import Model
from service.keys import add_key


class Running:
    def __init__(self, address: str, model: Model, pictures: list[bytes]) -> None:
        self.address, self.model, self.pictures = address, model, pictures
        self.vectors = model.embed_images(pictures)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("client")
    settings: dict[str, Any] = {"max_items": 20, "jobs_dir": folder / "jobs"}
    (folder / "root").mkdir()
    with listening(folder, model_dir, collections_root=folder / "root", **settings) as found:
        yield Running(*found)


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.address) as made:
        yield made


def test_vectors_are_the_models(running: Running, client: Client):
    texts = [f"text number {i}" for i in range(50)]
    np.testing.assert_allclose(
        client.embed_texts(texts), running.model.embed_texts(texts), atol=1e-5
    )
    given = [*running.pictures * 5, make_picture(seed=2)]
    expected = np.concatenate([*[running.vectors] * 5, running.vectors[2:3]])
    np.testing.assert_allclose(client.embed_images(given), expected, atol=1e-5)


def test_one_bad_picture_leaves_the_others(running: Running, client: Client):
    given = [running.pictures[0], b"broken", running.pictures[2]]
    errors: dict[int, Any] = {}
    vectors = client.embed_images(given, errors=errors)
    assert errors[1].code == "invalid_image"
    np.testing.assert_allclose(vectors[[0, 2]], running.vectors[[0, 2]], atol=1e-5)
    with pytest.raises(ItemRefused, match="item 1"):
        client.embed_images(given)
    with pytest.raises(ItemRefused, match="item 0"):
        client.embed_images([b"broken"])


def test_pictures_are_classified(running: Running, client: Client):
    labels = ["cat", "dog", "red heart"]
    found = client.classify(running.pictures[:2], labels, templates="photo", top_k=2)
    probabilities = running.model.zero_shot(labels, templates="photo").classify(
        running.pictures[:2]
    )
    assert [len(one) for one in found] == [2, 2]
    for predictions, row in zip(found, probabilities, strict=True):
        best = int(row.argmax())
        assert predictions[0].label == labels[best]
        assert predictions[0].probability == pytest.approx(row[best], abs=1e-4)


def test_a_model_that_compares_vectors_does_not_match(running: Running, client: Client):
    with pytest.raises(RequestRefused) as caught:
        client.match([running.pictures[0]], ["a cat"])
    assert caught.value.code == "no_matching"


def test_searching_by_anything(running: Running, client: Client):
    assert client.search(image=running.pictures[3], k=1)[0].id == "toy/3"
    hit = client.search(vector=running.vectors[4], k=1, with_vectors=True)[0]
    assert (hit.id, hit.caption, hit.metadata) == ("toy/4", "toy 4", {"n": 4})
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert hit.vector is not None
    np.testing.assert_allclose(hit.vector, running.vectors[4], atol=1e-5)
    assert [hit.id for hit in client.search("a cat", k=9, filter={"n": 5})] == ["toy/5"]
    assert client.search(id="toy/0", k=1)[0].id == "toy/1"
    parts = [{"image": running.pictures[2], "weight": 1.0}, {"text": "a cat", "weight": 0.001}]
    assert client.search(queries=parts, k=1, collection="toys")[0].id == "toy/2"


def test_a_collection_from_its_beginning_to_its_end(running: Running, client: Client):
    client.create_collection("new", model="tiny")
    items = [{"id": f"{i}", "image": running.pictures[i], "caption": "x"} for i in range(6)]
    items += [{"id": f"t{i}", "vector": running.vectors[0]} for i in range(30)]
    assert client.upsert("new", items) == 36
    assert client.collection("new")["count"] == 36
    assert {one["name"] for one in client.collections()} == {"toys", "new"}
    assert client.search(image=running.pictures[3], collection="new", k=1)[0].id == "3"
    assert client.delete("new", [*(f"t{i}" for i in range(30)), "gone"]) == 30
    assert client.collection("new")["count"] == 6
    errors: dict[int, Any] = {}
    items = [{"id": "good", "text": "a"}, {"id": "bad", "image": b"no"}, {"id": "", "text": "b"}]
    assert client.upsert("new", items, errors=errors) == 1
    assert sorted(errors) == [1, 2]
    client.drop_collection("new")
    with pytest.raises(NotThere):
        client.collection("new")


def test_a_job_stores_any_number_of_items_and_is_followed_to_its_end(
    running: Running, client: Client
):
    client.create_collection("bulk")
    sent: list[tuple[int, int | None]] = []
    stored: list[tuple[int, int | None]] = []
    items = ({"id": str(i), "text": f"text {i}"} for i in range(1050))
    job = client.start_job("bulk", items, progress=lambda *told: sent.append(told))
    assert sent == [(1000, None), (1050, None)]
    done = client.follow_job(job["id"], every_s=0.02, progress=lambda *told: stored.append(told))
    assert (done["state"], done["done"], done["failed"]) == ("done", 1050, [])
    assert stored == sorted(stored)
    assert stored[-1] == (1050, 1050)
    assert [one["id"] for one in client.jobs()] == [job["id"]]
    assert client.collection("bulk")["count"] == 1050
    client.cancel_job(job["id"])
    client.drop_collection("bulk")


def test_items_of_a_job_that_could_not_be_stored_are_named_by_their_places(
    running: Running, client: Client
):
    items = [{"id": "bulk/1", "text": "a"}, {"id": "bulk/2", "image": b"no picture"}]
    job = client.start_job("toys", items)
    errors: dict[int, Any] = {}
    done = client.follow_job(job["id"], every_s=0.02, errors=errors)
    assert (done["num_failed"], list(errors)) == (1, [1])
    assert errors[1].code == "invalid_image"
    with pytest.raises(ItemRefused, match="item 1"):
        client.follow_job(job["id"])
    assert client.delete("toys", ["bulk/1", "bulk/2"]) == 1
    client.cancel_job(job["id"])


def test_many_queries_find_what_each_finds_alone(running: Running, client: Client):
    told: list[tuple[int, int | None]] = []
    queries: list[Any] = [f"text {i}" for i in range(30)]
    queries[4] = {"image": running.pictures[3]}
    queries[7] = {"queries": [{"vector": running.vectors[5]}, {"text": "x", "weight": 0.001}]}
    found = client.search_many(
        queries, k=2, filter={"n": {"gte": 2}}, progress=lambda *one: told.append(one)
    )
    assert [hit.id for hit in found[0]] == [
        hit.id for hit in client.search("text 0", k=2, filter={"n": {"gte": 2}})
    ]
    assert (found[4][0].id, found[7][0].id) == ("toy/3", "toy/5")
    assert [len(hits) for hits in found] == [2] * 30
    assert told[-1] == (30, 30)


def test_a_query_that_is_refused_leaves_the_others(running: Running, client: Client):
    errors: dict[int, Any] = {}
    found = client.search_many(["a", {"id": "gone"}, {"image": b"no"}, "b"], k=1, errors=errors)
    assert [len(hits) for hits in found] == [1, 0, 0, 1]
    assert (errors[1].status, errors[2].code) == (404, "invalid_image")
    with pytest.raises(ItemRefused, match="item 1"):
        client.search_many(["a", {"id": "gone"}])


def test_what_a_service_cannot_read_is_an_error_of_its_item_alone(client: Client):
    errors: dict[int, Any] = {}
    items = [{"id": f"typo/{i}", "text": "a"} for i in range(12)]
    items[3] = {"id": "typo/3", "text": "a", "metdata": {"n": 1}}
    items[9] = {"id": "typo/9", "text": "a", "metadata": "n"}
    assert client.upsert("toys", items, errors=errors) == 10
    assert sorted(errors) == [3, 9]
    assert "has a field this route does not know" in str(errors[3])
    errors.clear()
    queries: list[Any] = ["a", {"txt": "a"}, {}, {"text": "a", "id": "typo/1"}, "b"]
    found = client.search_many(queries, k=1, errors=errors)
    assert [len(hits) for hits in found] == [1, 0, 0, 0, 1]
    assert sorted(errors) == [1, 2, 3]
    assert client.delete("toys", [item["id"] for item in items]) == 10


def test_queries_whose_hits_are_too_many_together_are_asked_apart(running: Running, client: Client):
    found = client.search_many([f"text {i}" for i in range(19)], k=1000)
    assert [len(hits) for hits in found] == [6] * 19


def test_texts_are_classified(running: Running, client: Client):
    texts, labels = [f"text {i}" for i in range(25)], ["cat", "dog", "red heart"]
    found = client.classify_texts(texts, labels, templates=["a {}.", "one {}."], top_k=1)
    head = running.model.zero_shot(labels, templates=["a {}.", "one {}."])
    expected = head.probabilities(running.model.embed_texts(texts))
    assert [one[0].label for one in found] == [labels[i] for i in expected.argmax(axis=1)]
    got = [one[0].probability for one in found]
    np.testing.assert_allclose(got, expected.max(axis=1), atol=1e-4)


LONG = "a red heart " * 100


def test_texts_that_are_cut_are_warned_of_named_or_refused(client: Client):
    with pytest.warns(TextTruncated, match="item 1$"):
        client.embed_texts(["a", LONG])
    with pytest.warns(TextTruncated, match="item 0, item 1, item 2, item 3, item 4, 15 more$"):
        client.embed_texts([LONG] * 20)
    cut: set[int] = set()
    client.embed_texts(["a", LONG] * 30, truncated=cut)
    assert cut == set(range(1, 60, 2))
    errors: dict[int, Any] = {}
    vectors = client.embed_texts(["a", LONG], truncate=False, errors=errors)
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True]
    assert errors[1].code == "text_too_long"
    with pytest.raises(ItemRefused, match="item 1"):
        client.embed_texts(["a", LONG], truncate=False)


def test_every_call_that_cuts_texts_says_so(running: Running, client: Client):
    cut: set[int] = set()
    errors: dict[int, Any] = {}
    items = [{"id": f"cut/{i}", "text": text} for i, text in enumerate(("b", LONG, "a", LONG))]
    items[2]["id"] = ""
    assert client.upsert("toys", items, truncated=cut, errors=errors) == 3
    assert (cut, list(errors)) == ({1, 3}, [2])
    cut.clear()
    client.search_many(["a", LONG], truncated=cut)
    client.classify_texts([LONG], ["cat", "dog"], truncated=cut)
    assert cut == {0, 1}
    with pytest.warns(TextTruncated, match="item 0$"):
        client.upsert("toys", [{"id": "cut/1", "text": LONG}])
    with pytest.warns(TextTruncated, match="item 1$"):
        client.search_many(["a", LONG])
    with pytest.warns(TextTruncated, match="the query$"):
        client.search(LONG)
    with pytest.warns(TextTruncated, match="label 1$"):
        client.classify(running.pictures[:1], ["cat", LONG])
    with pytest.warns(TextTruncated, match="label 0$"):
        client.classify_texts(["a"], [LONG, "cat"])
    with pytest.warns(TextTruncated, match=r"query, documents\[1\]$"):
        client.rerank(LONG, ["a", LONG])
    assert client.delete("toys", ["cut/0", "cut/1", "cut/3"]) == 3


def test_the_asynchronous_client_warns_in_the_line_that_called_it(running: Running):
    async def run() -> None:
        async with clipserve.AsyncClient(running.address) as client:
            await client.embed_texts([LONG])

    with pytest.warns(TextTruncated) as told:
        asyncio.run(run())
    assert [one.filename for one in told] == [__file__]


def test_documents_are_ordered_by_how_they_fit(running: Running, client: Client):
    texts = ["a cat", "a dog", "a red heart"]
    expected = running.model.embed_texts(texts) @ running.model.embed_texts(["a dog"])[0]
    found = client.rerank("a dog", texts)
    assert [one.index for one in found] == np.argsort(-expected).tolist()
    assert [one.score for one in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    documents = [{"image": picture} for picture in running.pictures]
    (best,) = client.rerank({"image": running.pictures[3]}, documents, top_n=1)
    assert best == Ranked(3, pytest.approx(1.0, abs=1e-5))


def test_items_are_counted_and_shown(running: Running, client: Client):
    assert client.count("toys", filter={"n": {"gte": 4}}) == 2
    assert client.count("toys") == client.collection("toys")["count"]
    assert client.item_image("toys", "toy/4").startswith(b"\xff\xd8")
    with pytest.raises(NotThere):
        client.item_image("toys", "none")


def test_there_is_a_call_for_every_route(running: Running):
    """All of them, on a service that knows nothing and says it is done."""
    schema = httpx.get(f"{running.address}/openapi.json").json()
    routes = {
        (method.upper(), path)
        for path, ways in schema["paths"].items()
        for method in ways
        if path.startswith("/v1/")
    }
    routes.remove(("DELETE", "/v1/collections/{name}/items/{id}"))  # `delete` takes any number
    patterns = {
        (method, path): re.compile(re.sub("{.*?}", "[^/:]+", path) + "$") for method, path in routes
    }
    asked: set[tuple[str, str]] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.update(
            route
            for route, pattern in patterns.items()
            if route[0] == request.method and pattern.match(request.url.path)
        )
        return httpx.Response(200, json=NOTHING)

    with Client(transport=httpx.MockTransport(answer)) as client:
        client.embed_texts(["a"], errors={})
        client.classify_texts(["a"], ["b"], errors={})
        client.match([b"a"], ["b"], errors={})
        client.rerank("a", ["b"])
        client.search("a")
        for call in (client.models, client.label_sets, client.template_sets, client.collections):
            call()
        for ask in (client.model, client.reload, client.collection, client.create_collection):
            ask("a")
        client.count("a")
        client.rebuild("a")
        client.items("a")
        client.item("a", "b")
        client.item_image("a", "b")
        client.upsert("a", [{"id": "b"}])
        client.delete("a", ["b"])
        client.drop_collection("a")
        client.start_job("a", [{"id": "b"}])
        client.follow_job("a")
        client.jobs()
        client.cancel_job("a")
    assert asked == routes


NOTHING: dict[str, Any] = {
    "id": "a",
    "state": "done",
    "query": {"truncated": False},
    **dict.fromkeys(("count", "deleted", "done", "total"), 0),
    **dict.fromkeys(("data", "errors", "failed", "hits", "truncated", "truncated_labels"), []),
    "results": [{"probability": 0.5, "predictions": [], "index": 0, "relevance_score": 0.5}],
}


def test_a_collection_that_may_be_there_already_is_made_once(running: Running, client: Client):
    client.create_collection("maybe", exist_ok=True)
    client.upsert("maybe", [{"id": "a", "text": "b"}])
    assert client.create_collection("maybe", model="tiny", exist_ok=True)["count"] == 1
    with pytest.raises(RequestRefused) as caught:
        client.create_collection("maybe")
    assert caught.value.code == "collection_exists"
    client.drop_collection("maybe")
    client.drop_collection("maybe", missing_ok=True)
    with pytest.raises(NotThere):
        client.drop_collection("maybe")


def test_items_are_read_page_by_page_and_one_by_one(running: Running, client: Client):
    first = client.items("toys", limit=4)
    rest = client.items("toys", start_after=first[-1]["id"])
    assert [one["id"] for one in first + rest] == [f"toy/{i}" for i in range(6)]
    assert client.item("toys", "toy/4")["metadata"] == {"n": 4}
    with pytest.raises(NotThere):
        client.item("toys", "toy/6")


def test_a_job_whose_items_cannot_be_sent_is_withdrawn(running: Running, client: Client):
    with pytest.raises(ItemRefused, match="item 1"):
        client.start_job("toys", [{"id": "a", "text": "b"}, {"id": "c", "image": "/none.jpg"}])
    assert [one["state"] for one in client.jobs() if one["state"] != "cancelled"] == []


def test_models_are_listed_and_healthy(running: Running, client: Client):
    assert [one["id"] for one in client.models()] == ["tiny"]
    assert client.health()["status"] == "ready"
    with pytest.raises(NotThere):
        client.embed_texts(["a"], model="none")


def test_a_model_is_reloaded(tmp_path: Path, model_dir: Path):
    with listening(tmp_path, model_dir) as (address, model, _), Client(address) as client:
        answer = client.reload("tiny")
        assert answer["new_fingerprint"] == model.info.fingerprint
        assert answer["collections_kept"] == ["toys"]
        with pytest.raises(AccessDenied, match="CLIPSERVE_MODEL_ROOTS"):
            client.reload("tiny", path="/elsewhere")


def test_the_asynchronous_client_does_many_things_at_once(running: Running):
    async def run() -> list[np.ndarray]:
        async with clipserve.AsyncClient(running.address) as client:
            return await asyncio.gather(*(client.embed_texts([f"text {i}"]) for i in range(8)))

    expected = running.model.embed_texts([f"text {i}" for i in range(8)])
    np.testing.assert_allclose(np.concatenate(asyncio.run(run())), expected, atol=1e-5)


def test_the_asynchronous_client_follows_jobs_and_asks_much_at_once(running: Running):
    async def run() -> None:
        async with clipserve.AsyncClient(running.address) as client:
            await client.create_collection("apart", exist_ok=True)
            items = [{"id": str(i), "text": f"text {i}"} for i in range(8)]
            job = await client.start_job("apart", items)
            await client.follow_job(job["id"], every_s=0.02)
            texts = [item["text"] for item in items]
            found = await client.search_many(texts, k=1, collection="apart", exact=True)
            assert [hits[0].score for hits in found] == pytest.approx([1.0] * 8, abs=1e-5)
            assert len(await client.classify_texts(texts, ["a", "b"])) == 8
            await client.drop_collection("apart", missing_ok=True)

    asyncio.run(run())


def test_nobody_listening_is_said():
    with (
        Client("http://127.0.0.1:9", retries=0) as client,
        pytest.raises(ServiceUnreachable, match="http://127.0.0.1:9 cannot be reached"),
    ):
        client.models()


def test_a_key_opens_what_its_scope_allows(tmp_path: Path, model_dir: Path):
    keys = tmp_path / "keys"
    key = add_key(keys, "reader", "read")
    with listening(tmp_path, model_dir, api_keys_file=keys) as (address, _, _):
        with Client(address) as client, pytest.raises(AccessDenied):
            client.embed_texts(["a"])
        with Client(address, api_key=key) as client:
            assert client.embed_texts(["a"]).shape == (1, 16)
            with pytest.raises(AccessDenied):
                client.delete("toys", ["toy/1"])
