import math
from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import albef_table, open_clip_vision, timm_vision, tiny_albef
from safetensors.torch import save_file

from clipserve import checkpoint
from clipserve.albef import Albef, build
from clipserve.errors import CheckpointError
from clipserve.model import create
from clipserve.weights import interpolate_positions, load_bert, load_image_tower

# ---- position tables


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, which is PyTorch's bicubic."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size", [2, 5, 6])
def test_positions_are_interpolated_bicubically(size: int) -> None:
    grid = 3
    table = torch.randn(1, 1 + grid * grid, 2, generator=torch.Generator().manual_seed(0))
    found = interpolate_positions(table, size)
    assert found.shape == (1, 1 + size * size, 2)
    assert torch.equal(found[0, 0], table[0, 0])
    for row in range(size):
        for column in range(size):
            y, x = ((place + 0.5) * grid / size - 0.5 for place in (row, column))
            expected = torch.zeros(2)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = min(max(i, 0), grid - 1) * grid + min(max(j, 0), grid - 1)
                    expected += cubic(y - i) * cubic(x - j) * table[0, 1 + inside]
            assert torch.allclose(found[0, 1 + row * size + column], expected, atol=1e-5)


def test_the_same_grid_changes_nothing() -> None:
    table = torch.randn(1, 10, 4)
    assert interpolate_positions(table, 3) is table


def test_positions_that_are_no_square_are_refused() -> None:
    with pytest.raises(CheckpointError, match="8 position embeddings"):
        interpolate_positions(torch.randn(1, 8, 4), 3)


# ---- BERT


def bert_folder(folder: Path, *, head: bool = True, old: bool = False, **changes: Any) -> Path:
    """A folder as transformers saves one, with weights of all kinds away from their start."""
    from transformers import BertConfig, BertForPreTraining, BertModel

    settings = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 40,
    } | changes
    torch.manual_seed(3)
    network = (BertForPreTraining if head else BertModel)(BertConfig(**settings))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    if old:
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in network.state_dict().items()
        }
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def fresh(vision: dict[str, Any] | None = None) -> Albef:
    torch.manual_seed(0)
    return build(albef_table(vision)).eval()


@pytest.mark.parametrize("options", [{}, {"head": False}, {"old": True}])
def test_text_and_fusion_layers_come_from_a_bert(options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertModel

    folder = bert_folder(tmp_path / "bert", **options)
    network, before = fresh(), fresh().state_dict()
    load_bert(network, folder)
    if not options.get("old"):
        theirs = BertModel.from_pretrained(folder, num_hidden_layers=2, add_pooling_layer=False)
        ids = torch.tensor([[2, 9, 17, 3, 0], [2, 44, 3, 0, 0]])
        with torch.no_grad():
            expected = theirs.eval()(ids, attention_mask=(ids != 0).long()).last_hidden_state
            states, _ = network.encode_text_states(ids)
        assert (states[ids != 0] - expected[ids != 0]).abs().max() < 1e-5
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    kept = network.state_dict().keys() - changed
    parts = {"visual", "text_projection", "matching_head", "logit_scale"}
    parts |= set() if options.get("head", True) else {"token_head"}
    assert {name.split(".")[0] for name in kept if "cross_attention" not in name} == parts
    assert all(name in kept for name in before if "cross_attention" in name)


def test_the_fusion_layers_are_the_berts_next(tmp_path: Path) -> None:
    from transformers import BertModel

    folder = bert_folder(tmp_path / "bert")
    network: Any = fresh()
    load_bert(network, folder)
    theirs = BertModel.from_pretrained(folder).encoder.layer[2].attention.self.query.weight
    assert torch.equal(network.fusion[0].self_attention.query.weight, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, r"words.weight would be \(100, 32\), this model's is \(200, 32\)"),
        ({"num_hidden_layers": 3}, r"lacks encoder\.layer\.3"),
        ({"hidden_size": 64}, "would be"),
    ],
)
def test_a_bert_that_does_not_fit_is_refused_before_anything_changes(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network, before = fresh(), fresh().state_dict()
    with pytest.raises(CheckpointError, match=message):
        load_bert(network, bert_folder(tmp_path / "bert", **change))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_bert(fresh(), tmp_path)


# ---- image towers


def test_a_deit_file_fills_the_timm_tower(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(5)
    options: dict[str, Any] = {
        "img_size": 32,
        "embed_dim": 64,
        "depth": 1,
        "num_heads": 1,
        "num_classes": 10,
    }
    deit: Any = timm.create_model("vit_base_patch16_224", **options).eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    network = fresh(timm_vision())
    load_image_tower(network, tmp_path / "deit.pth")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states, _ = network.encode_image_states(pixels)
        assert torch.allclose(states, deit.forward_features(pixels), atol=1e-6)


def test_another_input_size_is_interpolated(tmp_path: Path) -> None:
    import timm

    options: dict[str, Any] = {"img_size": 64, "embed_dim": 64, "depth": 1, "num_heads": 1}
    deit: Any = timm.create_model("vit_base_patch16_224", **options)
    save_file(deit.state_dict(), tmp_path / "deit.safetensors")
    network: Any = fresh(timm_vision())
    load_image_tower(network, tmp_path / "deit.safetensors")
    expected = interpolate_positions(deit.pos_embed.detach(), 2)
    assert torch.equal(network.visual.trunk.pos_embed, expected)


def test_the_image_tower_of_a_model_directory_is_taken(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    clip = create(architecture).eval()
    checkpoint.save(clip, tmp_path / "clip", name="clip")
    network = fresh()
    load_image_tower(network, tmp_path / "clip")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.visual(pixels), clip.network.visual(pixels))


def test_a_projection_of_another_size_stays_fresh(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    clip = create(architecture | {"embed_dim": 24})
    torch.save(clip.network.state_dict(), tmp_path / "clip.pt")
    network = fresh(open_clip_vision(image_size=48))
    before = network.visual.state_dict()["proj"].clone()
    load_image_tower(network, tmp_path / "clip.pt")
    own, theirs = network.visual.state_dict(), clip.network.visual.state_dict()
    assert torch.equal(own["proj"], before)
    assert torch.equal(own["conv1.weight"], theirs["conv1.weight"])
    expected = interpolate_positions(theirs["positional_embedding"][None], 3)[0]
    assert torch.equal(own["positional_embedding"], expected)


def test_a_clip_with_a_timm_tower_gives_its_trunk(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    clip = create(architecture | {"vision_cfg": vision | {"timm_proj": "linear"}})
    checkpoint.save(clip, tmp_path / "clip", name="clip")
    network = fresh(vision)
    load_image_tower(network, tmp_path / "clip")
    own, theirs = network.visual.state_dict(), clip.network.visual.state_dict()
    for name, tensor in theirs.items():
        assert name.startswith("head.") or torch.equal(own[name], tensor)


def test_the_image_tower_of_another_albef_is_taken_with_its_projection(tmp_path: Path) -> None:
    other = tiny_albef(tmp_path / "words", timm_vision())
    checkpoint.save(other, tmp_path / "albef", name="albef")
    torch.manual_seed(9)
    network = build(albef_table(timm_vision()))
    load_image_tower(network, tmp_path / "albef")
    own, theirs = network.visual.state_dict(), other.network.visual.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(CheckpointError, match="no model directory"):
        load_image_tower(network, tmp_path / "words")


def test_a_tower_of_another_kind_is_refused(architecture: dict[str, Any], tmp_path: Path) -> None:
    torch.save(create(architecture).network.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="lacks trunk.*left over"):
        load_image_tower(fresh(timm_vision()), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="would be"):
        load_image_tower(fresh(open_clip_vision(width=64)), tmp_path / "clip.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        load_image_tower(fresh(), tmp_path / "list.pt")
