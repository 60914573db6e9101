from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cocas import coca_architecture
from conftest import make_picture

from clipserve import checkpoint
from clipserve.model import Model, create
from clipserve.towers import architecture_config


def test_vectors_have_unit_length(tiny_model: Model) -> None:
    encoded = tiny_model(torch.rand(3, 3, 32, 32), torch.randint(0, 100, (3, 16)))
    for vectors in (encoded.image, encoded.text):
        assert vectors.shape == (3, 16)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3))


def custom_text(architecture: dict[str, Any], **text: Any) -> Model:
    torch.manual_seed(0)
    table = architecture | {"custom_text": True, "text_cfg": architecture["text_cfg"] | text}
    return create(table).eval()


def test_cut_texts_give_the_vectors_of_padded_ones(
    tiny_model: Model, architecture: dict[str, Any]
) -> None:
    for model in (tiny_model, custom_text(architecture), custom_text(architecture, proj_bias=True)):
        assert model.can_cut_text
        tokens = model.tokenizer(["a cat", "a much longer text about dogs"])
        assert tokens.cut().shape[1] < tokens.ids.shape[1]
        cut, full = model.encode_text(tokens.cut()), model.encode_text(tokens.ids)
        assert torch.allclose(cut, full, atol=1e-6)


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}]
)
def test_texts_are_not_cut_where_padding_matters(
    architecture: dict[str, Any], text: dict[str, Any]
) -> None:
    assert not custom_text(architecture, **text).can_cut_text


def test_temperature_and_bias_are_exposed_as_applied(architecture: dict[str, Any]) -> None:
    model = create(architecture | {"init_logit_bias": -10.0, "init_logit_scale": 2.0})
    assert model.logit_scale.item() == pytest.approx(7.389056)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10.0
    assert create(architecture).logit_bias is None


def test_an_architecture_by_name_gets_its_input_size_and_context() -> None:
    model = create("ViT-S-32-alt")
    config = architecture_config("ViT-S-32-alt")
    assert model.transform.size == (224, 224)
    assert model.embed_dim == config["embed_dim"]
    assert model.context_length == 77
    assert model.info.fingerprint is None


def coca(**text: Any) -> Model:
    torch.manual_seed(0)
    table = coca_architecture()
    table["text_cfg"] |= text
    return create(table).eval()


CAPTIONS = ["a cat", "two dogs that run", "!"]


@pytest.mark.parametrize("embed_cls", [True, False])
@torch.no_grad()
def test_a_coca_gives_vectors_and_caption_logits_as_open_clips(embed_cls: bool) -> None:
    model, pixels = coca(embed_cls=embed_cls), torch.rand(3, 3, 32, 32)
    ids = model.tokenizer(CAPTIONS).ids
    encoded = model(pixels, ids)
    expected = model.network(pixels, ids)
    assert encoded.caption_logits is not None
    assert encoded.caption_logits.shape == (3, 15, 49408)
    assert torch.equal(encoded.caption_logits, expected["logits"])
    assert torch.equal(expected["labels"], ids[:, 1:])  # what the logits are guesses of
    assert torch.allclose(encoded.image, expected["image_features"], atol=1e-6)
    assert torch.allclose(encoded.text, expected["text_features"], atol=1e-6)
    assert torch.allclose(encoded.image, model.encode_image(pixels), atol=1e-6)
    assert torch.allclose(encoded.text, model.encode_text(ids), atol=1e-6)
    assert model.has_decoder
    assert not model.can_cut_text


@torch.no_grad()
def test_a_coca_guesses_a_word_from_those_before_it_and_the_picture() -> None:
    model, pixels = coca(), torch.rand(1, 3, 32, 32)
    ids = model.tokenizer(["one two three four"]).ids
    changed = ids.clone()
    changed[0, 3] += 1  # its guess is at 2; what follows it is guessed from 3 on
    before, after = (model(pixels, each).caption_logits for each in (ids, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])
    other = model(1 - pixels, ids).caption_logits
    assert not torch.allclose(before, other)


def test_a_saved_coca_embeds_alike_here_and_in_open_clip(tmp_path: Path) -> None:
    import open_clip

    model = coca()
    checkpoint.save(model, tmp_path / "coca", name="coca", objective=("contrastive", "captioning"))
    ours = checkpoint.load(tmp_path / "coca", "cpu", "fp32")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'coca'}")
    pictures = [make_picture(70, 50, seed=i) for i in range(3)]
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'coca'}")(CAPTIONS)
    with torch.no_grad():
        output = theirs.eval()(torch.stack([preprocess(p) for p in pictures]), ids)
    image, text = ours.embed_images(pictures), ours.embed_texts(CAPTIONS)
    assert np.abs(image - output["image_features"].numpy()).max() < 1e-5
    assert np.abs(text - output["text_features"].numpy()).max() < 1e-5
    rough = checkpoint.load(tmp_path / "coca", "cpu", "bf16")
    assert (rough.embed_images(pictures) * image).sum(1).min() > 0.999
    assert (rough.embed_texts(CAPTIONS) * text).sum(1).min() > 0.999


def test_a_coca_learns_to_caption() -> None:
    model = coca().train()
    pixels, ids = torch.rand(4, 3, 32, 32), model.tokenizer([*CAPTIONS, "a red bus"]).ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        logits = model(pixels, ids).caption_logits
        is_word = ids[:, 1:] != model.network.pad_id
        loss = torch.nn.functional.cross_entropy(logits[is_word], ids[:, 1:][is_word])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert losses[-1] < losses[0] - 1
