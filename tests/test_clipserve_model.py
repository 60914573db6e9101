from typing import Any

import pytest
import torch

from clipserve.model import Model, create
from clipserve.towers import architecture_config


def test_vectors_have_unit_length(tiny_model: Model) -> None:
    image, text = tiny_model(torch.rand(3, 3, 32, 32), torch.randint(0, 100, (3, 16)))
    for vectors in (image, text):
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
