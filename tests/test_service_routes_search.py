"""POST /v1/search."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from albefs import tiny_albef
from conftest import make_picture
from served import COUNT, World, b64, check_hits, check_refusal, error, post_json, serving
from torch import Tensor

from clipserve import checkpoint
from clipserve.images import make_thumbnail
from index.build import build as build_index
from index.collection import Item
from index.rerank import rerank
from service import replies
from service.settings import load_settings

WAIT_S = 30


def ids(response) -> list[str]:
    assert response.status_code == 200, response.text
    return [hit["id"] for hit in response.json()["hits"]]


def test_a_text_a_picture_or_a_vector_finds_the_nearest(world: World):
    text = world.post("/v1/search", text="a red heart", k=5).json()
    check_hits(world, text["hits"], world.model.embed_texts(["a red heart"])[0], 5)
    assert (text["query"], text["stale"]) == ({"kind": "text", "truncated": False}, False)
    image = world.post("/v1/search", collection="toys", image=b64(world.pictures[3]), k=3).json()
    check_hits(world, image["hits"], world.vectors[3], 3)
    vector = world.post("/v1/search", vector=(7 * world.vectors[5]).tolist(), k=2).json()
    check_hits(world, vector["hits"], world.vectors[5], 2)
    hit = vector["hits"][0]
    assert (hit["caption"], hit["metadata"]) == ("picture 5", {"n": 5, "even": False})


def test_a_form_or_a_picture_as_the_body_searches_too(world: World):
    form = world.client.post(
        "/v1/search",
        files={"file": world.pictures[4]},
        data={"k": "4", "filter": json.dumps({"n": {"lt": 8}}), "with_vectors": "true"},
    ).json()
    assert form["hits"][0]["id"] == "toys/4"
    assert len(form["hits"]) == 4
    assert all(hit["metadata"]["n"] < 8 for hit in form["hits"])
    np.testing.assert_allclose(form["hits"][0]["vector"], world.vectors[4], atol=1e-5)
    body = world.client.post(
        "/v1/search?k=2", content=world.pictures[4], headers={"Content-Type": "image/png"}
    ).json()
    check_hits(world, body["hits"], world.vectors[4], 2)


def test_a_long_text_is_told_to_be_cut(world: World):
    body = world.post("/v1/search", text="a dog " * 50).json()
    assert body["query"] == {"kind": "text", "truncated": True}


def test_an_item_finds_its_like_but_not_itself(world: World):
    order = np.argsort(-(world.vectors @ world.vectors[3]), kind="stable")
    assert order[0] == 3
    assert ids(world.post("/v1/search", id="toys/3", k=4)) == [f"toys/{i}" for i in order[1:5]]


def test_a_mixed_query_is_the_weighted_sum_of_its_parts(world: World):
    parts = [
        {"text": "a red heart", "weight": 2},
        {"image": b64(world.pictures[3])},
        {"vector": (5 * world.vectors[1]).tolist(), "weight": -0.5},
        {"id": "toys/0", "weight": 0.25},
    ]
    text = world.model.embed_texts(["a red heart"])[0]
    query = 2 * text + world.vectors[3] - 0.5 * world.vectors[1] + 0.25 * world.vectors[0]
    query /= np.linalg.norm(query)
    body = world.post("/v1/search", queries=parts, k=COUNT).json()
    scores = world.vectors @ query
    best = [i for i in np.argsort(-scores, kind="stable") if i != 0]
    assert [hit["id"] for hit in body["hits"]] == [f"toys/{i}" for i in best]
    np.testing.assert_allclose([h["score"] for h in body["hits"]], scores[best], atol=1e-5)
    assert body["query"]["kind"] == "mixed"


def test_several_queries_are_answered_in_their_order(world: World):
    batch = [
        {"text": "a red heart"},
        {"id": "toys/3"},
        {"vector": world.vectors[5].tolist()},
        {"queries": [{"text": "a dog " * 50}, {"image": b64(world.pictures[2])}]},
    ]
    body = world.post("/v1/search", batch=batch, k=3).json()
    first, second, third, fourth = body["results"]
    check_hits(world, first["hits"], world.model.embed_texts(["a red heart"])[0], 3)
    assert [h["id"] for h in second["hits"]] == ids(world.post("/v1/search", id="toys/3", k=3))
    check_hits(world, third["hits"], world.vectors[5], 3)
    assert [one["query"]["truncated"] for one in body["results"]] == [False, False, False, True]
    assert fourth["query"]["kind"] == "mixed"


def test_a_filter_an_offset_and_a_least_score_choose_among_the_hits(world: World):
    every = world.post("/v1/search", text="a cat", k=COUNT).json()["hits"]
    even = [hit["id"] for hit in every if hit["metadata"]["even"]]
    assert ids(world.post("/v1/search", text="a cat", filter={"even": True})) == even
    wanted = {"or": [{"n": {"in": [1, 3]}}, {"not": {"n": {"lt": 11}}}]}
    few = [hit["id"] for hit in every if hit["metadata"]["n"] in (1, 3, 11)]
    assert ids(world.post("/v1/search", text="a cat", filter=wanted)) == few
    later = ids(world.post("/v1/search", text="a cat", k=3, offset=4))
    assert later == [hit["id"] for hit in every[4:7]]
    between = (every[2]["score"] + every[3]["score"]) / 2
    good = ids(world.post("/v1/search", text="a cat", k=COUNT, min_score=between))
    assert good == [hit["id"] for hit in every[:3]]


def test_near_duplicates_are_left_out(world: World):
    every = ids(world.post("/v1/search", text="a cat", k=COUNT))
    assert ids(world.post("/v1/search", text="a cat", k=COUNT, deduplicate=0.001)) == every[:1]
    assert ids(world.post("/v1/search", text="a cat", k=COUNT, deduplicate=1)) == every


def test_vectors_come_with_the_hits_when_they_are_wanted(world: World):
    hits = world.post("/v1/search", text="a cat", k=3, with_vectors=True).json()["hits"]
    for hit in hits:
        want = world.vectors[hit["metadata"]["n"]]
        np.testing.assert_allclose(hit["vector"], want, atol=1e-6)
    assert "vector" not in world.post("/v1/search", text="a cat").json()["hits"][0]


def test_the_texts_of_items_are_a_field_of_their_own(own_world: World):
    items = [
        {"id": "both", "image": b64(own_world.pictures[0]), "text": "a red heart"},
        {"id": "words", "text": "a blue car"},
    ]
    assert own_world.put("/v1/collections/toys/items", items=items).status_code == 200
    found = own_world.post("/v1/search", text="a red heart", field="text", k=5).json()["hits"]
    assert [hit["id"] for hit in found][0] == "both"
    assert {hit["id"] for hit in found} == {"both", "words"}
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    image = own_world.post("/v1/search", image=b64(own_world.pictures[0]), k=2).json()["hits"]
    assert {hit["id"] for hit in image} == {"both", "toys/0"}
    like = own_world.post("/v1/search", id="toys/1", field="text")
    check_refusal(like, 400, "id has no text vector")


def test_an_exact_search_passes_nothing_over(tmp_path: Path, model_dir: Path):
    random = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    vectors = random / np.linalg.norm(random, axis=1, keepdims=True)
    with serving(tmp_path, model_dir, load_settings(rebuild_indexes=False)) as world:
        collection = world.registry.collections["toys"].collection
        items = [Item(f"r{i}") for i in range(len(vectors))]
        collection.upsert(items, vectors)
        build_index(collection, kind="IVF64,Flat", exact_limit=0, recall_target=0.5)
        searcher = world.registry.collections["toys"].searcher
        searcher.refresh()
        assert searcher.info is not None
        queries = vectors[:50] + 0.5 * vectors[50:100]
        batch = [{"vector": query.tolist()} for query in queries]
        body = world.post("/v1/search", batch=batch, k=10, exact=True).json()
        every = np.concatenate([vectors, world.vectors])
        names = [*(item.id for item in items), *(f"toys/{i}" for i in range(COUNT))]
        for query, result in zip(queries, body["results"], strict=True):
            best = np.argsort(-(every @ query))[:10]
            assert [hit["id"] for hit in result["hits"]] == [names[i] for i in best]


@pytest.fixture(scope="module")
def albef_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Of a model that can match, over its own collection."""
    folder = tmp_path_factory.mktemp("albef")
    model = tiny_albef(folder / "vocabulary")
    checkpoint.save(model, folder / "albef", name="albef", objective=("matching",))
    with serving(folder, folder / "albef", load_settings()) as world:
        yield world


def test_reranked_hits_are_in_the_order_of_the_matching_head(albef_world: World):
    ask = {"text": "a red cat on a mat", "k": COUNT}
    plain = albef_world.post("/v1/search", **ask).json()["hits"]
    body = albef_world.post("/v1/search", **ask, rerank=True, k_test=6, rerank_score="matching")
    hits = body.json()["hits"]
    served = albef_world.registry.collections["toys"]
    vector = albef_world.model.embed_texts([ask["text"]])
    found = served.searcher.search(vector, COUNT)
    want = rerank(
        albef_world.model, [ask["text"]], found, served.collection, k_test=6, score="matching"
    ).hits[0]
    assert [hit["id"] for hit in hits] == [hit.id for hit in want]
    assert [hit["id"] for hit in hits[6:]] == [hit["id"] for hit in plain[6:]]
    matched = [hit["matching"] for hit in hits[:6]]
    np.testing.assert_allclose(matched, [hit.matching for hit in want[:6]], atol=1e-5)
    page = albef_world.post(
        "/v1/search",
        text=ask["text"],
        k=2,
        offset=3,
        rerank=True,
        k_test=6,
        rerank_score="matching",
    )
    assert ids(page) == [hit["id"] for hit in hits[3:5]]


@pytest.fixture
def dropping(tmp_path: Path, albef_world: World) -> Iterator[World]:
    """The same, with a collection that may be dropped, and batches of five."""
    model_path = albef_world.registry.model("albef").path
    assert model_path is not None
    settings = load_settings(collections_root=tmp_path, max_image_batch=5)
    with serving(tmp_path, model_path, settings) as world:
        yield world


RERANKED = {"text": "a red cat on a mat", "rerank": True, "k_test": COUNT}


class Busy:
    """The model's thread, until it is let go; from then on the kinds and sizes of its batches."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.post("/v1/embeddings", input=RERANKED["text"])  # the text's vector is kept
        pipeline = world.registry.model("albef").pipeline
        self._batcher, begun, self._let_go = pipeline.batcher, threading.Event(), threading.Event()
        self._queued = threading.Semaphore(0)
        self.batches: list[tuple[str, int]] = []

        def work() -> tuple[None]:
            begun.set()
            assert self._let_go.wait(WAIT_S)
            return (None,)

        self._batcher.put(self._batcher.admit(1), "call", [(0, work)])
        assert begun.wait(WAIT_S)
        put, batch = self._batcher.put, pipeline.observer.batch

        def noticed_put(job: Any, kind: str, items: list[Any], *rest: Any) -> None:
            put(job, kind, items, *rest)
            for _ in items:
                self._queued.release()

        def noticed_batch(kind: str, size: int, *times: float) -> None:
            self.batches.append((kind, size))
            batch(kind, size, *times)

        monkeypatch.setattr(self._batcher, "put", noticed_put)
        monkeypatch.setattr(pipeline.observer, "batch", noticed_batch)

    def wait_for(self, count: int) -> None:
        """Until so many items more are in the queue."""
        for _ in range(count):
            assert self._queued.acquire(timeout=WAIT_S)

    def let_go(self) -> None:
        self._let_go.set()


def test_other_requests_come_between_the_pairs_of_a_reranking(dropping: World, monkeypatch):
    want = ids(dropping.post("/v1/search", **RERANKED))
    busy = Busy(dropping, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        search = pool.submit(dropping.post, "/v1/search", **RERANKED)
        busy.wait_for(COUNT)
        other = pool.submit(dropping.post, "/v1/embeddings", input="a dog")
        busy.wait_for(1)
        busy.let_go()
    assert ids(search.result()) == want
    assert other.result().status_code == 200
    assert busy.batches == [("call", 1), ("match", 5), ("text", 1), ("match", 5), ("match", 2)]


def test_a_reranking_that_nobody_waits_for_goes_no_further(dropping: World, monkeypatch):
    network, encoded, go_on = dropping.model.network, [], threading.Event()
    encode_states = network.encode_image_states

    def slow(pixels: Tensor) -> Any:
        encoded.append(len(pixels))
        assert go_on.wait(WAIT_S)
        return encode_states(pixels)

    monkeypatch.setattr(network, "encode_image_states", slow)
    in_time = {"X-Request-Timeout": "0.5"}
    search = dropping.client.post("/v1/search", json=RERANKED, headers=in_time)
    assert search.status_code == 504
    go_on.set()
    assert dropping.post("/v1/embeddings", input="a dog").status_code == 200
    assert encoded == [5]


def test_a_reranking_of_a_collection_that_was_dropped_meanwhile_is_a_404(
    dropping: World, monkeypatch
):
    busy = Busy(dropping, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(dropping.post, "/v1/search", **RERANKED)
        busy.wait_for(COUNT)
        assert dropping.client.delete("/v1/collections/toys").status_code == 200
        busy.let_go()
    check_refusal(search.result(), 404, "dropped")


def test_a_reranking_goes_on_with_the_model_it_began_with(dropping: World, monkeypatch):
    want = ids(dropping.post("/v1/search", **RERANKED))
    busy = Busy(dropping, monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(dropping.post, "/v1/search", **RERANKED)
        busy.wait_for(COUNT)
        assert dropping.post("/v1/models/albef:reload").status_code == 200
        busy.let_go()
    assert ids(search.result()) == want
    assert ids(dropping.post("/v1/search", **RERANKED)) == want


def test_only_texts_are_reranked_and_not_too_many(albef_world: World):
    one = albef_world.post("/v1/search", image=b64(albef_world.pictures[0]), rerank=True)
    check_refusal(one, 400, "ask by text alone")
    many = albef_world.post("/v1/search", batch=[{"text": "a"}] * 20, rerank=True, k_test=100)
    check_refusal(many, 400, "at most 256")


def test_a_model_that_cannot_match_says_so(world: World):
    response = world.post("/v1/search", text="a cat", rerank=True)
    check_refusal(response, 400, "only compares vectors")
    assert error(response)["code"] == "no_matching"


def test_a_hit_leads_to_its_picture_which_may_be_cached(world: World):
    hit = world.post("/v1/search", image=b64(world.pictures[3]), k=1).json()["hits"][0]
    picture = world.client.get(hit["image_url"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content == make_thumbnail(make_picture(seed=3))
    assert picture.headers["cache-control"] == "private, max-age=31536000, immutable"
    again = {"If-None-Match": picture.headers["etag"]}
    assert world.client.get(hit["image_url"], headers=again).status_code == 304
    unversioned = world.client.get(hit["image_url"].partition("?")[0])
    assert unversioned.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    ("filter", "word"),
    [
        ({"colour": {"near": "red"}}, "filter.colour: 'near' is not an operator"),
        ({"and": [{"n": {"lt": 3}}, {"n": {"lt": [1]}}]}, "filter.and[1].n.lt"),
        ({"n": {"in": 3}}, "filter.n.in is 3; it must be a list"),
        ({"or": {}}, "filter.or"),
    ],
)
def test_a_wrong_filter_is_named_by_its_place(world: World, filter, word):
    response = world.post("/v1/search", text="a", filter=filter)
    check_refusal(response, 400, word)
    assert error(response)["code"] == "invalid_filter"


def test_a_filter_of_numbers_on_a_field_of_texts_is_refused(own_world: World):
    item = {"id": "t", "text": "x", "metadata": {"price": "7"}}
    own_world.put("/v1/collections/toys/items", items=[item])
    response = own_world.post("/v1/search", text="a", filter={"price": {"lt": 9}})
    assert (response.status_code, error(response)["code"]) == (400, "invalid_filter")


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "exactly one"),
        ({"text": "a", "vector": [1.0]}, 400, "exactly one"),
        ({"text": "a", "queries": [{"text": "b"}]}, 400, "exactly one"),
        ({"queries": []}, 400, "0 were given"),
        ({"queries": [{"text": "a"}] * 65}, 400, "65 were given"),
        ({"queries": [{"text": "a"}, {"weight": 2}]}, 400, "queries[1] needs exactly one"),
        ({"queries": [{"text": "a", "weight": 0}]}, 400, "weight that is not 0"),
        ({"queries": [{"text": "a", "weight": 1e999}]}, 422, "weight"),
        ({"queries": [{"text": "a"}, {"text": "a", "weight": -1}]}, 400, "cancel each other"),
        ({"batch": []}, 400, "batch is empty"),
        ({"batch": [{"text": "a"}] * 11, "k": 900, "offset": 100}, 400, "are 11000; at most 10000"),
        ({"batch": [{"text": "a"}] * 11, "with_vectors": True, "k": 100}, 400, "are 1100 vectors"),
        ({"batch": [{"text": "a"}] * 257}, 400, "at most 256"),
        ({"batch": [{"text": "a"}], "text": "a"}, 400, "not both"),
        ({"batch": [{"text": "a"}, {"vector": [1.0]}]}, 400, "batch[1].vector has 1 numbers"),
        ({"batch": [{"queries": [{"text": "a"}] * 60}] * 5}, 400, "queries has 300 items"),
        ({"id": "nope"}, 404, "id is no item"),
        ({"queries": [{"text": "a"}, {"id": "nope"}]}, 404, "queries[1].id is no item"),
        ({"vector": [1.0, 2.0]}, 400, "2 numbers"),
        ({"vector": []}, 400, "0 numbers"),
        ({"vector": [0.0] * 16}, 400, "not all zero"),
        ({"vector": [float("nan")] * 16}, 400, "finite"),
        ({"vector": [1e999] * 16}, 400, "finite"),
        ({"vector": ["x"] * 16}, 422, "vector"),
        ({"text": "a", "k": 1001}, 422, "k"),
        ({"text": "a", "offset": -1}, 422, "offset"),
        ({"text": "a", "min_score": float("nan")}, 422, "min_score"),
        ({"text": "a", "deduplicate": 0}, 422, "deduplicate"),
        ({"text": "a", "field": "sound"}, 422, "field"),
        ({"text": "a", "filter": []}, 422, "filter"),
        ({"text": "a", "collection": "../toys"}, 404, "no such collection; GET /v1/coll"),
        ({"text": " "}, 400, "empty"),
        ({"text": "a" * 20_000}, 422, "20000 characters"),
        ({"image": "ftp://x/y.png"}, 400, "URL"),
        ({"image": "http://x/y.png"}, 400, "URL"),
    ],
)
def test_a_wrong_search_says_what_is_wrong(world: World, body, status, word):
    check_refusal(post_json(world, "/v1/search", body), status, word)


def test_json_in_a_form_must_be_json(world: World):
    form = {"text": "a", "filter": "{"}
    response = world.client.post("/v1/search", data=form, files={"x": ("", b"")})
    assert response.status_code == 422
    form = world.client.post(
        "/v1/search?text=a&filter={", content=b"x", headers={"Content-Type": "image/png"}
    )
    check_refusal(form, 422, "filter is not JSON")


def test_as_many_hits_as_one_request_may_have_are_given(world: World):
    for ask in ({"k": 1000, "offset": 9000}, {"k": 1000, "with_vectors": True}):
        assert world.post("/v1/search", text="a", **ask).status_code == 200


def test_an_answer_that_is_too_large_is_refused_before_it_is_read(
    own_world: World, monkeypatch: pytest.MonkeyPatch
):
    item = {"id": "large", "text": "a red heart", "metadata": {"x": "y" * 5000}}
    own_world.put("/v1/collections/toys/items", items=[item])
    monkeypatch.setattr(replies, "MAX_ANSWER_BYTES", 16_000)
    one = {"text": "a red heart", "field": "text", "k": 1}
    assert own_world.post("/v1/search", **one).status_code == 200
    batch = [{"text": "a"}] * 3
    assert own_world.post("/v1/search", batch=batch, field="text").status_code == 200
    apart = [{"id": f"toys/{i}"} for i in range(4)]  # which are searched for one after the other
    for queries in ([{"text": "a"}] * 4, apart):
        response = own_world.post("/v1/search", batch=queries, k=COUNT)
        check_refusal(response, 400, "at most 16000 are allowed: ask for less at once, by k")
        assert (error(response)["code"], error(response)["param"]) == ("answer_too_large", "k")
    collection = own_world.registry.collections["toys"].collection
    monkeypatch.setattr(collection, "items_of", None)
    assert own_world.post("/v1/search", batch=[{"text": "a"}] * 4).status_code == 400


def test_a_search_reads_the_collection_in_one_turn(world: World, monkeypatch):
    store, turns = world.registry._store, []
    submit = store.submit

    def noticed(*work: Any) -> Any:
        turns.append(work)
        return submit(*work)

    monkeypatch.setattr(store, "submit", noticed)
    ask = [{"id": "toys/1"}, {"text": "a cat"}]
    response = world.post("/v1/search", batch=ask, with_vectors=True, filter={"even": True})
    assert response.status_code == 200
    assert len(turns) == 1


def test_what_is_found_counts_as_in_flight(tmp_path: Path, model_dir: Path):
    settings = load_settings(max_inflight_bytes=100_000, rebuild_indexes=False)
    with serving(tmp_path, model_dir, settings) as world:
        large = [{"id": f"large {i}", "text": "a", "metadata": {"x": "y" * 9000}} for i in range(3)]
        world.put("/v1/collections/toys/items", items=large)
        ask = {"text": "a", "field": "text"}
        assert world.post("/v1/search", **ask, k=2).status_code == 200
        for too_much in ({"k": 3}, {"k": 150}):
            response = world.post("/v1/search", **ask, **too_much)
            check_refusal(response, 429, "ask for less at once")
        told = world.client.get("/metrics").text
        assert "clipserve_inflight_bytes 0.0" in told
