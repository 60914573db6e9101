"""clip-retrieval's back end: /knn-service, /indices-list, /metadata."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import Toys, b64, toys

from service import replies

DEFAULTS = {
    "text": None,
    "image": None,
    "image_url": None,
    "embedding_input": None,
    "deduplicate": False,
    "use_safety_model": True,
    "use_violence_detector": True,
    "indice_name": "toys",
    "use_mclip": False,
    "aesthetic_score": 9,
    "aesthetic_weight": 0.5,
    "modality": "image",
    "num_images": 3,
    "num_result_ids": 3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("knn"), model_dir) as found:
        yield found


def ask(world: Toys, **changes: Any) -> Any:
    """As ClipClient does: JSON without a Content-Type."""
    return world.client.post("/knn-service", content=json.dumps(DEFAULTS | changes))


def test_a_picture_finds_itself(world: Toys):
    hits = ask(world, image=b64(world.pictures[3])).json()
    assert hits[0]["id"] == "toy/3"
    assert hits[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert (hits[0]["caption"], hits[0]["n"]) == ("toy 3", 3)
    assert len(hits) == 3


def test_a_text_is_searched_for(world: Toys):
    answer = ask(world, text="a red heart", num_images=6, num_result_ids=6)
    expected = world.vectors @ world.texts("a red heart")[0]
    assert [hit["similarity"] for hit in answer.json()] == pytest.approx(
        sorted(expected, reverse=True), abs=1e-5
    )
    assert answer.headers["x-clipserve-fingerprint"] == world.model.info.fingerprint


def test_a_text_that_was_cut_is_named_in_a_header(world: Toys):
    assert ask(world, text="long " * 50).headers["x-clipserve-truncated"] == "text"
    assert "x-clipserve-truncated" not in ask(world, text="short").headers


def test_a_vector_is_searched_for(world: Toys):
    vector = (3 * world.vectors[4]).tolist()
    assert ask(world, embedding_input=vector).json()[0]["id"] == "toy/4"


def test_the_other_modality_searches_the_items_texts(world: Toys):
    item = {"id": "written", "text": "a blue whale"}
    assert world.client.put("/v1/collections/toys/items", json={"items": [item]}).is_success
    try:
        (hit,) = ask(world, text="a blue whale", modality="text").json()
        assert (hit["id"], hit["similarity"]) == ("written", pytest.approx(1, abs=1e-5))
    finally:
        world.client.delete("/v1/collections/toys/items/written")


def test_a_hit_shows_where_its_picture_is(world: Toys):
    hit = ask(world, image=b64(world.pictures[3])).json()[0]
    found = world.client.get(hit["url"])
    assert found.headers["content-type"] == "image/jpeg"
    assert base64.b64decode(hit["image"]) == found.content


def test_behind_the_first_come_ids_alone(world: Toys):
    hits = ask(world, text="a cat", num_images=1, num_result_ids=4).json()
    assert "caption" in hits[0]
    assert [sorted(hit) for hit in hits[1:]] == [["id", "similarity"]] * 3


def test_what_is_alike_is_shown_once(world: Toys):
    image = b64(world.pictures[1])
    both = [hit["id"] for hit in ask(world, image=image).json()]
    assert {"toy/0", "toy/1"} <= set(both)
    once = [hit["id"] for hit in ask(world, image=image, deduplicate=True).json()]
    assert len({"toy/0", "toy/1"} & set(once)) == 1


def test_the_collections_are_listed(world: Toys):
    assert world.client.get("/indices-list").json() == ["toys"]


def test_metadata_is_given_by_id(world: Toys):
    found = world.post("/metadata", ids=["toy/5", "gone", "toy/2"], indice_name="toys").json()
    assert [(one["id"], one["metadata"]["n"]) for one in found] == [("toy/5", 5), ("toy/2", 2)]
    assert found[0]["metadata"]["caption"] == "toy 5"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({}, 400, None),
        ({"text": "a", "image": "b"}, 400, None),
        ({"text": ""}, 400, None),
        ({"image": "????"}, 400, "image"),
        ({"image": "/etc/passwd"}, 400, "image"),
        ({"image_url": "http://127.0.0.1/a.jpg"}, 400, "image_url"),
        ({"image_url": "file:///etc/passwd"}, 400, "image_url"),
        ({"embedding_input": [1.0]}, 400, "embedding_input"),
        ({"embedding_input": [0.0] * 16}, 400, "embedding_input"),
        ({"text": "a", "indice_name": "none"}, 404, "collection"),
        ({"text": "a", "modality": "audio"}, 422, "modality"),
        ({"text": "a", "num_images": 0}, 422, "num_images"),
        ({"text": "a", "num_result_ids": 10_001}, 422, "num_result_ids"),
    ],
)
def test_what_cannot_be_searched_for_is_named(
    world: Toys, change: dict[str, Any], status: int, param: str | None
):
    refused = ask(world, **change)
    assert refused.status_code == status
    assert world.error(refused)["param"] == param


def test_a_body_that_is_not_json_is_an_error(world: Toys):
    for path in ("/knn-service", "/metadata"):
        refused = world.client.post(path, content=b"not json")
        assert refused.status_code == 400
        assert world.error(refused)["code"] == "invalid_json"


def test_an_answer_that_is_too_large_is_refused(world: Toys, monkeypatch: pytest.MonkeyPatch):
    six = {"text": "a", "num_images": 6, "num_result_ids": 6}
    pictures = sum(len(base64.b64decode(hit["image"])) for hit in ask(world, **six).json())
    monkeypatch.setattr(replies, "MAX_ANSWER_BYTES", pictures - 1)
    assert ask(world, text="a", num_images=1).status_code == 200
    refused = ask(world, **six)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "answer_too_large")
    monkeypatch.setattr(replies, "MAX_ANSWER_BYTES", 40)
    ids = ["toy/1"]
    assert world.client.post("/metadata", json={"ids": ids}).status_code == 200
    refused = world.client.post("/metadata", json={"ids": ids * 20})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "ids")


def test_pictures_that_are_found_count_as_in_flight(tmp_path: Path, model_dir: Path):
    with toys(tmp_path, model_dir, max_inflight_bytes=20_000) as small:
        six = {"text": "a", "num_images": 6, "num_result_ids": 6}
        assert ask(small, **six | {"num_images": 1}).status_code == 200
        assert ask(small, **six).status_code == 429
        assert "clipserve_inflight_bytes 0.0" in small.client.get("/metrics").text
