import math

import pytest
import torch

from clipserve.config import OptimConfig
from clipserve.model import Model, create
from training.optim import build_optimizer, clamp_logit_scale, learning_rate, parameter_groups


def test_only_matrices_decay(tiny_model: Model) -> None:
    network = tiny_model.network
    decayed, plain = parameter_groups(network, 0.2)
    names = {id(parameter): name for name, parameter in network.named_parameters()}

    def named(group: dict[str, object]) -> set[str]:
        return {names[id(parameter)] for parameter in group["params"]}  # type: ignore[attr-defined]

    assert decayed["weight_decay"] == 0.2
    assert plain["weight_decay"] == 0.0
    assert named(decayed) | named(plain) == set(names.values())
    assert {"logit_scale", "positional_embedding", "visual.class_embedding"} <= named(plain)
    assert "visual.positional_embedding" in named(plain)
    assert all("bias" not in name and "ln_" not in name for name in named(decayed))
    assert {"token_embedding.weight", "visual.conv1.weight", "text_projection"} <= named(decayed)


def test_betas_and_epsilon_follow_open_clips_rule(tiny_model: Model) -> None:
    vit = build_optimizer(tiny_model, OptimConfig())
    assert vit.defaults["betas"] == (0.9, 0.98)
    assert vit.defaults["eps"] == 1e-6
    given = build_optimizer(tiny_model, OptimConfig(betas=(0.8, 0.9), eps=1e-3))
    assert given.defaults["betas"] == (0.8, 0.9)
    assert given.defaults["eps"] == 1e-3
    resnet = create("RN50")
    assert build_optimizer(resnet, OptimConfig()).defaults["betas"] == (0.9, 0.999)
    assert build_optimizer(resnet, OptimConfig()).defaults["eps"] == 1e-8


def test_the_schedule_by_hand() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    constant = OptimConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(constant, step, 9) for step in (0, 1, 8)] == [0.5, 1.0, 1.0]
    no_warmup = OptimConfig(lr=1.0, warmup_steps=0)
    assert learning_rate(no_warmup, 0, 10) == 1.0


def test_the_logit_scale_stays_between_one_and_a_hundred(tiny_model: Model) -> None:
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))):
        with torch.no_grad():
            tiny_model.network.logit_scale.fill_(value)
        clamp_logit_scale(tiny_model)
        assert tiny_model.logit_scale.item() == pytest.approx(expected)
