from pathlib import Path

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, tiny_albef
from conftest import make_picture, needs_int8

from clipserve.embed import prepare
from clipserve.errors import ConfigError, ImageError
from clipserve.match import _batches, match_pairs
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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_logits_of_pairs_do_not_depend_on_how_they_are_put_together(
    model: Model, batch_size: int
) -> None:
    network = model.network
    ids = model.tokenizer(CAPTIONS).cut()
    random = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(6))
    pairs = pairs[torch.rand(30, generator=random) < 0.6]
    with torch.no_grad():
        images, _ = network.encode_image_states(
            torch.stack([model.transform(picture) for picture in PICTURES])
        )
        texts, _ = network.encode_text_states(ids)
        for order in (torch.arange(len(pairs)), torch.randperm(len(pairs), generator=random)):
            found = match_pairs(model, images, texts, ids, pairs[order], batch_size)
            for (i, j), logits in zip(pairs[order].tolist(), found, strict=True):
                fused = network.fuse(texts[j, None], ids[j, None], images[i, None])
                expected = network.matching_logits(fused)[0]
                assert torch.allclose(logits, expected, atol=1e-5)
    assert found[:, 1].std() > 0.1


def test_keys_of_a_picture_are_computed_once_for_all_its_texts(model: Model) -> None:
    rows = []
    key = model.network.fusion[0].cross_attention.key
    key.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    ids = model.tokenizer(CAPTIONS).ids
    with torch.no_grad():
        states = model(torch.stack([model.transform(picture) for picture in PICTURES[:3]]), ids)
        pairs = torch.cartesian_prod(torch.arange(3), torch.arange(6))
        assert states.image_states is not None
        assert states.text_states is not None
        match_pairs(model, states.image_states, states.text_states, ids, pairs)
    assert sum(rows) == 3


def test_one_gradient_for_keys_computed_once(model: Model) -> None:
    """As for keys that are computed for each text."""
    network = model.network
    ids = model.tokenizer(CAPTIONS[:4]).cut()
    texts, _ = network.encode_text_states(ids)
    images = torch.randn(2, 5, 32, requires_grad=True)
    gradients = []
    for source in (images, images.repeat_interleave(2, dim=0)):
        logits = network.matching_logits(network.fuse(texts, ids, source))
        wanted = [images, network.fusion[0].cross_attention.key.weight]
        gradients.append(torch.autograd.grad(logits.square().sum(), wanted, retain_graph=True))
    for once, each in zip(*gradients, strict=True):
        assert torch.allclose(once, each, rtol=1e-4, atol=1e-5 * float(each.abs().max()))


def test_batches_keep_the_order_and_their_size() -> None:
    pairs = torch.tensor([[7, 1], [7, 2], [7, 3], [4, 1], [4, 9], [5, 0], [5, 2], [7, 5]])

    def batches(size: int) -> list[tuple[list[int], list[list[int]]]]:
        return [(pictures.tolist(), texts.tolist()) for pictures, texts in _batches(pairs, size)]

    last = ([7], [[5]])
    assert batches(4) == [([7], [[1, 2, 3]]), ([4, 5], [[1, 9], [0, 2]]), last]
    assert batches(3) == [([7], [[1, 2, 3]]), ([4], [[1, 9]]), ([5], [[0, 2]]), last]
    assert batches(2)[:2] == [([7], [[1, 2]]), ([7], [[3]])]
    assert len(batches(1)) == 8
    assert list(_batches(pairs[:0], 4)) == []


@pytest.mark.parametrize(
    ("dtype", "most"), [("bf16", 0.01), pytest.param("int8", 0.05, marks=needs_int8)]
)
def test_rounded_models_match_too(model: Model, dtype: str, most: float) -> None:
    full = model.match(PICTURES, CAPTIONS[:5])
    rounded = prepare(model, "cpu", dtype).match(PICTURES, CAPTIONS[:5])
    assert rounded.dtype == np.float32
    assert 0 < np.abs(full - rounded).max() < most


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
