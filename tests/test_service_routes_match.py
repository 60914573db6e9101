"""POST /v1/match."""

from collections.abc import Iterator

import numpy as np
import pytest
from albefs import tiny_albef
from conftest import encode, make_picture
from served import World, b64, check_refusal, error, serving

from clipserve import checkpoint
from service.settings import load_settings

TEXTS = ["a red cat on a mat", "two dogs in a house", "the blue bird sings"]


@pytest.fixture(scope="module")
def albef_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("albef")
    model = tiny_albef(folder / "vocabulary")
    checkpoint.save(model, folder / "albef", name="albef", objective=("matching",))
    with serving(folder, folder / "albef", load_settings()) as world:
        yield world


def test_pairs_have_the_probabilities_of_the_models_own_head(albef_world: World):
    images = [encode(make_picture(seed=i)) for i in range(3)]
    body = albef_world.post("/v1/match", images=[b64(i) for i in images], texts=TEXTS).json()
    want = albef_world.model.match(images, TEXTS)
    assert [(one["image"], one["text"]) for one in body["results"]] == [(0, 0), (1, 1), (2, 2)]
    got = [one["probability"] for one in body["results"]]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert body["model"] == "albef"


def test_one_picture_goes_with_each_text_and_one_text_with_each_picture(albef_world: World):
    pictures = albef_world.pictures[:3]
    body = albef_world.post("/v1/match", images=[b64(pictures[0])], texts=TEXTS).json()
    want = albef_world.model.match([pictures[0]] * 3, TEXTS)
    np.testing.assert_allclose([r["probability"] for r in body["results"]], want, atol=1e-5)
    assert [one["image"] for one in body["results"]] == [0, 0, 0]
    files = [("files", ("a.png", picture)) for picture in pictures]
    body = albef_world.client.post("/v1/match", files=files, data={"texts": TEXTS[0]}).json()
    want = albef_world.model.match(pictures, [TEXTS[0]] * 3)
    np.testing.assert_allclose([r["probability"] for r in body["results"]], want, atol=1e-5)


def test_a_pair_that_cannot_be_read_has_an_error(albef_world: World):
    images = [b64(albef_world.pictures[0]), b64(b"no picture")]
    body = albef_world.post("/v1/match", images=images, texts=TEXTS[:2]).json()
    assert ["probability" in one for one in body["results"]] == [True, False]
    assert body["results"][1]["error"]["code"] == "invalid_image"
    failed = albef_world.post("/v1/match", images=images[1:], texts=TEXTS[:1])
    assert (failed.status_code, error(failed)["param"]) == (422, "images[0]")


def test_a_text_that_does_not_fit_is_told_with_its_pair(albef_world: World):
    texts = ["a red cat", "a red cat " * 200]
    body = albef_world.post("/v1/match", images=[b64(albef_world.pictures[0])], texts=texts).json()
    assert [one["truncated"] for one in body["results"]] == [False, True]


def test_a_model_that_only_compares_vectors_says_so(world: World):
    response = world.post("/v1/match", images=[b64(world.pictures[0])], texts=["a cat"])
    assert (response.status_code, error(response)["code"]) == (400, "no_matching")


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"images": []}, 400, "images is empty"),
        ({"texts": []}, 400, "texts is empty"),
        ({"texts": None}, 400, "texts is empty"),
        ({"images": ["eHh4"] * 2, "texts": ["a"] * 3}, 400, "make no pairs"),
        ({"texts": ["a"] * 257}, 400, "at most 256"),
        ({"texts": ["a", " "]}, 400, "texts[1] is empty"),
        ({"images": ["file:///etc/passwd"]}, 400, "URL"),
        ({"pairs": []}, 422, "does not know"),
    ],
)
def test_a_wrong_match_says_what_is_wrong(albef_world: World, change, status, word):
    body = {"images": [b64(albef_world.pictures[0])], "texts": ["a cat"]} | change
    check_refusal(albef_world.client.post("/v1/match", json=body), status, word)
