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


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_are_read(whole: str, clip: Model, tmp_path: Path) -> None:
    folder = transformers_clip(tmp_path, clip)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, end = sorted(tensors), Path(whole).suffix
    parts = {f"1{end}": names[::2], f"2{end}": names[1::2]}
    for file, part in parts.items():
        some = {name: tensors[name] for name in part}
        if end == ".bin":
            torch.save(some, folder / file)
        else:
            save_file(some, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_vectors(read_model(folder).model, clip)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "blip"}, "of type 'blip'; clip and siglip can be read"),
        ("processor_config.json", {"image_processor": {"do_resize": False}}, "do_resize = False"),
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
    with pytest.raises(ConfigError, match=r"text_cfg\.width = 64 is not that of model\.pretr.* 32"):
        read_pretrained(source, {"text_cfg": {"width": 64}})
    with pytest.raises(ConfigError, match="not a clipserve model directory"):
        read_pretrained(str(tmp_path / "none"), None)
    with pytest.raises(
        ConfigError, match=r"has none of clipserve\.json, open_clip_config\.json and"
    ):
        read_pretrained(str(tmp_path), None)


def test_what_training_alone_sees_is_as_the_settings_have_it(clip: Model, tmp_path: Path) -> None:
    checkpoint.save(clip, tmp_path / "model", name="clip")
    source, half = str(tmp_path / "model"), {"vision_cfg": {"patch_dropout": 0.5}}
    dropping = read_pretrained(source, half).model
    assert type(dropping.network.visual.patch_dropout).__name__ == "PatchDropout"
    checkpoint.save(dropping, tmp_path / "dropping", name="clip")
    source = str(tmp_path / "dropping")
    assert read_pretrained(source, None).model.architecture["vision_cfg"]["patch_dropout"] == 0.5
    for none in ({"vision_cfg": {"patch_dropout": 0.0}}, clip_table()):
        found = read_pretrained(source, none).model
        assert type(found.network.visual.patch_dropout).__name__ == "Identity"
        assert_same_vectors(found, clip)


def test_defaults_need_not_be_written_down(clip: Model, tmp_path: Path) -> None:
    """As transformers' reader does not know what whoever wrote the settings left out."""
    checkpoint.save(clip, tmp_path / "model", name="clip")
    vision = clip_table()["vision_cfg"] | {"mlp_ratio": 4.0, "pool_type": "tok"}
    table = clip_table() | {"vision_cfg": vision, "quick_gelu": False, "init_logit_scale": 1.0}
    assert_same_vectors(read_pretrained(str(tmp_path / "model"), table).model, clip)
    table["quick_gelu"] = True
    with pytest.raises(ConfigError, match=r"quick_gelu = True is not that of .* False"):
        read_pretrained(str(tmp_path / "model"), table)


def test_a_start_is_named_by_the_fingerprint_that_an_import_gives_it(
    clip: Model, tmp_path: Path
) -> None:
    folder = transformers_clip(tmp_path, clip)
    fingerprint, _ = import_model(folder, tmp_path / "ours")
    for source, name in ((folder, "theirs"), (tmp_path / "ours", "theirs")):
        table = {"vision_cfg": {"patch_dropout": 0.5}}
        told = read_pretrained(str(source), table).model.info.training
        assert told == {"start": name, "start_fingerprint": fingerprint}


def test_an_import_of_a_directory_keeps_what_is_known_of_its_data(
    clip: Model, tmp_path: Path
) -> None:
    training = {"step": 3}
    checkpoint.save(clip, tmp_path / "a", name="a", training=training, data_fingerprint="d")
    fingerprint, _ = import_model(tmp_path / "a", tmp_path / "same")
    import_model(tmp_path / "a", tmp_path / "larger", image_size=64)
    same, larger = (checkpoint.verify(tmp_path / name) for name in ("same", "larger"))
    assert (same["training"], same["data_fingerprint"]) == (training, "d")
    assert larger["training"] == {"start": "a", "start_fingerprint": fingerprint}
    assert larger["data_fingerprint"] == "d"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """hub(NAME) -> the folder of that repository in huggingface_hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name: str) -> Path:
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0123")
        (place / "snapshots" / "0123").mkdir(parents=True)
        return place / "snapshots" / "0123"

    return make


def test_a_model_in_the_cache_of_the_hub_is_found_by_its_name(
    hub: Any, clip: Model, tmp_path: Path
) -> None:
    theirs = transformers_clip(tmp_path, clip)
    folder = hub("owner/model")
    for file in theirs.iterdir():
        (folder / file.name).symlink_to(file)
    found = read_model(Path("hf-hub:owner/model")).model
    assert found.info.name == "model"
    assert_same_vectors(found, clip)
    assert_same_vectors(read_pretrained("hf-hub:owner/model", None).model, clip)
    with pytest.raises(
        ConfigError, match=r"no model owner/other, and nothing is downloaded; fetch"
    ):
        read_model(Path("hf-hub:owner/other"))
    with pytest.raises(ConfigError, match="is no name of a model"):
        read_model(Path("hf-hub:a/b/c"))


@pytest.fixture
def tagged(named: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What open_clip knows of tiny-clip:some, to be filled in."""
    from open_clip import pretrained

    config: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(pretrained._PRETRAINED, named, {"some": config})
    return config


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_open_clip_knows_are_found_by_their_tag(
    form: str, hub: Any, tagged: dict[str, Any], clip: Model
) -> None:
    folder, weights = hub("owner/tiny"), clip.network.state_dict()
    if form == "safetensors":
        save_file(weights, folder / "open_clip_model.safetensors")
    else:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    tagged |= {"hf_hub": "owner/tiny/", "quick_gelu": True}
    read = read_model(Path("tiny-clip:some"))
    assert read.notes == []
    assert read.model.architecture == clip_table() | {"quick_gelu": True}
    assert read.model.info.name == "tiny-clip:some"
    assert read.model.transform.resize_mode == "squash"
    assert read.model.transform.size == (32, 32)
    own = read.model.network.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in weights)


def test_weights_in_open_clips_own_cache_are_found_too(
    hub: Any, tagged: dict[str, Any], clip: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tagged |= {"hf_hub": "owner/tiny/", "url": "https://weights.test/tiny-0123.pt"}
    with pytest.raises(
        ConfigError, match="in no cache of .*; fetch https://weights.test/tiny-0123"
    ):
        read_model(Path("tiny-clip:some"))
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    torch.save(clip.network.state_dict(), tmp_path / ".cache" / "clip" / "tiny-0123.pt")
    assert read_model(Path("tiny-clip:some")).model.architecture == clip_table()


def test_a_tag_that_open_clip_does_not_know_is_refused_with_those_that_it_does() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'laion' of ViT-B-32; it knows openai, "):
        read_model(Path("ViT-B-32:laion"))
    with pytest.raises(ConfigError, match="no architecture 'ViT-B-33'; did you mean ViT-B-32"):
        read_model(Path("ViT-B-33:openai"))


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
