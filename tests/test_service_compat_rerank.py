"""/rerank and /v1/rerank, in the shapes of Infinity, Cohere v1, Jina and TEI."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from albefs import tiny_albef
from starlette.testclient import TestClient
from toys import Toys, data_uri, toys

from clipserve import checkpoint
from service.app import create_app
from service.registry import Registry
from service.settings import load_settings

DOCUMENTS = ["a cat", "a dog", "a red heart", "something else"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("rerank"), model_dir) as found:
        yield found


def cosines(world: Toys, query: str) -> np.ndarray:
    return world.texts(*DOCUMENTS) @ world.texts(query)[0]


def scores_by_index(results: Any, name: str = "relevance_score") -> list[float]:
    return [one[name] for one in sorted(results, key=lambda one: one["index"])]


def test_documents_are_ordered_by_cosine(world: Toys):
    body = world.post("/rerank", model="tiny", query="a small cat", documents=DOCUMENTS).json()
    scores = [one["relevance_score"] for one in body["results"]]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(
        scores_by_index(body["results"]), cosines(world, "a small cat"), atol=1e-5
    )
    assert (body["score"], body["model"]) == ("cosine", "tiny")
    assert body["usage"]["total_tokens"] > 0


def test_pictures_are_documents_and_queries(world: Toys):
    documents = [data_uri(world.pictures[2]), {"text": "a cat"}, {"image": data_uri(b"")[:0]}]
    query = {"image": data_uri(world.pictures[3])}
    body = world.post("/rerank", query=query, documents=documents[:2]).json()
    rows = np.stack([world.vectors[2], world.texts("a cat")[0]])
    np.testing.assert_allclose(scores_by_index(body["results"]), rows @ world.vectors[3], atol=1e-5)
    refused = world.post("/rerank", query=query, documents=documents)
    assert world.error(refused)["param"] == "documents[2].image"


def test_the_best_few_come_back_as_they_were_sent(world: Toys):
    body = {"query": "a cat", "documents": DOCUMENTS, "top_n": 2, "return_documents": True}
    infinity = world.post("/rerank", **body).json()["results"]
    assert infinity[0]["document"] == "a cat"
    assert len(infinity) == 2
    assert world.post("/v1/rerank", **body).json()["results"][0]["document"] == {"text": "a cat"}
    picture = {"image": data_uri(world.pictures[0])}
    answer = world.post("/v1/rerank", query="a", documents=[picture], return_documents=True)
    assert answer.json()["results"][0]["document"] == picture


def test_texts_in_the_place_of_documents_are_answered_as_tei_does(world: Toys):
    answer = world.post("/rerank", query="a cat", texts=DOCUMENTS, return_text=True)
    results = answer.json()
    assert results[0]["text"] == "a cat"
    np.testing.assert_allclose(
        scores_by_index(results, "score"), cosines(world, "a cat"), atol=1e-5
    )
    assert answer.headers["x-clipserve-fingerprint"] == world.model.info.fingerprint


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": ["x"] * 257}, "documents"),
        ({"documents": ["fine", ""]}, "documents[1]"),
        ({"documents": [["token"]]}, "documents[0]"),
        ({"documents": ["fine", data_uri(b"broken")]}, "documents[1]"),
        ({"query": ""}, "query"),
        ({"query": 3}, "query"),
        ({"query": {"image": "http://127.0.0.1/a.png"}}, "query.image"),
        ({"top_n": 0}, "top_n"),
        ({"model": "none"}, "model"),
    ],
)
def test_what_cannot_be_ordered_is_named(world: Toys, change: dict[str, Any], param: str):
    refused = world.post("/v1/rerank", **({"query": "a", "documents": DOCUMENTS} | change))
    assert 400 <= refused.status_code < 500
    assert world.error(refused)["param"] == param


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service whose model reads pictures and texts together."""
    folder = tmp_path_factory.mktemp("albef")
    checkpoint.save(
        tiny_albef(folder), folder / "reader", name="reader", objective=("contrastive", "matching")
    )
    registry = Registry(load_settings(decode_threads=1))
    registry.add_model(checkpoint.load(folder / "reader", device="cpu", dtype="fp32"))
    app = create_app(registry.settings, registry)
    with TestClient(app, base_url="http://localhost") as client:
        yield client
    registry.close()


def test_a_model_that_matches_reads_pictures_and_texts_together(reader: TestClient, world: Toys):
    registry: Registry = reader.app.state.registry  # type: ignore[attr-defined]
    model = registry.models["reader"].model
    pictures = world.pictures[:3]
    text = "a red cat"
    documents = [data_uri(picture) for picture in pictures]
    body = reader.post("/rerank", json={"query": text, "documents": documents}).json()
    assert body["score"] == "matching"
    expected = model.match(pictures, [text] * 3)
    np.testing.assert_allclose(scores_by_index(body["results"]), expected, atol=1e-4)

    texts = ["a red cat", "two dogs"]
    query = {"image": documents[0]}
    body = reader.post("/v1/rerank", json={"query": query, "documents": texts}).json()
    expected = model.match([pictures[0]] * 2, texts)
    np.testing.assert_allclose(scores_by_index(body["results"]), expected, atol=1e-4)


def test_it_compares_texts_with_texts_by_cosine(reader: TestClient):
    given = {"query": "a red cat", "documents": ["two dogs", "a cat"]}
    assert reader.post("/rerank", json=given).json()["score"] == "cosine"


LONG = "a red cat " * 200


def test_texts_that_did_not_fit_are_named(reader: TestClient, world: Toys):
    body = world.post("/rerank", query=LONG, documents=["a cat", LONG]).json()
    assert body["truncated"] == ["query", "documents[1]"]
    picture = data_uri(world.pictures[0])
    body = reader.post("/v1/rerank", json={"query": LONG, "documents": [picture] * 2}).json()
    assert body["truncated"] == ["query"]
    given = {"query": {"image": picture}, "documents": ["a cat", LONG]}
    assert reader.post("/v2/rerank", json=given | {"query": "a cat"}).json()["truncated"] == [
        "documents[1]"
    ]
    assert reader.post("/v1/rerank", json=given).json()["truncated"] == ["documents[1]"]
    answer = world.post("/rerank", query="a cat", texts=["a cat", LONG])
    assert answer.headers["x-clipserve-truncated"] == "texts[1]"
    answer = world.post("/rerank", query="a cat", texts=["a cat"])
    assert "x-clipserve-truncated" not in answer.headers


def test_a_pair_that_cannot_be_read_is_named(reader: TestClient, world: Toys):
    documents = [data_uri(world.pictures[0]), data_uri(b"broken")]
    refused = reader.post("/rerank", json={"query": "a cat", "documents": documents})
    assert refused.status_code == 422
    assert world.error(refused)["param"] == "documents[1]"
    query = {"image": data_uri(b"broken")}
    refused = reader.post("/rerank", json={"query": query, "documents": ["a cat"]})
    assert world.error(refused)["param"] == "query"
