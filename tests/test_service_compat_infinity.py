"""Infinity's routes at the root."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toys import Toys, b64, data_uri, from_b64, toys


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("infinity"), model_dir) as found:
        yield found


def test_embeddings_are_at_the_root_too(world: Toys):
    body = {"model": "tiny", "input": ["a cat", "a dog"]}
    found = world.post("/embeddings", **body).json()
    assert found == world.post("/v1/embeddings", **body).json()
    got = np.array([one["embedding"] for one in found["data"]])
    np.testing.assert_allclose(got, world.texts("a cat", "a dog"), atol=1e-5)


def test_a_modality_makes_data_uris_pictures(world: Toys):
    uris = [data_uri(picture) for picture in world.pictures]
    found = world.post("/embeddings", input=uris, modality="image", encoding_format="base64")
    got = from_b64([one["embedding"] for one in found.json()["data"]])
    np.testing.assert_allclose(got, world.vectors, atol=1e-5)


def test_a_modality_that_is_not_here_is_an_error(world: Toys):
    refused = world.post("/embeddings", input=["data:audio/wav;base64,AA"], modality="audio")
    assert refused.status_code == 422
    assert world.error(refused)["param"] == "modality"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_older_route_takes_pictures_alone(world: Toys, encoding: str):
    given = [data_uri(world.pictures[0]), b64(world.pictures[2])]
    found = world.post("/embeddings_image", model="tiny", input=given, encoding_format=encoding)
    values = [one["embedding"] for one in found.json()["data"]]
    got = from_b64(values) if encoding == "base64" else np.array(values)
    np.testing.assert_allclose(got, world.vectors[[0, 2]], atol=1e-5)


def test_a_bad_picture_is_named_by_its_place(world: Toys):
    given = [data_uri(world.pictures[0]), data_uri(b"no picture")]
    refused = world.post("/embeddings_image", input=given)
    assert refused.status_code == 422
    assert world.error(refused)["param"] == "input[1]"


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.jpg", "file:///etc/passwd", "/etc/passwd"])
def test_nothing_is_fetched_and_no_file_is_read(world: Toys, url: str):
    for path in ("/embeddings", "/embeddings_image"):
        refused = world.post(path, input=[url], modality="image")
        assert refused.status_code in (400, 422)
        assert world.error(refused)["code"] in ("url_not_allowed", "invalid_base64")


def test_models_tell_how_much_is_waiting(world: Toys):
    (model,) = world.client.get("/models").json()["data"]
    assert (model["id"], model["owned_by"]) == ("tiny", "infinity")
    assert model["stats"] == {
        "queue_fraction": 0.0,
        "queue_absolute": 0,
        "results_pending": 0,
        "batch_size": world.registry.settings.max_image_batch,
    }
