import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, albef_table, open_clip_vision, timm_vision, tiny_albef
from torch import Tensor, nn

from clipserve.albef import Albef, build
from clipserve.bert import Layer
from clipserve.embed import prepare
from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.weights import bert_names

VISIONS = {"open_clip": open_clip_vision(), "timm": timm_vision()}


@pytest.fixture
def network() -> Albef:
    torch.manual_seed(0)
    return build(albef_table()).eval()


def ids_of(*lengths: int, width: int = 12, vocab_size: int = 200) -> Tensor:
    """Token ids (B, width) with so many tokens in each row, the rest padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocab_size, (len(lengths), width), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    return ids


# ---- the layers


def bert_twin(network: Albef) -> Any:
    """transformers' BERT with the weights of the network's text tower and token head."""
    from transformers import BertConfig, BertForMaskedLM

    text = network.text
    config = BertConfig(
        vocab_size=text.embeddings.words.num_embeddings,
        hidden_size=text.embeddings.words.embedding_dim,
        num_hidden_layers=len(text.layers),
        num_attention_heads=2,
        intermediate_size=4 * text.embeddings.words.embedding_dim,
        max_position_embeddings=text.embeddings.positions.num_embeddings,
    )
    twin = BertForMaskedLM(config).eval()
    own, theirs = network.state_dict(), twin.state_dict()
    names = bert_names(len(text.layers), 0, token_head=True)
    with torch.no_grad():
        for name, their_name in names.items():
            theirs[their_name].copy_(own[name])
    return twin


def make_uneven(module: nn.Module) -> None:
    """Gains and biases away from one and zero, so that none can be left out unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_six_text_layers_equal_those_of_transformers_bert() -> None:
    torch.manual_seed(0)
    network = build(albef_table(layers=6)).eval()
    make_uneven(network)
    twin = bert_twin(network)
    ids = ids_of(12, 7, 2, 9)
    with torch.no_grad():
        states, features = network.encode_text_states(ids)
        expected = twin.bert(ids, attention_mask=(ids != 0).long()).last_hidden_state
    seen = ids != 0
    assert (states[seen] - expected[seen]).abs().max() < 1e-5
    assert torch.allclose(features, network.text_projection(expected[:, 0]), atol=1e-5)


def test_the_token_head_equals_that_of_transformers_bert(network: Albef) -> None:
    make_uneven(network)
    states = torch.randn(3, 32)
    with torch.no_grad():
        expected = bert_twin(network).cls(states)
        assert (network.token_logits(states) - expected).abs().max() < 1e-5


def test_the_last_map_of_the_token_head_is_stored_once(network: Albef) -> None:
    names = [name for name, p in network.named_parameters() if p.shape == (200, 32)]
    assert names == ["text.embeddings.words.weight"]


def naive_attention(part: Any, x: Tensor, source: Tensor, seen: list[bool], heads: int) -> Tensor:
    """One row of a batch, float64, word by word: x (T, D), source (S, D')."""
    width = x.shape[1]
    size = width // heads
    found = torch.zeros_like(x)
    for t in range(len(x)):
        query = part.query.weight @ x[t] + part.query.bias
        for h in range(heads):
            place = slice(h * size, (h + 1) * size)
            scores, values = [], []
            for s in range(len(source)):
                if seen[s]:
                    key = part.key.weight @ source[s] + part.key.bias
                    value = part.value.weight @ source[s] + part.value.bias
                    scores.append(float(query[place] @ key[place]) / math.sqrt(size))
                    values.append(value[place])
            total = sum(math.exp(score) for score in scores)
            for score, value in zip(scores, values, strict=True):
                found[t, place] += math.exp(score) / total * value
    return naive_norm(part.norm, x + found @ part.output.weight.T + part.output.bias)


def naive_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / math.sqrt(variance + 1e-12) * norm.weight + norm.bias)
    return torch.stack(rows)


def naive_layer(layer: Any, x: Tensor, image: Tensor, seen: list[bool], heads: int) -> Tensor:
    x = naive_attention(layer.self_attention, x, x, seen, heads)
    x = naive_attention(layer.cross_attention, x, image, [True] * len(image), heads)
    inner = x @ layer.mlp.up.weight.T + layer.mlp.up.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return naive_norm(layer.mlp.norm, x + inner @ layer.mlp.down.weight.T + layer.mlp.down.bias)


def test_fusion_layers_equal_a_naive_restatement() -> None:
    torch.manual_seed(0)
    network = build(albef_table(width=8, heads=2)).double().eval()
    make_uneven(network)
    ids = ids_of(5, 3, width=5)
    text, image = torch.randn(2, 5, 8).double(), torch.randn(2, 4, 32).double()
    with torch.no_grad():
        fused = network.fuse(text, ids, image)
        for row in range(2):
            expected = text[row]
            for layer in network.fusion:
                seen = (ids[row] != 0).tolist()
                expected = naive_layer(layer, expected, image[row], seen, heads=2)
            words = int((ids[row] != 0).sum())
            assert (fused[row, :words] - expected[:words]).abs().max() < 1e-9


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer = Layer(width=8, heads=2, intermediate=16, dropout=0.5)
    x, mask = torch.randn(2, 3, 8), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    assert not torch.equal(layer(x, mask), layer(x, mask))
    layer.eval()
    assert torch.equal(layer(x, mask), layer(x, mask))


def test_first_weights_are_berts() -> None:
    torch.manual_seed(0)
    network = build(albef_table(width=64, heads=2))
    for name, parameter in network.named_parameters():
        if name.startswith("visual.") or name == "logit_scale":
            continue
        if "norm." in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        else:
            expected = 0.02 * (768 / 64) ** 0.5  # BERT's, at this width
            assert parameter.std().item() == pytest.approx(expected, rel=0.25), name


# ---- padding


def test_padding_changes_nothing(network: Albef) -> None:
    ids, image = ids_of(5, 3, 1), torch.randn(3, 5, 32)
    with torch.no_grad():
        long, short = network.encode_text_states(ids), network.encode_text_states(ids[:, :5])
        fused = network.fuse(long[0], ids, image), network.fuse(short[0], ids[:, :5], image)
    assert torch.allclose(long[1], short[1], atol=1e-6)
    seen = ids[:, :5] != 0
    assert torch.allclose(fused[0][:, :5][seen], fused[1][seen], atol=1e-6)


def test_a_row_of_padding_only_is_finite(network: Albef) -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    states, features = network.encode_text_states(ids)
    fused = network.fuse(states, ids, torch.randn(2, 5, 32))
    fused.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(features).all()
    assert torch.isfinite(fused).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


# ---- pictures


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
@pytest.mark.parametrize("size", [32, 48])
def test_image_states_hold_the_class_token_that_the_feature_is_made_of(
    vision: dict[str, Any], size: int
) -> None:
    network = build(albef_table(vision | {"image_size": size})).eval()
    tower: Any = network.visual
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        states, features = network.encode_image_states(pixels)
        assert states.shape == (2, 1 + (size // 16) ** 2, vision["width"])
        assert torch.equal(features, tower(pixels))
        if "timm_model_name" in vision:
            expected = tower.projection(tower.trunk(pixels))
        else:
            expected = states[:, 0] @ tower.proj
    assert torch.allclose(features, expected, atol=1e-6)


def test_average_pooling_keeps_the_towers_own_feature() -> None:
    network = build(albef_table(open_clip_vision(pool_type="avg"))).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states, features = network.encode_image_states(pixels)
        assert torch.equal(features, network.visual(pixels))
        assert torch.allclose(features, states[:, 1:].mean(dim=1) @ network.visual.proj)  # type: ignore[operator]


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
def test_patch_dropout_leaves_states_of_kept_patches(vision: dict[str, Any]) -> None:
    network = build(albef_table(vision | {"image_size": 64, "patch_dropout": 0.5}))
    pixels = torch.randn(2, 3, 64, 64)
    assert network.train().encode_image_states(pixels)[0].shape[1] == 1 + 8
    assert network.eval().encode_image_states(pixels)[0].shape[1] == 1 + 16


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
def test_every_parameter_learns_but_the_type_of_second_sentences(vision: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = build(albef_table(vision))
    ids = ids_of(12, 4)
    states, image = network.encode_image_states(torch.randn(2, 3, 32, 32))
    text_states, text = network.encode_text_states(ids)
    fused = network.fuse(text_states, ids, states)
    total = network.logit_scale.exp().float() * (image * text).sum()
    total = total + network.matching_logits(fused).square().sum()
    (total + network.token_logits(fused[:, 1]).square().sum()).backward()  # type: ignore[no-untyped-call]
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []
    unseen = network.text.embeddings.types.weight.grad
    assert unseen is not None
    assert torch.all(unseen[1] == 0)


@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
def test_position_and_class_embeddings_are_declared(vision: dict[str, Any]) -> None:
    network = build(albef_table(vision))
    declared = network.no_weight_decay() & {name for name, _ in network.named_parameters()}
    assert len(declared) == 3
    assert "text.embeddings.positions.weight" in declared


# ---- the temperature


def test_a_published_temperature_survives_to_the_last_bit(network: Albef) -> None:
    for temperature in torch.linspace(0.001, 0.5, 4999):
        network.logit_scale.data = -temperature.double().log()
        assert torch.equal(network.logit_scale.data.neg().exp().float(), temperature)


def test_the_fused_optimizer_takes_a_float64_scale(network: Albef) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0, fused=True)
    before = network.logit_scale.item()
    network.logit_scale.exp().float().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert network.logit_scale.dtype == torch.float64
    assert network.logit_scale.item() == pytest.approx(before - 0.1)


# ---- as a model


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return tiny_albef(tmp_path / "words")


def test_a_forward_pass_gives_vectors_and_states(model: Model, tiny_model: Model) -> None:
    pixels, ids = torch.randn(2, 3, 32, 32), model.tokenizer(CAPTIONS[:2]).ids
    found = model(pixels, ids)
    assert torch.equal(found.image, model.encode_image(pixels))
    assert torch.equal(found.text, model.encode_text(ids))
    assert torch.allclose(found.text.norm(dim=1), torch.ones(2))
    assert found.image_states.shape == (2, 5, 32)
    assert found.text_states.shape == (2, 12, 32)
    plain = tiny_model(pixels, torch.ones(2, 16, dtype=torch.long))
    assert plain.image_states is None
    assert plain.text_states is None


def test_texts_may_be_cut(model: Model) -> None:
    assert model.has_fusion
    assert model.can_cut_text
    tokens = model.tokenizer(CAPTIONS[:3])
    assert tokens.cut().shape[1] < 12
    assert torch.allclose(model.encode_text(tokens.cut()), model.encode_text(tokens.ids), atol=1e-6)
    expected = model.encode_text(tokens.ids).detach().numpy()
    assert np.allclose(model.embed_texts(CAPTIONS[:3]), expected, atol=1e-6)


def test_bf16_towers_give_almost_the_same_vectors_and_keep_the_temperature(tmp_path: Path) -> None:
    for name, vision in VISIONS.items():
        model = tiny_albef(tmp_path / name, vision)
        pixels, ids = torch.randn(4, 3, 32, 32), model.tokenizer(CAPTIONS[:4]).ids
        full, scale = model(pixels, ids), model.logit_scale.clone()
        half = prepare(model, "cpu", "bf16")(pixels, ids)
        assert (full.image * half.image).sum(dim=1).min() > 0.999
        assert (full.text * half.text).sum(dim=1).min() > 0.999
        assert half.text_states.dtype == torch.bfloat16
        assert model.network.logit_scale.dtype == torch.float64
        assert torch.equal(model.logit_scale, scale)
        assert model.logit_scale.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"vocab_size": 200, "widht": 32}}, "text_cfg: widht is unknown; known:.*"),
        ({"text_cfg": {"width": 32}}, "text_cfg: .*vocab_size"),
        ({"text_cfg": {"vocab_size": 9, "width": 32, "heads": 5}}, "not a multiple"),
        ({"text_cfg": {"vocab_size": 9, "layers": 0}}, "1 or more"),
        ({"text_cfg": {"vocab_size": 9, "positions": 3}}, "more than the 3"),
        ({"text_cfg": {"vocab_size": 9, "tokenizer": "clip"}}, "'wordpiece' only"),
        ({"fusion_cfg": {"layers": 0}}, "one or more"),
        ({"fusion_cfg": 6}, "fusion_cfg must be a table"),
        ({"multimodal_cfg": {}}, "multimodal_cfg is unknown beside fusion_cfg"),
        ({"vision_cfg": open_clip_vision(layers=[1, 1, 1, 1])}, "open_clip's ViT"),
        ({"vision_cfg": open_clip_vision(attentional_pool=True)}, "attentional_pool"),
        ({"vision_cfg": open_clip_vision(pool_type="none")}, "pool_type"),
        ({"vision_cfg": open_clip_vision(wdith=3)}, "wdith"),
        ({"vision_cfg": timm_vision(timm_model_name="vit_bose_patch16_224")}, "did you mean vit_b"),
        ({"vision_cfg": timm_vision(timm_model_name="hf-hub:a/b")}, "timm has no model"),
        ({"vision_cfg": {"timm_model_name": "resnet10t"}}, "resnet10t"),
        ({"vision_cfg": timm_vision(timm_pool="avg")}, "timm_pool = 'token'"),
        ({"vision_cfg": timm_vision(head_width=None)}, "go together"),
        (
            {"vision_cfg": {"timm_model_name": "deit_tiny_distilled_patch16_224"}},
            "is no ViT with one class token|timm cannot build",
        ),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(albef_table() | change)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_token_head_says_so() -> None:
    network = build(albef_table() | {"fusion_cfg": {"layers": 1, "token_head": False}})
    with pytest.raises(ConfigError, match="leave the masked language objective out"):
        network.token_logits(torch.zeros(1, 32))
