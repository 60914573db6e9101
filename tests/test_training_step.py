"""A step that nothing could learn from."""

from pathlib import Path
from typing import Any

import pytest
from albefs import tiny_albef
from small_runs import SMALL

from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.errors import ConfigError
from training.loop import train
from training.shards import PackOptions, pack

SETTINGS = [setting for setting in SMALL if not setting.startswith("model.")]
FUSION_ALONE = "optim.freeze=['*','!fusion.*']"


@pytest.fixture
def given(captioned: Any, tmp_path: Path) -> list[str]:
    """An ALBEF, and pictures to tune it on."""
    pack(captioned(8), tmp_path / "shards", PackOptions(samples_per_shard=10))
    checkpoint.save(tiny_albef(tmp_path / "words"), tmp_path / "albef", name="albef")
    start = [f"out={tmp_path / 'run'}", f"model.pretrained={tmp_path / 'albef'}"]
    return [*start, f"data.train={tmp_path / 'shards'}", "train.steps=4", *SETTINGS]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["lora.targets=['fusion.*']", "lora.rank=2"], r"learn: .* fusion\.\*, .* lora\.targets$"),
        (
            [FUSION_ALONE],
            r"learn: .*, fusion\.\*, the objectives \(contrastive\) .* optim\.freeze$",
        ),
        ([FUSION_ALONE, "train.accum_freq=2"], r"learn: .*, fusion\.\*, "),
        (["optim.freeze=['*','!heads.*']"], r"learn: .*, heads\.\*, "),
        ([FUSION_ALONE, "optim.unfreeze_after_steps=2"], r"learn in the first 2 steps: .*fusion"),
    ],
)
def test_weights_that_no_objective_uses_are_no_training(
    more: list[str], words: str, given: list[str]
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        train(load_config(None, [*given, *more]))
    assert "\n" not in str(caught.value)


def test_weights_that_another_objective_uses_are_trained(given: list[str]) -> None:
    objectives = "objectives=[{name='contrastive'},{name='matching'}]"
    assert train(load_config(None, [*given, FUSION_ALONE, objectives])).step == 4
