"""text-embeddings-inference's /embed and /info."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toys, b64, toys


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("tei"), model_dir) as found:
        yield found


def test_the_answer_is_a_bare_list_of_vectors(world: Toys):
    answer = world.post("/embed", inputs=["a cat", "a dog"])
    np.testing.assert_allclose(answer.json(), world.texts("a cat", "a dog"), atol=1e-5)
    assert answer.headers["x-clipserve-model"] == "tiny"
    assert np.shape(world.post("/embed", inputs="a cat").json()) == (1, 16)
    cut = world.post("/embed", inputs=["a cat", "a dog " * 50])
    assert cut.headers["x-clipserve-truncated"] == "inputs[1]"


def test_pictures_are_inputs_too(world: Toys):
    found = world.post("/embed", inputs=[{"image": b64(world.pictures[1])}]).json()
    np.testing.assert_allclose(found, world.vectors[1:2], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [""]}, "inputs[0]"),
        ({"inputs": [[1, 2]]}, "inputs[0]"),
        ({"inputs": ["a"], "normalize": False}, "normalize"),
        ({"inputs": ["a"], "dimensions": 4}, "dimensions"),
        ({"inputs": ["long " * 50], "truncate": False}, "inputs[0]"),
    ],
)
def test_what_cannot_be_embedded_is_named(world: Toys, body: dict[str, Any], param: str):
    refused = world.post("/embed", **body)
    assert refused.status_code == 400
    assert world.error(refused)["param"] == param


def test_info_names_the_model_and_its_limits(world: Toys, monkeypatch: pytest.MonkeyPatch):
    info = world.client.get("/info").json()
    assert (info["model_id"], info["model_sha"]) == ("tiny", world.model.info.fingerprint)
    assert (info["max_input_length"], info["model_dtype"]) == (16, "float32")
    assert info["max_client_batch_size"] == world.registry.settings.max_items
    monkeypatch.setattr("service.compat.tei.precision", lambda model: "int8")
    assert world.client.get("/info").json()["model_dtype"] == "int8"
