import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_picture

from clipserve.errors import ConfigError, TextError
from clipserve.model import Model, create
from clipserve.prompts import fill, load_templates, template_sets


def test_openai_and_simple_are_open_clips() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    for name, theirs, count in (
        ("openai", OPENAI_IMAGENET_TEMPLATES, 80),
        ("simple", SIMPLE_IMAGENET_TEMPLATES, 7),
    ):
        ours = load_templates(name)
        assert len(ours) == count
        assert [fill(t, "cat") for t in ours] == [template("cat") for template in theirs]


@pytest.mark.parametrize("name", template_sets())
def test_every_set_loads_and_has_a_place_for_the_name(name: str) -> None:
    assert all("{}" in template for template in load_templates(name))


def test_files_of_lines_and_json(tmp_path: Path) -> None:
    lines = tmp_path / "t.txt"
    lines.write_text("a {}\n\n  the {c} there \n")
    assert load_templates(str(lines)) == ["a {}", "the {c} there"]
    assert fill("the {c} there", "{cat}") == "the {cat} there"
    table = tmp_path / "t.json"
    table.write_text(json.dumps({"PETS": {"classes": ["x"], "templates": ["pet {}"]}, "B": {}}))
    assert load_templates(f"{table}#PETS") == ["pet {}"]
    with pytest.raises(ConfigError, match=r"no data set 'CARS'; there are: PETS, B"):
        load_templates(f"{table}#CARS")
    with pytest.raises(ConfigError, match=r"say which data set.*PETS"):
        load_templates(str(table))


@pytest.mark.parametrize("content", ["", "no place for it", "a {}\nnone here"])
def test_templates_without_a_place_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(ConfigError, match=r"t\.txt"):
        load_templates(str(tmp_path / "t.txt"))


def test_unknown_sets_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown templates 'opanai'; use .*openai"):
        load_templates("opanai")


def test_the_head_is_the_papers(tiny_model: Model) -> None:
    labels, templates = ["cat", "dog", "house"], ["{}", "a photo of a {}.", "the {}"]
    head = tiny_model.zero_shot(labels, templates)
    for row, label in zip(head.weights, labels, strict=True):
        prompts = [tiny_model.embed_texts([t.replace("{}", label)])[0] for t in templates]
        unit = [p.astype(np.float64) / np.linalg.norm(p) for p in prompts]
        mean = np.mean(unit, axis=0)
        assert np.abs(row - mean / np.linalg.norm(mean)).max() < 1e-6


def test_classify_is_the_softmax_of_scaled_cosines(tiny_model: Model) -> None:
    head = tiny_model.zero_shot(["cat", "dog"])
    pictures = [make_picture(seed=i) for i in range(3)]
    logits = tiny_model.logit_scale.item() * tiny_model.embed_images(pictures) @ head.weights.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(head.classify(pictures), expected, atol=1e-6)


def test_a_biased_model_judges_each_label_alone(architecture: dict[str, Any]) -> None:
    model = create(architecture | {"init_logit_bias": -2.0}).eval()
    head = model.zero_shot(["cat", "dog"])
    vectors = model.embed_images([make_picture()])
    logits = model.logit_scale.item() * vectors @ head.weights.T - 2.0
    assert np.allclose(head.probabilities(vectors), 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_extreme_logits_stay_finite(tiny_model: Model) -> None:
    head = tiny_model.zero_shot(["cat", "dog"])
    with np.errstate(all="raise", under="ignore"):
        steep = type(head)(head.labels, head.weights, 1e4, None, tiny_model)
        rows = steep.probabilities(head.weights)
    assert np.allclose(rows.sum(axis=1), 1)


def test_repeated_labels_are_kept_and_empty_ones_refused(tiny_model: Model) -> None:
    assert tiny_model.zero_shot(["missile", "missile"]).weights.shape == (2, 16)
    with pytest.raises(TextError, match="label 1 is empty"):
        tiny_model.zero_shot(["a", "  "])
    with pytest.raises(TextError, match="at least one"):
        tiny_model.zero_shot([])


def test_the_published_prompts_file_loads() -> None:
    file = Path(__file__).parent.parent.parent / "shared" / "data" / "openai_prompts.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    assert len(load_templates(f"{file}#CIFAR10")) == 18
    for name, entry in json.loads(file.read_text()).items():
        assert load_templates(f"{file}#{name}") == entry["templates"]
