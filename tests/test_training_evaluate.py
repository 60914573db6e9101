from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.shards import ShardSet
from training.evaluate.report import evaluate
from training.shards import pack


@pytest.fixture
def shards(captioned: Any, tmp_path: Path) -> ShardSet:
    pack(captioned(12), tmp_path / "shards")
    return ShardSet.open(tmp_path / "shards")


def test_the_report_holds_both_tasks_and_says_what_it_measured(
    tiny_model: Model, shards: ShardSet
) -> None:
    report = evaluate(tiny_model, shards, ["retrieval", "zeroshot"], "colour", "photo")
    assert report["num_images"] == report["num_texts"] == 12
    assert report["data_fingerprint"] == shards.manifest.fingerprint
    assert report["zeroshot"]["num_classes"] == 2
    assert report["zeroshot"]["majority_acc1"] == 0.5
    assert report["zeroshot"]["templates"] == "photo"
    pictures = [shards.read(i).image for i in range(12)]
    head = tiny_model.zero_shot(["blue", "red"], "photo")
    guesses = head.classify(pictures).argmax(axis=1)
    assert report["zeroshot"]["acc1"] == np.mean(guesses == np.arange(12) % 2)


def test_captions_as_labels_agree_with_retrieval(tiny_model: Model, shards: ShardSet) -> None:
    report = evaluate(tiny_model, shards, ["retrieval", "zeroshot"], "caption", "none")
    assert report["zeroshot"]["acc1"] == pytest.approx(report["retrieval"]["i2t_r1"])


def test_unknown_tasks_and_fields_are_named(tiny_model: Model, shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"unknown tasks probing; use retrieval, zeroshot"):
        evaluate(tiny_model, shards, ["probing"], "caption", "none")
    with pytest.raises(ConfigError, match=r"has no 'brand'; its fields: .*colour"):
        evaluate(tiny_model, shards, ["zeroshot"], "brand", "none")
