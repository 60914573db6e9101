from pathlib import Path

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, tiny_albef
from conftest import make_picture

from clipserve.embed import prepare
from clipserve.errors import ConfigError, ImageError
from clipserve.match import match_pairs
from clipserve.model import Model

PICTURES = [make_picture(seed=i) for i in range(5)]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    found = tiny_albef(tmp_path / "words")
    with torch.no_grad():  # weights so large that pictures and texts make a difference
        for parameter in found.network.fusion.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)
        found.network.matching_head.weight.mul_(10)
    return found


def test_a_match_is_the_heads_probability(model: Model) -> None:
    found = model.match(PICTURES, CAPTIONS[:5])
    assert found.dtype == np.float32
    for picture, caption, probability in zip(PICTURES, CAPTIONS, found, strict=False):
        ids = model.tokenizer([caption]).ids
        with torch.no_grad():
            states, _ = model.network.encode_image_states(model.transform(picture)[None])
            words, _ = model.network.encode_text_states(ids)
            no, yes = model.network.matching_logits(model.network.fuse(words, ids, states))[0]
        assert probability == pytest.approx(torch.sigmoid(yes - no).item(), abs=1e-5)
    assert found.std() > 1e-3


def test_batches_do_not_show(model: Model) -> None:
    whole = model.match(PICTURES, CAPTIONS[:5])
    assert np.allclose(model.match(PICTURES, CAPTIONS[:5], batch_size=2), whole, atol=1e-6)


def test_no_pairs_give_no_probabilities(model: Model) -> None:
    assert model.match([], []).shape == (0,)


def test_pairs_are_of_any_picture_with_any_text(model: Model) -> None:
    pixels = torch.stack([model.transform(picture) for picture in PICTURES])
    ids = model.tokenizer(CAPTIONS[:3]).ids
    with torch.no_grad():
        images, _ = model.network.encode_image_states(pixels)
        texts, _ = model.network.encode_text_states(ids)
        pairs = torch.tensor([[4, 0], [0, 2], [4, 2], [1, 1], [3, 0]])
        logits = match_pairs(model, images, texts, ids, pairs, batch_size=2)
    chosen = [PICTURES[i] for i, _ in pairs], [CAPTIONS[j] for _, j in pairs]
    assert np.allclose(logits.softmax(1)[:, 1].numpy(), model.match(*chosen), atol=1e-6)
    assert match_pairs(model, images, texts, ids, pairs[:0]).shape == (0, 2)


def test_bf16_models_match_too(model: Model) -> None:
    full = model.match(PICTURES, CAPTIONS[:5])
    half = prepare(model, "cpu", "bf16").match(PICTURES, CAPTIONS[:5])
    assert half.dtype == np.float32
    assert np.abs(full - half).max() < 0.01


def test_unequal_numbers_are_refused(model: Model) -> None:
    for pictures, captions in ((PICTURES[:2], CAPTIONS[:3]), (PICTURES[:3], CAPTIONS[:2])):
        with pytest.raises(ConfigError, match="as many pictures as texts"):
            model.match(pictures, captions)


def test_a_bad_picture_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"bad\.png"):
        model.match([tmp_path / "bad.png"], ["a cat"])


def test_a_model_without_fusion_layers_says_what_to_do(tiny_model: Model) -> None:
    with pytest.raises(ConfigError, match="no fusion layers.*albef_tiny"):
        tiny_model.match(PICTURES, CAPTIONS[:5])
