"""/v1/models, and taking a new checkpoint in."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_architecture
from served import World, check_refusal, error, serving

from clipserve import checkpoint
from clipserve.embed import describe_precision
from clipserve.model import create
from service.settings import load_settings


def save(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = create(tiny_architecture())
    checkpoint.save(model, folder, name="tiny", objective=("contrastive",))
    return folder


def test_models_are_told_in_the_shape_of_openai(world: World):
    body = world.get("/v1/models").json()
    (listed,) = body["data"]
    fingerprint = world.model.info.fingerprint
    assert (listed["id"], listed["object"], listed["owned_by"]) == ("tiny", "model", "clipserve")
    assert (listed["fingerprint"], listed["embed_dim"]) == (fingerprint, 16)
    assert (listed["can_match"], listed["multi_label"]) == (False, False)
    assert listed["precision"] == describe_precision(world.model)
    assert listed["created"] > 1_600_000_000
    assert "openai" in body["template_sets"]
    one = world.get("/v1/models/tiny").json()
    assert {name: one[name] for name in listed} == listed
    check_refusal(world.get("/v1/models/nope"), 404, "served here: tiny")


def test_a_new_checkpoint_is_taken_in_and_the_collection_stays_stale(tmp_path: Path):
    place = save(tmp_path / "models" / "one", 0)
    save(tmp_path / "models" / "two", 1)
    settings = load_settings(model_roots=[tmp_path / "models"])
    with serving(tmp_path, place, settings) as world:
        old = world.get("/v1/models/tiny").json()["fingerprint"]
        body = world.post("/v1/models/tiny:reload", path=str(tmp_path / "models" / "two")).json()
        assert (body["old_fingerprint"], body["collections_stale"]) == (old, ["toys"])
        assert body["fingerprint"] == body["new_fingerprint"] != old
        assert world.post("/v1/embeddings", input="x").json()["fingerprint"] != old
        found = world.post("/v1/search", text="a cat").json()
        assert (found["fingerprint"], found["stale"]) == (old, True)
        assert world.get("/v1/collections/toys").json()["stale"] is True


def test_the_same_checkpoint_is_read_again_without_a_path(tmp_path: Path):
    with serving(tmp_path, save(tmp_path / "model", 0), load_settings()) as world:
        answer = world.client.post("/v1/models/tiny:reload")
        assert answer.status_code == 200
        assert answer.json()["collections_kept"] == ["toys"]
        assert answer.json()["old_fingerprint"] == answer.json()["new_fingerprint"]


def test_a_model_comes_from_below_the_allowed_folders_alone(tmp_path: Path):
    root = tmp_path / "models"
    place = save(root / "one", 0)
    outside = save(tmp_path / "outside", 1)
    (root / "link").symlink_to(outside)
    with serving(tmp_path, place, load_settings(model_roots=[root])) as world:
        elsewhere = [str(outside), str(root / "link"), str(root / ".." / "outside"), "outside"]
        for path in elsewhere:
            response = world.post("/v1/models/tiny:reload", path=path)
            check_refusal(response, 403, "CLIPSERVE_MODEL_ROOTS")
            assert str(tmp_path) not in response.text
        check_refusal(world.post("/v1/models/tiny:reload", path="a\0b"), 400, "path")
        missing = world.post("/v1/models/tiny:reload", path=str(root / "none"))
        assert (missing.status_code, error(missing)["code"]) == (422, "invalid_checkpoint")
        assert str(tmp_path) not in missing.text
        assert world.post("/v1/embeddings", input="x").status_code == 200


def test_without_allowed_folders_no_path_is_taken(world: World):
    response = world.post("/v1/models/tiny:reload", path="/tmp/model")
    check_refusal(response, 403, "takes no path")
    check_refusal(world.client.post("/v1/models/nope:reload"), 404, "no such model")


@pytest.mark.parametrize("body", [{"paths": "x"}, {"path": 3}, []])
def test_a_wrong_reload_says_what_is_wrong(world: World, body):
    assert world.client.post("/v1/models/tiny:reload", json=body).status_code == 422
