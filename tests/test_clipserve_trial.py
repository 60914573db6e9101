"""Fresh networks that could never embed are refused, in one line, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import albef_table, open_clip_vision, timm_vision, vocabulary
from cocas import coca_architecture
from conftest import tiny_architecture

from clipserve.errors import ConfigError
from clipserve.model import create

TIMM = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32}


def check_refused(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        create(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("vision_cfg", {"patch_size": 128}, r"a picture of 32x32 .*: .*Kernel size"),
        ("vision_cfg", {"patch_size": 0}, "cannot build model.architecture: .* by zero"),
        ("vision_cfg", {"image_size": 0}, r"vision_cfg\.image_size gives pictures of 0x0"),
        ("vision_cfg", {"image_size": [32, 0]}, "pictures of 0x32 pixels"),
        ("vision_cfg", {"patch_dropout": 1.0}, r"vision_cfg\.patch_dropout = 1\.0 is no part"),
        ("vision_cfg", {"patch_dropout": 2}, r"vision_cfg\.patch_dropout = 2 is no part"),
        ("text_cfg", {"vocab_size": 100}, r"vocab_size = 100 is less than the 49408 tokens"),
        ("text_cfg", {"context_length": 1}, r"context_length = 1 leaves no room for a word"),
        ("text_cfg", {"pool_type": "none"}, r"makes \(16, 16\) of texts"),
    ],
)
def test_sizes_that_do_not_fit_are_told(section: str, change: dict[str, Any], words: str) -> None:
    table = tiny_architecture()
    check_refused(table | {section: table[section] | change}, words)


def test_a_tower_for_pictures_of_another_size_is_told() -> None:
    check_refused(tiny_architecture() | {"vision_cfg": TIMM}, r"Input height \(32\) doesn't match")


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        (open_clip_vision(patch_size=128), {}, "Kernel size"),
        (timm_vision(patch_size=128), {}, "Kernel size"),
        (timm_vision(patch_dropout=1.0), {}, r"patch_dropout = 1\.0"),
        (timm_vision(image_size=0), {}, "timm cannot build 'vit_base_patch16_224'"),
        (None, {"context_length": 2}, "leaves no room for a word"),
    ],
)
def test_an_albef_is_tried_out_too(
    vision: dict[str, Any] | None, text: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = str(vocabulary(tmp_path / "words"))
    check_refused(albef_table(vision, tokenizer_path=path, **text), words)


@pytest.mark.parametrize("table", [tiny_architecture(), coca_architecture()])
def test_a_trial_leaves_no_trace(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table["vision_cfg"] |= {"patch_dropout": 0.5}
    torch.manual_seed(0)
    tried, after = create(table), torch.get_rng_state()
    monkeypatch.setattr("clipserve.model.try_out", lambda model: None)
    torch.manual_seed(0)
    untried = create(table)
    assert torch.equal(torch.get_rng_state(), after)
    pairs = zip(tried.network.modules(), untried.network.modules(), strict=True)
    assert all(one.training == other.training for one, other in pairs)
    theirs = untried.network.state_dict()
    assert all(torch.equal(value, theirs[n]) for n, value in tried.network.state_dict().items())
