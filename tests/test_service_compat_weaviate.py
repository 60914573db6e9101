"""The routes that Weaviate's multi2vec-clip asks for, with the bodies its client sends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toys, b64, toys


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("weaviate"), model_dir) as found:
        yield found


def test_texts_and_pictures_have_lists_of_their_own(world: Toys):
    pictures = [b64(picture) for picture in world.pictures[:2]]
    answer = world.post("/vectorize", texts=["a cat", "a dog"], images=pictures).json()
    np.testing.assert_allclose(answer["textVectors"], world.texts("a cat", "a dog"), atol=1e-5)
    np.testing.assert_allclose(answer["imageVectors"], world.vectors[:2], atol=1e-5)


def test_texts_that_were_cut_are_named(world: Toys):
    body = world.post(
        "/vectorize", texts=["a", "long " * 50], images=[b64(world.pictures[0])]
    ).json()
    assert body["truncated"] == ["texts[1]"]


def test_null_is_none(world: Toys):
    answer = world.post("/vectorize", texts=["a cat"], images=None).json()
    assert (len(answer["textVectors"]), answer["imageVectors"]) == (1, [])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"texts": None, "images": None}, "texts"),
        ({"texts": ["a", " "]}, "texts[1]"),
        ({"texts": ["a"], "images": ["file:///etc/passwd"]}, "images[0]"),
        ({"texts": ["a"] * 200, "images": ["x"] * 200}, "texts and images"),
    ],
)
def test_what_cannot_be_embedded_is_named(world: Toys, body: dict[str, Any], param: str):
    refused = world.post("/vectorize", **body)
    assert refused.status_code == 400
    assert world.error(refused)["param"] == param


def test_the_probes_answer_without_a_body(world: Toys):
    for name in ("live", "ready"):
        for method in ("GET", "HEAD"):
            answer = world.client.request(method, f"/.well-known/{name}")
            assert (answer.status_code, answer.content) == (204, b"")
    assert world.client.get("/meta").json()["model"] == "tiny"


def test_it_is_not_ready_when_the_service_is_not(world: Toys):
    lifecycle = world.client.app.state.readiness._lifecycle  # type: ignore[attr-defined]
    lifecycle.phase = "draining"
    try:
        assert world.client.get("/.well-known/ready").status_code == 503
        assert world.client.get("/.well-known/live").status_code == 204
    finally:
        lifecycle.phase = "serving"
