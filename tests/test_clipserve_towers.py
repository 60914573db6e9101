import subprocess
import sys
from typing import Any

import pytest
import torch
from albefs import albef_table, open_clip_vision
from cocas import coca_architecture

from clipserve.errors import ConfigError
from clipserve.towers import PatchDropout, architecture_config, build_network, is_plain


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="ViT-B-32"):
        architecture_config("ViT-B32")


def test_architecture_name_cannot_leave_the_folder() -> None:
    with pytest.raises(ConfigError, match="no architecture"):
        architecture_config("../model_configs/ViT-B-32")


@pytest.mark.parametrize(
    "broken",
    [{}, {"embed_dim": 8}, {"embed_dim": 8, "vision_cfg": {"wdith": 3}, "text_cfg": {}}],
)
def test_a_table_open_clip_cannot_build_is_a_config_error(broken: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_network(broken)


def test_building_does_not_change_the_table(architecture: dict[str, Any]) -> None:
    before = str(architecture)
    build_network(architecture)
    assert str(architecture) == before


def test_timm_and_resnet_towers_are_not_plain(architecture: dict[str, Any]) -> None:
    assert is_plain(architecture)
    assert not is_plain(architecture_config("RN50"))
    assert not is_plain(architecture_config("ViT-B-16-SigLIP"))


def test_a_timm_tower_builds(architecture: dict[str, Any]) -> None:
    architecture["vision_cfg"] = {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    }
    network: Any = build_network(architecture).eval()
    assert network.visual(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_patch_dropout_keeps_the_class_token_and_the_patches_that_open_clips_would() -> None:
    from open_clip.transformer import PatchDropout as OpenClips

    x = torch.randn(3, 8, 5)
    torch.manual_seed(0)
    ours = PatchDropout(0.4)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, OpenClips(0.4)(x))
    assert ours.shape == (3, 5, 5)
    assert torch.equal(ours[:, 0], x[:, 0])
    assert PatchDropout(0.4).eval()(x) is x


def test_patch_dropout_draws_where_the_patches_are() -> None:
    dropped = PatchDropout(0.5)(torch.empty(3, 5, 2, device="meta"))
    assert (dropped.shape, dropped.device.type) == ((3, 3, 2), "meta")


def test_every_tower_of_open_clips_has_our_patch_dropout(architecture: dict[str, Any]) -> None:
    plain: Any = build_network(architecture)
    coca, albef = coca_architecture(), albef_table(open_clip_vision())
    for table in (architecture, architecture | {"custom_text": True}, coca, albef):
        table["vision_cfg"]["patch_dropout"] = 0.5
        tower: Any = build_network(table).visual
        assert isinstance(tower.patch_dropout, PatchDropout)
    architecture["vision_cfg"]["patch_dropout"] = 0.5
    assert build_network(architecture).state_dict().keys() == plain.state_dict().keys()


def test_the_published_coca_tables_build() -> None:
    with torch.device("meta"):
        for name in ("coca_ViT-B-32", "coca_base"):
            network: Any = build_network(architecture_config(name))
            assert network.text_decoder.text_projection.shape[1] == network.text.vocab_size


def test_a_fresh_coca_depends_on_the_seed_alone() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(build_network(coca_architecture()))
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    output = first["text_decoder.text_projection"]
    assert output.std().item() == pytest.approx(32**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("text_cfg", {"no_causal_mask": True}, "causal"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "causal"),
        ("text_cfg", {"output_tokens": False}, "output_tokens"),
        ("vision_cfg", {"output_tokens": False}, "output_tokens"),
        ("vision_cfg", {"timm_model_name": "resnet10t"}, "output_tokens"),
        ("vision_cfg", {"attentional_pool": False, "width": 48}, "wide"),
        ("multimodal_cfg", {"width": 48}, "wide"),
        ("multimodal_cfg", {"context_length": 14}, "context_length"),
        ("multimodal_cfg", {"wdith": 48}, "cannot build"),
    ],
)
def test_a_coca_that_could_not_caption_is_refused(
    part: str, change: dict[str, Any], reason: str
) -> None:
    table = coca_architecture()
    table[part] |= change
    with pytest.raises(ConfigError, match=reason):
        build_network(table)


LIGHT_AND_FULL_AGREE = """
import json, sys, torch
from clipserve.towers import build_network, tokenizer_module, zero_shot_module
table = json.loads(sys.argv[1])
torch.manual_seed(0); light = build_network(table).eval()
zero_shot_module()
tokens = tokenizer_module().SimpleTokenizer(context_length=16)(["a cat", "two dogs"])
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torchvision", "timm", "transformers", "open_clip"}, loaded
import open_clip
assert "torchvision" in sys.modules and hasattr(open_clip, "create_model_and_transforms")
torch.manual_seed(0); full = open_clip.model.CLIP(**table).eval()
assert type(full) is not type(light)
pixels = torch.rand(2, 3, 32, 32)
with torch.no_grad():
    assert torch.equal(light.encode_image(pixels), full.encode_image(pixels))
    assert torch.equal(light.encode_text(tokens), full.encode_text(tokens))
assert torch.equal(tokens, open_clip.SimpleTokenizer(context_length=16)(["a cat", "two dogs"]))
assert type(build_network(table)) is open_clip.model.CLIP
"""


def test_the_light_import_gives_open_clips_own_network(architecture: dict[str, Any]) -> None:
    import json

    done = subprocess.run(
        [sys.executable, "-c", LIGHT_AND_FULL_AGREE, json.dumps(architecture)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
