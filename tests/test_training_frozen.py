from typing import Any

import pytest
import torch
from torch import nn

from clipserve.errors import ConfigError
from clipserve.model import Model, create
from training.frozen import Frozen, choose
from training.parts import find_weights


def names(model: Model, *patterns: str) -> set[str]:
    return {weight.name for weight in choose(find_weights(model.network), patterns)}


def test_patterns_name_parts_layers_and_single_weights(tiny_model: Model) -> None:
    everything = {weight.name for weight in find_weights(tiny_model.network)}
    assert names(tiny_model, "image.*") == {name for name in everything if name[:6] == "image."}
    assert names(tiny_model, "*.ln_1.bias") == {
        "image.transformer.resblocks.0.ln_1.bias",
        "text.transformer.resblocks.0.ln_1.bias",
    }
    assert names(tiny_model, "logit_scale") == {"logit_scale"}


def test_a_later_pattern_wins(tiny_model: Model) -> None:
    everything = {weight.name for weight in find_weights(tiny_model.network)}
    left = {"image.proj", "text.text_projection", "logit_scale"}
    assert names(tiny_model, "*", "!*proj", "!*_projection", "!logit_*") == everything - left
    assert "image.proj" in names(tiny_model, "image.*", "!image.proj", "*.proj")


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["imge.*"], r"'imge\.\*' names no weight; did you mean 'image\.\*'"),
        (["image.transformer.resblock.*"], r"did you mean 'image\.transformer\.resblocks\.\*'"),
        (["image.prj"], r"did you mean 'image\.proj'"),
        (["fusion.*"], r"'fusion\.\*' names no weight"),
        (["qqq"], r"there are text\.\*, logit_scale, image\.\*"),
        (["image.*", "image.proj"], r"'image\.proj' has no effect, .* is chosen already"),
        (["image.*", "!text.*"], r"'!text\.\*' has no effect, .* is not chosen"),
        (["*"], "leaves nothing to train"),
    ],
)
def test_a_pattern_without_effect_is_refused_with_the_reason(
    tiny_model: Model, patterns: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        names(tiny_model, *patterns)
    assert "\n" not in str(caught.value)


def test_what_is_frozen_gets_no_gradient_and_is_released_in_time(tiny_model: Model) -> None:
    chosen = choose(find_weights(tiny_model.network), ["image.*"])
    frozen = Frozen(chosen, [tiny_model.network], until=3)
    for step, is_held in ((0, True), (2, True), (3, False), (9, False)):
        frozen.hold(step)
        features = tiny_model.encode_image(torch.zeros(1, 3, 32, 32))
        assert features.requires_grad != is_held
    Frozen(chosen).hold(10**9)
    assert not any(weight.parameter.requires_grad for weight in chosen)


def test_a_frozen_tower_is_in_evaluation_mode_and_the_rest_is_not(architecture: Any) -> None:
    architecture["vision_cfg"]["patch_dropout"] = 0.5
    model = create(architecture).train()
    frozen = Frozen(choose(find_weights(model.network), ["image.*"]), [model.network], until=1)
    frozen.hold(0)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    assert not any(module.training for module in model.network.visual.modules())
    assert model.network.transformer.training
    frozen.hold(1)
    assert model.network.visual.patch_dropout.training


@pytest.mark.parametrize("learnt", [["!image.proj"], ["!image.proj", "!image.ln_post.*"]])
def test_under_a_probe_the_tower_sees_every_patch(architecture: Any, learnt: list[str]) -> None:
    architecture["vision_cfg"]["patch_dropout"] = 0.5
    model = create(architecture).train()
    chosen = choose(find_weights(model.network), ["*", *learnt, "!text.text_projection"])
    frozen = Frozen(chosen, [model.network], until=1)
    frozen.hold(0)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
    frozen.hold(1)
    assert model.network.visual.patch_dropout.training


def test_of_a_half_frozen_tower_only_what_is_wholly_frozen_is_still(architecture: Any) -> None:
    architecture["vision_cfg"] |= {"patch_dropout": 0.5, "layers": 2}
    model = create(architecture).train()
    chosen = choose(find_weights(model.network), ["image.transformer.resblocks.0.*"])
    Frozen(chosen, [model.network]).hold(0)
    visual: Any = model.network.visual
    assert not visual.transformer.resblocks[0].training
    assert visual.transformer.resblocks[1].training
    assert visual.patch_dropout.training


def test_running_statistics_of_frozen_layers_stay() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    weights = [weight for weight in find_weights(network) if weight.name.startswith("text.0")]
    Frozen(weights, [network]).hold(0)
    network(torch.randn(8, 2) + 5)
    first, second = network
    assert torch.equal(first.running_mean, torch.zeros(2))
    assert not torch.equal(second.running_mean, torch.zeros(2))
