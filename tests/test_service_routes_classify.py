"""POST /v1/classify and GET /v1/label-sets."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_architecture
from served import LABELS, World, b64, check_refusal, error, serving

from clipserve import checkpoint
from clipserve.model import create
from service.errors import RequestError
from service.inputs import Text
from service.routes import classify
from service.settings import load_settings


@pytest.fixture(scope="module")
def sigmoid_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Of a model with a logit bias, as SigLIP's, and with stored label sets."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sigmoid")
    model = create({**tiny_architecture(), "init_logit_bias": -1.0})
    checkpoint.save(model, folder / "tiny", name="tiny", objective=("sigmoid",))
    (folder / "sets.json").write_text('{"animals": ["cat", " dog "], "colours": ["red"]}')
    settings = load_settings(label_sets=folder / "sets.json")
    with serving(folder, folder / "tiny", settings) as world:
        yield world


@pytest.mark.parametrize("templates", ["none", "simple", ["a {}", "the {c}"]])
def test_probabilities_are_those_of_the_models_own_head(world: World, templates):
    images = [b64(picture) for picture in world.pictures[:4]]
    body = world.post("/v1/classify", images=images, labels=LABELS, templates=templates).json()
    want = world.model.zero_shot(LABELS, templates).classify(world.pictures[:4])
    for result, row in zip(body["results"], want, strict=True):
        found = result["predictions"]
        assert [p["label"] for p in found] == [LABELS[c] for c in np.argsort(-row)]
        np.testing.assert_allclose([p["probability"] for p in found], -np.sort(-row), atol=1e-5)
    assert body["activation"] == "softmax"


def test_a_form_classifies_files(world: World):
    files = [("files", ("a.png", picture)) for picture in world.pictures[:2]]
    form = {"labels": "cat, dog,red heart", "templates": "simple", "top_k": "2"}
    results = world.client.post("/v1/classify", files=files, data=form).json()["results"]
    want = world.model.zero_shot(LABELS, "simple").classify(world.pictures[:2])
    assert [len(result["predictions"]) for result in results] == [2, 2]
    top = [result["predictions"][0]["probability"] for result in results]
    np.testing.assert_allclose(top, want.max(axis=1), atol=1e-5)
    repeated = {"labels": ["cat, small", "dog"]}
    results = world.client.post("/v1/classify", files=files[:1], data=repeated).json()["results"]
    assert {p["label"] for p in results[0]["predictions"]} == {"cat, small", "dog"}


def test_a_picture_as_the_body_takes_its_labels_from_the_query(world: World):
    query = [("labels", "cat"), ("labels", "dog"), ("templates", "a {}"), ("templates", "the {}")]
    answer = world.client.post(
        "/v1/classify",
        params=[*query, ("top_k", "1")],
        content=world.pictures[0],
        headers={"Content-Type": "image/png"},
    )
    want = world.model.zero_shot(["cat", "dog"], ["a {}", "the {}"]).classify(world.pictures[:1])
    (best,) = answer.json()["results"][0]["predictions"]
    assert best["probability"] == pytest.approx(want.max(), abs=1e-5)


def test_texts_are_classified_like_pictures(world: World):
    texts = ["a cat", "a dog " * 50]
    body = world.post("/v1/classify", texts=texts, labels=LABELS).json()
    head = world.model.zero_shot(LABELS)
    want = head.probabilities(world.model.embed_texts(texts))
    for result, row in zip(body["results"], want, strict=True):
        top = result["predictions"][0]
        assert top["label_index"] == row.argmax()
        assert top["probability"] == pytest.approx(row.max(), abs=1e-5)
    assert [result["truncated"] for result in body["results"]] == [False, True]


def test_labels_that_do_not_fit_are_told_also_from_the_cache(world: World):
    labels = ["cat", "a dog " * 20, "red heart"]
    for _ in range(2):
        body = world.post("/v1/classify", texts=["a cat"], labels=labels, templates="simple").json()
        assert body["truncated_labels"] == [1]
    assert world.post("/v1/classify", texts=["a"], labels=LABELS).json()["truncated_labels"] == []


def test_temperature_divides_the_logits(world: World):
    images = [b64(world.pictures[0])]
    body = world.post("/v1/classify", images=images, labels=LABELS, temperature=2).json()
    head = world.model.zero_shot(LABELS)
    logits = head.logit_scale * (world.vectors[0] @ head.weights.T) / 2
    want = np.exp(logits - logits.max())
    want /= want.sum()
    got = {p["label_index"]: p["probability"] for p in body["results"][0]["predictions"]}
    np.testing.assert_allclose([got[c] for c in range(len(LABELS))], want, atol=1e-5)


def test_an_item_without_a_probable_label_abstains(world: World):
    ask = {"images": [b64(world.pictures[0])], "labels": LABELS}
    everything = world.post("/v1/classify", **ask).json()["results"][0]
    assert "abstained" not in everything
    probabilities = [p["probability"] for p in everything["predictions"]]
    between = (probabilities[0] + probabilities[1]) / 2
    (one,) = world.post("/v1/classify", **ask, min_probability=between).json()["results"]
    assert [p["label"] for p in one["predictions"]] == [everything["predictions"][0]["label"]]
    assert one["abstained"] is False
    (none,) = world.post("/v1/classify", **ask, min_probability=1).json()["results"]
    assert (none["predictions"], none["abstained"]) == ([], True)


def test_a_model_with_a_bias_judges_each_label_on_its_own(sigmoid_world: World):
    ask = {"images": [b64(sigmoid_world.pictures[0])], "labels": LABELS}
    head = sigmoid_world.model.zero_shot(LABELS)
    logits = head.logit_scale * (sigmoid_world.vectors[0] @ head.weights.T)
    assert head.logit_bias is not None
    for more in ({}, {"multi_label": True}):
        body = sigmoid_world.post("/v1/classify", **ask, **more).json()
        assert body["activation"] == "sigmoid"
        got = sorted(p["probability"] for p in body["results"][0]["predictions"])
        want = np.sort(1 / (1 + np.exp(-(logits + head.logit_bias))))
        np.testing.assert_allclose(got, want, atol=1e-5)
    body = sigmoid_world.post("/v1/classify", **ask, multi_label=False).json()
    assert body["activation"] == "softmax"
    got = sorted(p["probability"] for p in body["results"][0]["predictions"])
    np.testing.assert_allclose(got, np.sort(np.exp(logits) / np.exp(logits).sum()), atol=1e-5)
    body = sigmoid_world.post("/v1/classify", **ask, temperature=3).json()
    got = sorted(p["probability"] for p in body["results"][0]["predictions"])
    want = np.sort(1 / (1 + np.exp(-(logits + head.logit_bias) / 3)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_model_without_a_bias_cannot_judge_labels_on_their_own(world: World):
    response = world.post(
        "/v1/classify", images=[b64(world.pictures[0])], labels=LABELS, multi_label=True
    )
    check_refusal(response, 400, "logit bias")
    assert error(response)["code"] == "no_logit_bias"


def test_a_stored_label_set_stands_for_its_labels(sigmoid_world: World):
    images = [b64(sigmoid_world.pictures[0])]
    named = sigmoid_world.post("/v1/classify", images=images, label_set="animals").json()
    sent = sigmoid_world.post("/v1/classify", images=images, labels=["cat", "dog"]).json()
    assert named["results"] == sent["results"]
    listed = sigmoid_world.get("/v1/label-sets").json()["data"]
    assert [(one["id"], one["labels"]) for one in listed] == [
        ("animals", ["cat", "dog"]),
        ("colours", ["red"]),
    ]


def test_as_many_prompts_as_the_settings_say_make_a_classifier(tmp_path: Path, model_dir: Path):
    labels = [f"label {i}" for i in range(11)]
    (tmp_path / "sets.json").write_text(json.dumps({"ten": labels[:10], "eleven": labels}))
    settings = load_settings(label_sets=tmp_path / "sets.json", max_prompts=800)
    with serving(tmp_path, model_dir, settings) as world:
        for given in ({"labels": labels[:10]}, {"label_set": "ten"}):
            answer = world.post("/v1/classify", texts=["a"], templates="openai", **given)
            assert len(answer.json()["results"][0]["predictions"]) == 10
        for given in ({"labels": labels}, {"label_set": "eleven"}):
            refused = world.post("/v1/classify", texts=["a"], templates="openai", **given)
            check_refusal(refused, 400, "at most 800 are allowed in one request: take fewer")


def test_a_label_set_is_a_name_and_never_a_file(sigmoid_world: World):
    place = str(sigmoid_world.folder / "sets.json")
    for name in ("nope", "../sets", place):
        response = sigmoid_world.post(
            "/v1/classify", images=[b64(sigmoid_world.pictures[0])], label_set=name
        )
        check_refusal(response, 404, "served here: animals, colours")
        assert place not in response.text


def test_a_broken_picture_has_an_error_and_the_others_have_answers(world: World):
    images = [b64(world.pictures[0]), b64(world.pictures[1][:60]), "%%%", b64(world.pictures[2])]
    response = world.post("/v1/classify", images=images, labels=LABELS)
    assert response.status_code == 200
    results = response.json()["results"]
    assert ["predictions" in result for result in results] == [True, False, False, True]
    assert [result["index"] for result in results] == [0, 1, 2, 3]
    assert results[1]["error"]["code"] == "invalid_image"
    assert results[2]["error"]["code"] == "invalid_base64"
    assert results[2]["error"]["param"] == "images[2]"


def test_templates_are_never_read_from_a_file(world: World, tmp_path: Path):
    file = tmp_path / "templates.txt"
    file.write_text("a secret {}\n")
    for templates in (str(file), "../../etc/passwd", [str(file)]):
        response = world.post(
            "/v1/classify", images=[b64(world.pictures[0])], labels=["a"], templates=templates
        )
        assert response.status_code == 400
        assert "secret" not in response.text
        assert str(file) not in response.text


def test_template_sets_are_listed(world: World):
    listed = {one["id"]: one["templates"] for one in world.get("/v1/template-sets").json()["data"]}
    assert len(listed["openai"]) == 80
    assert all("{}" in template for template in listed["simple"])


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"labels": []}, 400, "labels is empty"),
        ({"labels": ["a", " "]}, 400, "labels[1] is empty"),
        ({"labels": ["a"] * 2001}, 400, "2000"),
        (
            {"labels": ["a"] * 200, "templates": "openai"},
            400,
            "at most 8192 are allowed in one request: take fewer",
        ),
        ({"labels": ["a" * 1000] * 10, "templates": ["{}" * 500] * 8}, 400, "characters"),
        ({"labels": ["a", "b" * 10_001]}, 422, "labels[1] has 10001 characters"),
        ({"templates": ["{}" + "b" * 10_000]}, 422, "templates[0] has 10002 characters"),
        ({"labels": None}, 400, "labels or label_set"),
        ({"label_set": "x"}, 400, "labels or label_set"),
        ({"templates": []}, 400, "templates is empty"),
        ({"images": []}, 400, "images is empty"),
        ({"images": None}, 400, "one of images, texts"),
        ({"texts": ["a"]}, 400, "one of images, texts"),
        ({"images": None, "texts": ["a", ""]}, 400, "texts[1] is empty"),
        ({"images": None, "texts": ["a", "b" * 20_000]}, 422, "texts[1] has 20000 characters"),
        ({"images": ["http://127.0.0.1/a.png"]}, 400, "URL"),
        ({"top_k": 0}, 422, "top_k"),
        ({"temperature": 0}, 422, "temperature"),
        ({"temperature": 1e-320}, 422, "temperature"),
        ({"temperature": 1001}, 422, "temperature"),
        ({"min_probability": 1.5}, 422, "min_probability"),
        ({"lables": ["a"]}, 422, "does not know"),
    ],
)
def test_a_wrong_classification_says_what_is_wrong(world: World, change, status, word):
    body = {"images": [b64(world.pictures[0])], "labels": ["a"]} | change
    check_refusal(world.client.post("/v1/classify", json=body), status, word)


def test_an_answer_that_would_repeat_long_labels_too_often_is_refused(world: World):
    ask = {"texts": ["a"] * 256, "labels": [f"{'b' * 9_000}{i}" for i in range(30)]}
    refused = world.post("/v1/classify", **ask)
    check_refusal(refused, 400, "set top_k")
    assert (error(refused)["code"], error(refused)["param"]) == ("answer_too_large", "top_k")
    assert len(world.post("/v1/classify", **ask, top_k=1).json()["results"]) == 256


def test_as_many_items_and_labels_as_one_request_may_have_are_answered():
    labels = [f"a label of twenty {i:02}" for i in range(2000)]
    items = classify._Items("texts", [Text("a")] * 256)
    classify._check_answer(tuple(labels), len(labels), items)
    with pytest.raises(RequestError):
        classify._check_answer(("\1" * 50_000, *labels), 10, items)


def test_the_lowest_temperature_still_has_probabilities(world: World):
    ask = {"images": [b64(world.pictures[0])], "labels": LABELS}
    body = world.post("/v1/classify", **ask, temperature=0.001).json()
    assert sum(p["probability"] for p in body["results"][0]["predictions"]) == pytest.approx(1)


def test_a_classifier_that_others_wait_for_too_is_built_whatever_the_deadline(own_world: World):
    own_world.registry.model(None).pipeline.batcher._full_pace["text"].note(1, 40.0)
    body = {"images": [b64(own_world.pictures[0])], "labels": ["a new label", "another"]}
    headers = {"X-Request-Timeout": "20"}
    answer = own_world.client.post("/v1/classify", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
