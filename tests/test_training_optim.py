import math
from typing import Any

import pytest
import torch
from albefs import albef_table
from conftest import tiny_architecture
from torch import nn

from clipserve.errors import ConfigError
from clipserve.model import Model, create
from clipserve.objectives import Contrastive, Sigmoid
from clipserve.optim import OptimConfig
from training.frozen import Frozen, choose
from training.optim import (
    build_optimizer,
    check_steps,
    clamp_logit_scale,
    largest_logit_scale,
    learning_rate,
    parameter_groups,
    set_rates,
)
from training.parts import Weight, find_weights


def settings(**given: Any) -> OptimConfig:
    return OptimConfig.model_validate(given)


def learns(groups: list[dict[str, Any]], weights: list[Weight]) -> dict[str, tuple[float, float]]:
    """Peak learning rate and decay of each weight, which stands in exactly one group."""
    names = {id(weight.parameter): weight.name for weight in weights}
    placed = [(names[id(p)], g["peak"], g["weight_decay"]) for g in groups for p in g["params"]]
    assert len(placed) == len({name for name, _, _ in placed})
    return {name: (lr, decay) for name, lr, decay in placed}


def test_only_matrices_decay(tiny_model: Model) -> None:
    weights = find_weights(tiny_model.network)
    groups = parameter_groups(weights, settings())
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    found = learns(groups, weights)
    assert found.keys() == {weight.name for weight in weights}
    assert {rate for rate, _ in found.values()} == {5e-4}
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert {"text.token_embedding.weight", "image.conv1.weight", "text.text_projection"} <= decayed
    assert not {name for name in decayed if "bias" in name or "ln_" in name}
    assert not decayed & {
        "logit_scale",
        "text.positional_embedding",
        "image.class_embedding",
        "image.positional_embedding",
    }


def test_each_part_has_its_own_rate_and_decay() -> None:
    model = albef()
    heads = nn.ModuleDict({"simclr": nn.Linear(3, 2)})
    weights = find_weights(model.network, heads)
    config = settings(
        lr=1e-4,
        weight_decay=0.1,
        image={"lr": 1e-5},
        text={"weight_decay": 0.0},
        fusion={"lr": 3e-4, "weight_decay": 0.3},
        heads={"lr": 1e-3},
    )
    found = learns(parameter_groups(weights, config), weights)
    assert found.keys() == {weight.name for weight in weights}
    assert found["image.proj"] == (1e-5, 0.1)
    assert found["image.ln_post.bias"] == (1e-5, 0.0)
    assert found["text.text_projection.weight"] == (1e-4, 0.0)
    assert found["fusion.0.mlp.up.weight"] == (3e-4, 0.3)
    assert found["heads.matching_head.weight"] == (1e-3, 0.1)
    assert found["heads.simclr.weight"] == (1e-3, 0.1)
    assert found["heads.simclr.bias"] == (1e-3, 0.0)
    assert found["logit_scale"] == (1e-4, 0.0)


def test_layers_learn_slower_the_deeper_they_are(architecture: Any) -> None:
    architecture["vision_cfg"]["layers"] = 2
    weights = find_weights(create(architecture).network)
    config = settings(lr=1.0, layer_decay=0.5, text={"layer_decay": 1, "lr": 0.1})
    found = learns(parameter_groups(weights, config), weights)
    rates = {name: rate for name, (rate, _) in found.items()}
    assert rates["image.proj"] == rates["image.ln_post.weight"] == 1.0
    assert rates["image.transformer.resblocks.1.mlp.c_fc.weight"] == 0.5
    assert rates["image.transformer.resblocks.0.ln_1.bias"] == 0.25
    for name in ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight"):
        assert rates[f"image.{name}"] == 0.25
    assert {rate for name, rate in rates.items() if name.startswith("text.")} == {0.1}
    assert rates["logit_scale"] == 1.0


def test_layer_decay_counts_the_frozen_layers_too(architecture: Any) -> None:
    architecture["vision_cfg"]["layers"] = 2
    weights = find_weights(create(architecture).network)
    frozen = Frozen(choose(weights, ["image.transformer.resblocks.1.*", "image.proj", "text.*"]))
    config = settings(lr=1.0, layer_decay=0.5)
    found = learns(parameter_groups(weights, config, frozen), weights)
    assert found["image.transformer.resblocks.0.mlp.c_fc.weight"][0] == 0.25


def test_layer_decay_of_an_albef_counts_the_layers_of_its_text() -> None:
    weights = find_weights(albef().network)
    found = learns(parameter_groups(weights, settings(lr=1.0, layer_decay=0.5)), weights)
    assert found["text.layers.1.mlp.up.weight"][0] == 0.5
    assert found["text.layers.0.mlp.up.weight"][0] == 0.25
    assert found["text.embeddings.words.weight"][0] == 0.25
    assert found["text.text_projection.weight"][0] == 1.0
    assert found["fusion.0.mlp.up.weight"][0] == 1.0


def test_a_tower_without_a_row_of_layers_has_no_layer_decay() -> None:
    weights = find_weights(create("RN50").network)
    with pytest.raises(ConfigError, match=r"image tower of this model.*optim\.image\.layer_decay"):
        parameter_groups(weights, settings(layer_decay=0.7))
    parameter_groups(weights, settings(layer_decay=0.7, image={"layer_decay": 1}))


def test_a_part_that_is_not_there_or_not_trained_is_refused(tiny_model: Model) -> None:
    weights = find_weights(tiny_model.network)
    with pytest.raises(ConfigError, match=r"optim\.fusion has no effect: this model has no such"):
        parameter_groups(weights, settings(fusion={"lr": 1}))
    frozen = Frozen(choose(weights, ["image.*"]))
    with pytest.raises(ConfigError, match=r"optim\.image has no effect: all of it is frozen"):
        parameter_groups(weights, settings(image={"lr": 1}), frozen)


def test_what_is_frozen_for_good_has_no_place_and_what_thaws_begins_late(tiny_model: Model) -> None:
    weights = find_weights(tiny_model.network)
    chosen = choose(weights, ["image.*"])
    left = learns(parameter_groups(weights, settings(), Frozen(chosen)), weights)
    assert left.keys() == {w.name for w in weights if w.part != "image"}
    groups = parameter_groups(weights, settings(), Frozen(chosen, until=7))
    assert learns(groups, weights).keys() == {weight.name for weight in weights}
    late = {id(p) for group in groups if group["begin"] == 7 for p in group["params"]}
    assert late == {id(weight.parameter) for weight in chosen}


def test_betas_and_epsilon_follow_open_clips_rule(tiny_model: Model) -> None:
    vit = build(tiny_model)
    assert vit.defaults["betas"] == (0.9, 0.98)
    assert vit.defaults["eps"] == 1e-6
    given = build(tiny_model, betas=(0.8, 0.9), eps=1e-3)
    assert given.defaults["betas"] == (0.8, 0.9)
    assert given.defaults["eps"] == 1e-3
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):  # as SigLIP's and EVA's towers
        timm = build(create(timm_architecture(name)))
        assert (timm.defaults["betas"], timm.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert build(create(timm_architecture("resnet10t"))).defaults["betas"] == (0.9, 0.999)
    resnet = create("RN50")
    assert build(resnet).defaults["betas"] == (0.9, 0.999)
    assert build(resnet).defaults["eps"] == 1e-8
    assert build(tiny_model, name="lion").defaults["betas"] == (0.9, 0.99)


def adamw(weight: torch.Tensor, gradients: list[torch.Tensor], rms: float = math.inf) -> None:
    """AdamW (arXiv:1711.05101, algorithm 2), and StableAdamW's division by the update's RMS."""
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        weight *= 1 - 0.1 * 0.2
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient**2
        deviation = (square / (1 - 0.98**step)).sqrt() + 1e-6
        slower = max(1.0, float((gradient / deviation).square().mean().sqrt()) / rms)
        weight -= 0.1 / slower * (mean / (1 - 0.9**step)) / deviation


def lion(weight: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    """Lion (arXiv:2302.06675, algorithm 2)."""
    mean = torch.zeros_like(weight)
    for gradient in gradients:
        update = (0.9 * mean + 0.1 * gradient).sign()
        mean = 0.99 * mean + 0.01 * gradient
        weight -= 0.1 * (update + 0.2 * weight)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("adamw", adamw), ("stableadamw", lambda w, g: adamw(w, g, rms=1.0)), ("lion", lion)],
)
def test_an_optimizer_does_as_its_paper_says(tiny_model: Model, name: str, rule: Any) -> None:
    weight = tiny_model.network.visual.proj
    expected = weight.detach().clone()
    gradients = [torch.randn(weight.shape) * size for size in (1.0, 30.0, 0.01)]
    rule(expected, gradients)
    optimizer = build(tiny_model, name=name, lr=0.1)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-5)


def test_muon_orthogonalises_matrices_within_layers_and_nothing_else(tiny_model: Model) -> None:
    network = tiny_model.network
    hidden, outer = network.visual.transformer.resblocks[0].mlp.c_fc.weight, network.visual.proj
    before = hidden.detach().clone()
    expected = outer.detach().clone()
    optimizer = build(tiny_model, name="muon", lr=0.1)
    for weight in (hidden, outer):
        weight.grad = torch.randn(weight.shape)
    gradient = outer.grad.clone()
    optimizer.step()
    adamw(expected, [gradient])
    assert torch.allclose(outer, expected, atol=1e-5)
    update = (before * (1 - 0.1 * 0.2) - hidden).detach()
    size = 0.1 * 0.2 * math.sqrt(128)  # lr and Kimi's scale (arXiv:2502.16982)
    assert torch.allclose(torch.linalg.svdvals(update), torch.full((32,), size), rtol=0.4)
    weights = find_weights(network)
    routed = {id(p) for g in optimizer.param_groups if g["use_muon"] for p in g["params"]}
    names = {weight.name for weight in weights if id(weight.parameter) in routed}
    assert "text.transformer.resblocks.0.attn.in_proj_weight" in names
    assert all(".resblocks." in name and "bias" not in name for name in names)


def test_a_table_of_position_biases_within_a_layer_is_no_matrix_to_orthogonalise() -> None:
    table = nn.Parameter(torch.zeros(9, 2))
    name = "image.trunk.blocks.0.attn.relative_position_bias_table"
    assert not Weight(name, table, decays=False).is_hidden_matrix
    assert Weight("image.trunk.blocks.0.attn.qkv.weight", table, decays=True).is_hidden_matrix


def test_muon_without_anything_to_orthogonalise_is_refused(tiny_model: Model) -> None:
    weights = find_weights(tiny_model.network)
    frozen = Frozen(choose(weights, ["*.resblocks.*"]))
    with pytest.raises(ConfigError, match=r"optim\.name = muon has no effect"):
        build_optimizer(tiny_model, settings(name="muon"), weights, frozen)


@pytest.mark.parametrize("name", ["adamw", "stableadamw", "lion", "muon", "nadamw", "adopt"])
def test_every_optimizer_takes_a_step_and_leaves_what_has_no_gradient(
    tiny_model: Model, name: str
) -> None:
    before = {n: p.detach().clone() for n, p in tiny_model.network.named_parameters()}
    optimizer = build(tiny_model, name=name)
    for _ in range(2):
        tiny_model.encode_text(torch.tensor([[1, 5, 9]])).sum().backward()
        optimizer.step()
    for parameter_name, parameter in tiny_model.network.named_parameters():
        is_same = torch.equal(before[parameter_name], parameter)
        assert is_same == (parameter.grad is None), parameter_name
        assert parameter.isfinite().all()


def test_the_schedule_by_hand() -> None:
    config = settings(lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    constant = settings(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(constant, step, 9) for step in (0, 1, 8)] == [0.5, 1.0, 1.0]
    no_warmup = settings(lr=1.0, warmup_steps=0)
    assert learning_rate(no_warmup, 0, 10) == 1.0


def test_warm_up_stable_decay_by_hand() -> None:
    config = settings(lr=2.0, warmup_steps=2, schedule="wsd", decay_steps=4)
    rates = [learning_rate(config, step, 10) for step in range(11)]
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]


def test_each_group_follows_the_course_to_its_own_peak_from_its_own_begin() -> None:
    weight = nn.Parameter(torch.zeros(()))
    other = nn.Parameter(torch.zeros(()))
    groups = [
        {"params": [weight], "peak": 1.0, "begin": 0},
        {"params": [other], "peak": 0.1, "begin": 6},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    config = settings(lr=4.0, warmup_steps=2)
    seen = []
    for step in range(10):
        assert set_rates(optimizer, config, step, 10) == learning_rate(config, step, 10)
        seen.append([group["lr"] for group in optimizer.param_groups])
    first, late = zip(*seen, strict=True)
    assert list(first) == [learning_rate(config, step, 10, 1.0) for step in range(10)]
    assert first[:3] == (0.5, 1.0, 1.0)
    assert late[:6] == (0.0,) * 6
    assert list(late[6:]) == [learning_rate(config, step, 4, 0.1) for step in range(4)]
    assert late[6:8] == (0.05, 0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedule": "wsd", "decay_steps": 9, "warmup_steps": 2}, "need 11 steps, the run has 10"),
        ({"freeze": ["image.*"], "unfreeze_after_steps": 10}, "not before the last"),
    ],
)
def test_a_course_longer_than_the_run_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_steps(settings(**given), 10)
    check_steps(settings(**given), 11)


def test_the_logit_scale_stays_between_one_and_a_hundred(tiny_model: Model) -> None:
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        with torch.no_grad():
            tiny_model.network.logit_scale.fill_(value)
        clamp_logit_scale(tiny_model)
        assert tiny_model.logit_scale.item() == pytest.approx(expected)


def test_a_scale_may_stay_where_it_begins_and_siglips_may_grow(tiny_model: Model) -> None:
    contrastive, sigmoid = Contrastive(name="contrastive"), Sigmoid(name="sigmoid")
    assert largest_logit_scale(tiny_model, [contrastive]) == math.log(100)
    scale = tiny_model.network.logit_scale.data.fill_(math.log(117))
    largest = largest_logit_scale(tiny_model, [contrastive])
    clamp_logit_scale(tiny_model, largest)
    assert scale.item() == pytest.approx(math.log(117), rel=1e-7)
    scale.fill_(9.0)
    clamp_logit_scale(tiny_model, largest)
    assert scale.item() == pytest.approx(math.log(117), rel=1e-7)
    scale.fill_(9.0)
    clamp_logit_scale(tiny_model, largest_logit_scale(tiny_model, [sigmoid]))
    assert scale.item() == 9.0


def test_a_frozen_logit_scale_is_not_even_clamped(tiny_model: Model) -> None:
    scale = tiny_model.network.logit_scale.requires_grad_(False).fill_(9.0)
    clamp_logit_scale(tiny_model)
    assert scale.item() == 9.0


def timm_architecture(name: str) -> dict[str, Any]:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    return tiny_architecture() | {"vision_cfg": vision | {"image_size": 224}}


def build(model: Model, **given: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, settings(**given), find_weights(model.network))


def albef() -> Any:
    from types import SimpleNamespace

    from clipserve.towers import build_network

    return SimpleNamespace(network=build_network(albef_table()))
