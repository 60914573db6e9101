import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encode, make_picture
from safetensors.torch import load_file, save_file
from transplants import (
    clip_table,
    cosines,
    register_siglip_towers,
    shaken,
    tiny_siglip,
    write_words,
)

from clipserve import checkpoint
from clipserve.convert import export_model, import_model, read_model
from clipserve.convert.reading import read_pretrained
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model, create
from clipserve.towers import architecture_config

PICTURES = [encode(make_picture(seed=seed)) for seed in range(3)]
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.fixture
def clip() -> Model:
    torch.manual_seed(0)
    return shaken(create(clip_table()))  # type: ignore[no-any-return]


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an architecture that open_clip would know, were it of any use."""
    from clipserve.convert import open_clip_files

    def known(name: str) -> dict[str, Any]:
        return clip_table() if name == "tiny-clip" else architecture_config(name)

    monkeypatch.setattr(open_clip_files, "architecture_config", known)
    return "tiny-clip"


def assert_same_vectors(a: Model, b: Model) -> None:
    assert cosines(a.embed_images(PICTURES), b.embed_images(PICTURES)).min() > 0.999999
    assert cosines(a.embed_texts(TEXTS), b.embed_texts(TEXTS)).min() > 0.999999


@pytest.mark.parametrize("form", ["safetensors", "pt", "training checkpoint"])
def test_a_file_of_weights_is_read_with_its_architecture(
    form: str, clip: Model, named: str, tmp_path: Path
) -> None:
    weights = clip.network.state_dict()
    file = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(weights, file)
    elif form == "pt":
        torch.save(weights, file)
    else:
        inner = {f"module.{name}": tensor for name, tensor in weights.items()}
        torch.save({"epoch": 3, "state_dict": inner}, file)
    read = read_model(file, architecture=named)
    assert_same_vectors(read.model, clip)
    with pytest.raises(ConfigError, match=r"name the architecture, such as ViT-B-32"):
        read_model(file)
    with pytest.raises(CheckpointError, match=r"lacks .* and \d+ more"):
        read_model(file, architecture="ViT-B-32")


def test_half_precision_becomes_float32(clip: Model, named: str, tmp_path: Path) -> None:
    halves = {name: tensor.half() for name, tensor in clip.network.state_dict().items()}
    save_file(halves, tmp_path / "clip.safetensors")
    found = read_model(tmp_path / "clip.safetensors", architecture=named).model.network.state_dict()
    assert all(torch.equal(found[name], half.float()) for name, half in halves.items())


def test_an_open_clip_directory_is_read_with_its_transform(clip: Model, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    config = {"model_cfg": clip.architecture, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(clip.network.state_dict(), folder / "open_clip_pytorch_model.bin")
    _, notes = import_model(folder, tmp_path / "ours")
    found = checkpoint.load_for_training(tmp_path / "ours")
    assert notes == []
    assert (found.transform.resize_mode, found.transform.mean) == ("squash", (0.5, 0.5, 0.5))
    assert found.transform.size == (32, 32)
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds none of open_clip_model.safetensors"):
        read_model(folder)


def transformers_clip(folder: Path, clip: Model) -> Path:
    checkpoint.save(clip, folder / "model", name="clip")
    export_model(folder / "model", folder / "theirs", "transformers")
    return folder / "theirs"


def test_an_older_transformers_directory_is_read_too(clip: Model, tmp_path: Path) -> None:
    """preprocessor_config.json, pytorch_model.bin, position_ids, eos_token_id 2."""
    folder = transformers_clip(tmp_path, clip)
    whole = folder / "processor_config.json"
    images = json.loads(whole.read_text())["image_processor"]
    images |= {"size": 32, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    whole.unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_vectors(read_model(folder).model, clip)


def test_weights_in_several_files_are_read(clip: Model, tmp_path: Path) -> None:
    folder = transformers_clip(tmp_path, clip)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_vectors(read_model(folder).model, clip)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "blip"}, "of type 'blip'; clip and siglip can be read"),
        ("processor_config.json", {"image_processor": {"do_resize": False}}, "has do_resize off"),
        ("processor_config.json", {"image_processor": {"resample": 0}}, "no bicubic or bilinear"),
        ("processor_config.json", {"image_processor": {"rescale_factor": 1.0}}, "is not 1/255"),
        (
            "processor_config.json",
            {"image_processor": {"size": {"shortest_edge": 40}}},
            "to 32 only",
        ),
        ("processor_config.json", {"image_processor": {"crop_size": 20}}, "cuts 20"),
        ("processor_config.json", {"image_processor": {"size": None}}, "resizes to None"),
    ],
)
def test_what_cannot_be_read_is_named(
    file: str, change: dict[str, Any], message: str, clip: Model, tmp_path: Path
) -> None:
    folder = transformers_clip(tmp_path, clip)
    content = json.loads((folder / file).read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_model(folder)


def test_a_clip_with_another_tokenizer_is_refused(clip: Model, tmp_path: Path) -> None:
    folder = transformers_clip(tmp_path, clip)
    words = write_words(tmp_path / "words")
    with pytest.raises(ConfigError, match="is not CLIP's"):
        read_model(folder, tokenizer=words)


def test_gelu_by_tanh_in_a_siglip_tower_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_siglip_towers(monkeypatch)
    checkpoint.save(tiny_siglip(write_words(tmp_path / "words")), tmp_path / "model", name="m")
    export_model(tmp_path / "model", tmp_path / "theirs", "transformers")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    for part in ("vision_config", "text_config"):
        config[part]["hidden_act"] = "gelu_pytorch_tanh"
    file.write_text(json.dumps(config))
    read = read_model(tmp_path / "theirs", image_size=64)
    assert read.notes == [
        "the image tower computes GELU exactly, not as gelu_pytorch_tanh",
        "image positions 2x2 -> 4x4: interpolated, bicubic",
    ]
    assert read.model.architecture["text_cfg"]["act_kwargs"] == {"approximate": "tanh"}
    with pytest.raises(ConfigError, match="timm has no tiny_siglip_96"):
        read_model(tmp_path / "theirs", image_size=96)


def test_sizes_change_on_the_way_in(clip: Model, tmp_path: Path) -> None:
    folder = transformers_clip(tmp_path, clip)
    fingerprint, notes = import_model(folder, tmp_path / "ours", context_length=40, image_size=64)
    assert notes == [
        "text positions 32 -> 40: the first 20 stay, the others are stretched, linearly",
        "image positions 4x4 -> 8x8: interpolated, bicubic",
    ]
    found = checkpoint.load_for_training(tmp_path / "ours")
    assert (found.context_length, found.transform.size) == (40, (64, 64))
    assert found.embed_texts(["many words " * 15]).shape == (1, 16)
    assert fingerprint != read_model(folder).model.info.fingerprint


def test_settings_may_ask_for_other_sizes_and_nothing_else(clip: Model, tmp_path: Path) -> None:
    checkpoint.save(clip, tmp_path / "model", name="clip")
    source = str(tmp_path / "model")
    read = read_pretrained(source, {"text_cfg": {"context_length": 24}})
    assert read.model.context_length == 24
    assert read.notes == ["text positions 32 -> 24: the first ones stay"]
    assert read_pretrained(source, clip_table()).notes == []
    with pytest.raises(ConfigError, match=r"not that of model\.pretrained"):
        read_pretrained(source, {"text_cfg": {"width": 64}})
    with pytest.raises(ConfigError, match="not a clipserve model directory"):
        read_pretrained(str(tmp_path / "none"), None)


def test_an_architecture_beside_a_directory_is_refused(clip: Model, tmp_path: Path) -> None:
    checkpoint.save(clip, tmp_path / "model", name="clip")
    with pytest.raises(ConfigError, match="leave 'ViT-B-32' out"):
        read_model(tmp_path / "model", architecture="ViT-B-32")


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "clip", "vision_config": {"hidden_size": "wide"}},
        {"model_type": "clip", "vision_config": 3},
    ],
)
def test_a_config_of_transformers_that_makes_no_sense_is_named(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json is no clip's: [^\n]+$"):
        read_model(tmp_path)


@pytest.mark.parametrize("model_cfg", [{}, [], {"vision_cfg": {}, "text_cfg": 3}])
def test_a_config_of_open_clip_that_makes_no_sense_is_named(model_cfg: Any, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    with pytest.raises(CheckpointError, match="no configuration of open_clip's"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "change", [{"resize_mode": "zoom"}, {"interpolation": "nearest"}, {"mean": [1]}, {"size": "x"}]
)
def test_a_preparation_that_is_not_known_is_refused(
    change: dict[str, Any], clip: Model, tmp_path: Path
) -> None:
    config = {"model_cfg": clip.architecture, "preprocess_cfg": change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(clip.network.state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=rf"preprocess_cfg\.{next(iter(change))}"):
        read_model(tmp_path)


def test_an_index_of_weights_without_files_is_named(clip: Model, tmp_path: Path) -> None:
    folder = transformers_clip(tmp_path, clip)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no files of weights"):
        read_model(folder)


def test_files_of_something_else_are_refused_without_advice_to_trust_them(
    named: str, tmp_path: Path
) -> None:
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": Path("x")}, tmp_path / "pickle.pt")
    for name in ("text.pt", "pickle.pt"):
        with pytest.raises(CheckpointError, match=name) as caught:
            read_model(tmp_path / name, architecture=named)
        assert "weights_only" not in str(caught.value)


def test_weights_that_are_not_finite_are_named(clip: Model, named: str, tmp_path: Path) -> None:
    weights = clip.network.state_dict() | {"logit_scale": torch.tensor(float("nan"))}
    save_file(weights, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="logit_scale holds values that are not finite"):
        read_model(tmp_path / "clip.safetensors", architecture=named)


def test_what_is_there_is_not_replaced_by_an_import(clip: Model, tmp_path: Path) -> None:
    checkpoint.save(clip, tmp_path / "model", name="clip")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        import_model(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_name_of_a_hub_is_not_looked_up(
    clip: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    seen = []

    def build(table: dict[str, Any]) -> Any:
        seen.append(constants.HF_HUB_OFFLINE)
        raise ConfigError("enough")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("clipserve.convert.reading.build_network", build)
    checkpoint.save(clip, tmp_path / "model", name="clip")
    with pytest.raises(ConfigError, match="enough"):
        read_model(tmp_path / "model")
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False


def test_an_image_smaller_than_a_patch_is_refused(clip: Model, tmp_path: Path) -> None:
    checkpoint.save(clip, tmp_path / "model", name="clip")
    with pytest.raises(ConfigError, match="less than one patch of 8"):
        read_model(tmp_path / "model", image_size=7)
