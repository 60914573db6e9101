"""clip-as-service's POST /post."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toys, b64, data_uri, toys


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("jina"), model_dir) as found:
        yield found


def test_texts_blobs_and_data_uris_are_encoded(world: Toys):
    data = [
        {"id": "t", "text": "a cat"},
        {"id": "b", "blob": b64(world.pictures[2])},
        {"id": "u", "uri": data_uri(world.pictures[3]), "text": ""},
    ]
    answer = world.post("/post", data=data, execEndpoint="/")
    body = answer.json()
    assert sorted(body) == ["data", "header", "parameters", "routes"]  # and no other, for jina
    assert answer.headers["x-clipserve-fingerprint"] == world.model.info.fingerprint
    assert [one["id"] for one in body["data"]] == ["t", "b", "u"]
    got = np.array([one["embedding"] for one in body["data"]])
    expected = np.stack([world.texts("a cat")[0], world.vectors[2], world.vectors[3]])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_texts_that_were_cut_are_named_in_a_header(world: Toys):
    matches = [{"text": "long " * 50}, {"text": "b"}]
    data = [{"text": "a", "matches": matches}, {"text": "long " * 50, "matches": matches[1:]}]
    answer = world.post("/post", data=data, execEndpoint="/rank")
    assert answer.headers["x-clipserve-truncated"] == "data[0].matches[0].text,data[1].text"
    whole = world.post("/post", data=data[:1], execEndpoint="/")
    assert "x-clipserve-truncated" not in whole.headers


def test_the_endpoint_may_be_in_the_header_and_name_a_model(world: Toys):
    header = {"request_id": "r1", "exec_endpoint": "/encode/tiny"}
    body = world.post("/post", data=[{"text": "a cat"}], header=header).json()
    assert body["header"] == {"requestId": "r1", "status": None}
    assert body["data"][0]["id"]
    parameters = {"model_name": "none"}
    refused = world.post("/post", data=[{"text": "a"}], parameters=parameters)
    assert (refused.status_code, world.error(refused)["code"]) == (404, "model_not_found")


def test_matches_are_ranked_with_the_models_own_temperature(world: Toys):
    labels = ["a cat", "a dog", "a red heart"]
    matches = [{"id": str(i), "text": text, "blob": ""} for i, text in enumerate(labels)]
    data = [{"id": "p", "blob": b64(world.pictures[2]), "matches": matches}]
    body = world.post("/post", data=data, exec_endpoint="/rank").json()
    (document,) = body["data"]
    ranked = document["matches"]
    cosines = world.texts(*labels) @ world.vectors[2]
    order = np.argsort(-cosines)
    assert [match["id"] for match in ranked] == [str(i) for i in order]
    assert ranked[0]["text"] == labels[order[0]]
    assert "blob" not in ranked[0]
    got = {m["id"]: m["scores"] for m in ranked}
    logits = world.model.logit_scale.item() * cosines
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for index in range(3):
        scores = got[str(index)]
        assert scores["clip_score_cosine"]["value"] == pytest.approx(cosines[index], abs=1e-5)
        assert scores["clip_score"]["value"] == pytest.approx(expected[index], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"data": []}, 422, "data"),
        ({"data": [{"id": "x"}]}, 400, "data[0]"),
        ({"data": [{"text": "a"}, {"tensor": [1, 2]}]}, 400, "data[1]"),
        ({"data": [{"text": "a"}] * 257}, 400, "data"),
        ({"data": [{"uri": "/etc/passwd"}]}, 400, "data[0].uri"),
        ({"data": [{"uri": "file:///etc/passwd"}]}, 400, "data[0].uri"),
        ({"data": [{"uri": "http://127.0.0.1/a.jpg"}]}, 400, "data[0].uri"),
        ({"data": [{"blob": "????"}]}, 400, "data[0].blob"),
        ({"data": [{"text": "a"}], "execEndpoint": "/search"}, 404, "execEndpoint"),
        ({"data": [{"text": "a"}], "execEndpoint": "/rank"}, 400, "data[0].matches"),
        (
            {"data": [{"text": "a", "matches": [{"text": "b"}, 3]}], "execEndpoint": "/rank"},
            400,
            "data[0].matches[1]",
        ),
    ],
)
def test_what_cannot_be_read_is_named(world: Toys, body: dict[str, Any], status: int, param: str):
    refused = world.post("/post", **body)
    assert refused.status_code == status
    assert world.error(refused)["param"] == param
