import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, timm_vision, tiny_albef
from conftest import make_picture
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import clipserve
from clipserve import checkpoint
from clipserve.errors import CheckpointError
from clipserve.model import Model, create

TEXTS = ["a cat", "two dogs in a house"]


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_what_is_saved_embeds_as_before(tiny_model: Model, tmp_path: Path) -> None:
    fingerprint = checkpoint.save(tiny_model, tmp_path / "m", name="m")
    loaded = checkpoint.load_for_training(tmp_path / "m")
    assert loaded.info.fingerprint == fingerprint
    pictures = [make_picture(seed=1), make_picture(90, 50, seed=2)]
    before = tiny_model.embed_images(pictures), tiny_model.embed_texts(TEXTS)
    after = loaded.embed_images(pictures), loaded.embed_texts(TEXTS)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)


def test_open_clip_loads_the_directory_and_agrees(model_dir: Path) -> None:
    import open_clip

    ours = clipserve.load(model_dir, device="cpu", dtype="fp32")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_dir}")
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_dir}")
    pictures = [make_picture(70, 50, seed=i) for i in range(3)]
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    assert torch.equal(pixels, torch.stack([ours.transform(picture) for picture in pictures]))
    with torch.no_grad():
        image = theirs.encode_image(pixels, normalize=True).numpy()
        text = theirs.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    assert np.abs(image - ours.embed_images(pictures)).max() < 1e-5
    assert np.abs(text - ours.embed_texts(TEXTS)).max() < 1e-5


def test_one_flipped_bit_anywhere_is_refused(copy: Path) -> None:
    random = np.random.default_rng(0)
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        original = file.read_bytes()
        for place in random.integers(0, len(original), 25):
            damaged = bytearray(original)
            damaged[place] ^= 1 << int(random.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                checkpoint.verify(copy)
            with pytest.raises(CheckpointError):
                checkpoint.load(copy)
        file.write_bytes(original)
    checkpoint.verify(copy)


def test_damage_names_the_file(copy: Path) -> None:
    (copy / "README.md").write_text("changed")
    with pytest.raises(CheckpointError, match=r"README\.md is damaged"):
        checkpoint.verify(copy)
    (copy / checkpoint.WEIGHTS).rename(copy / "elsewhere")
    (copy / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md: No such file"):
        checkpoint.verify(copy)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the description as if an honest writer had written it so."""
    file = folder / checkpoint.MANIFEST
    description = json.loads(file.read_text()) | changes
    description["checksum"] = checkpoint._checksum(description)
    file.write_text(checkpoint._canonical(description))


def test_a_newer_format_says_so(copy: Path) -> None:
    rewrite(copy, format_version=2)
    with pytest.raises(CheckpointError, match="format 2.*install a newer clipserve"):
        checkpoint.load(copy)


def test_weights_of_another_architecture_are_refused(copy: Path) -> None:
    architecture = checkpoint.read_description(copy)["architecture"]
    architecture["vision_cfg"]["width"] = 64
    rewrite(copy, architecture=architecture)
    with pytest.raises(CheckpointError, match="does not fit its architecture"):
        checkpoint.load(copy)


def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a model directory"):
        clipserve.load(tmp_path / "nowhere")


def test_of_a_runs_directory_the_model_within_is_named(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to(model_dir)
    with pytest.raises(CheckpointError, match="it is a training run: name its model .*run/latest$"):
        clipserve.load(tmp_path / "run")


@pytest.fixture
def moving(
    model_dir: Path, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """A link that leads to another model once a description was read; the fingerprint before."""
    with torch.no_grad():
        tiny_model.network.visual.proj.add_(1)
    checkpoint.save(tiny_model, tmp_path / "later", name="later")
    link = tmp_path / "best"
    link.symlink_to(model_dir)
    read = checkpoint.read_description

    def read_and_move(directory: Path) -> dict[str, Any]:
        description = read(directory)
        link.unlink()
        link.symlink_to(tmp_path / "later")
        return description

    monkeypatch.setattr(checkpoint, "read_description", read_and_move)
    return link, read(model_dir)["fingerprint"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_link_that_moves_while_a_model_is_loaded_gives_the_one_it_led_to(
    moving: tuple[Path, str], model_dir: Path, verify: bool
) -> None:
    link, fingerprint = moving
    model = clipserve.load(link, "cpu", "fp32", verify=verify)
    assert model.info.fingerprint == fingerprint
    want = clipserve.load(model_dir, "cpu", "fp32").embed_texts(CAPTIONS)
    np.testing.assert_array_equal(model.embed_texts(CAPTIONS), want)


def test_a_link_that_moves_while_a_model_is_verified_harms_nothing(
    moving: tuple[Path, str],
) -> None:
    link, fingerprint = moving
    assert checkpoint.verify(link)["fingerprint"] == fingerprint


def test_a_path_without_links_is_named_as_it_was_given(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_dir.parent)
    assert checkpoint.pin(model_dir.name) == Path(model_dir.name)
    with pytest.raises(CheckpointError, match="^nowhere is not a model directory"):
        checkpoint.verify("nowhere")


def test_the_fingerprint_names_the_function_not_the_run(tiny_model: Model, tmp_path: Path) -> None:
    first = checkpoint.save(tiny_model, tmp_path / "a", name="a", training={"loss": 1.0})
    same = checkpoint.save(tiny_model, tmp_path / "b", name="b", training={"loss": 2.0})
    assert first == same
    with torch.no_grad():
        tiny_model.network.logit_scale += 1e-3
    assert checkpoint.save(tiny_model, tmp_path / "c", name="c") != first


def test_a_failed_save_leaves_the_old_directory(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.save(tiny_model, tmp_path / "m", name="m")
    monkeypatch.setattr(checkpoint, "_model_card", lambda description: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tiny_model, tmp_path / "m", name="m")
    assert checkpoint.verify(tmp_path / "m")["fingerprint"] == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saving_again_replaces(tiny_model: Model, tmp_path: Path) -> None:
    checkpoint.save(tiny_model, tmp_path / "m", name="old")
    checkpoint.save(tiny_model, tmp_path / "m", name="new")
    assert clipserve.load(tmp_path / "m").info.name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_loading_takes_every_value_from_the_file(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    for custom in (False, True):
        model = create(architecture | {"custom_text": custom}).eval()
        checkpoint.save(model, tmp_path / "m", name="m")
        loaded = checkpoint.load_for_training(tmp_path / "m")
        for name, value in model.network.state_dict().items():
            assert torch.equal(loaded.network.state_dict()[name], value)
        assert torch.equal(loaded._text_tower.attn_mask, model._text_tower.attn_mask)


def test_loading_and_embedding_import_neither_compiler_nor_model_zoo(model_dir: Path) -> None:
    code = (
        "import sys, clipserve\n"
        f"model = clipserve.load({str(model_dir)!r}, device='cpu')\n"
        "model.zero_shot(['a', 'b']).classify([])\n"
        "slow = {'torch._dynamo', 'sympy', 'torchvision', 'transformers', 'timm'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_timm_tower_survives_the_round_trip(architecture: dict[str, Any], tmp_path: Path) -> None:
    architecture["vision_cfg"] = {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    }
    model = create(architecture).eval()
    checkpoint.save(model, tmp_path / "m", name="m")
    loaded = clipserve.load(tmp_path / "m", device="cpu", dtype="fp32")
    pictures = [make_picture()]
    assert np.allclose(loaded.embed_images(pictures), model.embed_images(pictures), atol=1e-6)
    half = clipserve.load(tmp_path / "m", device="cpu", dtype="bf16")
    assert (half.embed_images(pictures) * loaded.embed_images(pictures)).sum() > 0.999


# ---- ALBEF


@pytest.fixture(params=["open_clip", "timm"])
def albef_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = tiny_albef(tmp_path / "words", timm_vision() if request.param == "timm" else None)
    checkpoint.save(model, tmp_path / "albef", name="albef", objective=("matching",))
    return tmp_path / "albef"


def test_an_albef_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    model = tiny_albef(tmp_path / "words")
    fingerprint = checkpoint.save(model, tmp_path / "m", name="m")
    shutil.rmtree(tmp_path / "words")
    loaded = checkpoint.load_for_training(tmp_path / "m")
    assert loaded.info.fingerprint == fingerprint
    assert loaded.architecture == model.architecture
    before, after = model.network.state_dict(), loaded.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert after["logit_scale"].dtype == torch.float64
    assert np.array_equal(model.embed_texts(CAPTIONS), loaded.embed_texts(CAPTIONS))
    pictures = [make_picture(seed=i) for i in range(3)]
    assert np.array_equal(model.match(pictures, CAPTIONS[:3]), loaded.match(pictures, CAPTIONS[:3]))


def test_an_albef_has_files_of_its_own(albef_dir: Path) -> None:
    names = {file.name for file in albef_dir.iterdir()}
    expected = {"clipserve.json", "README.md", "tokenizer", checkpoint.TOWERS, checkpoint.FUSION}
    assert names == expected
    card = (albef_dir / "README.md").read_text()
    assert "open_clip" not in card
    assert "model.match" in card
    towers = load_file(albef_dir / checkpoint.TOWERS)
    fusion = load_file(albef_dir / checkpoint.FUSION)
    parts = {name.split(".")[0] for name in towers}
    assert parts == {"visual", "text", "text_projection", "logit_scale"}
    assert {name.split(".")[0] for name in fusion} == {"fusion", "matching_head", "token_head"}


def test_each_file_of_an_albef_decides_its_fingerprint(tmp_path: Path) -> None:
    model = tiny_albef(tmp_path / "words")
    found = {checkpoint.save(model, tmp_path / "a", name="a")}
    for parameter in (model.network.logit_scale, model.network.matching_head.bias):
        with torch.no_grad():
            parameter += 1e-3
        found.add(checkpoint.save(model, tmp_path / "b", name="b"))
    assert len(found) == 3


@pytest.mark.parametrize("kind", ["clip", "albef"])
def test_a_fingerprint_is_found_without_writing_weights(
    kind: str, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model if kind == "clip" else tiny_albef(tmp_path / "words")
    saved = checkpoint.save(model, tmp_path / "m", name="m")
    monkeypatch.setattr(checkpoint, "save_tensors", lambda *arguments: pytest.fail("written"))
    assert checkpoint.fingerprint(model) == saved


@pytest.mark.parametrize("name", [checkpoint.TOWERS, checkpoint.FUSION])
def test_a_damaged_or_missing_file_of_an_albef_is_named(albef_dir: Path, name: str) -> None:
    file = albef_dir / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        checkpoint.load(albef_dir)
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(albef_dir)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(albef_dir, verify=False)


def test_momentum_weights_travel_but_decide_nothing(tmp_path: Path) -> None:
    model = tiny_albef(tmp_path / "words")
    momentum = {"queue.image": torch.rand(4, 16)}
    without = checkpoint.save(model, tmp_path / "a", name="a")
    assert checkpoint.save(model, tmp_path / "b", name="b", momentum=momentum) == without
    found = checkpoint.load_momentum(tmp_path / "b")
    assert found is not None
    assert torch.equal(found["queue.image"], momentum["queue.image"])
    assert checkpoint.load_momentum(tmp_path / "a") is None
    assert checkpoint.MOMENTUM in checkpoint.verify(tmp_path / "b")["files"]
    (tmp_path / "b" / checkpoint.MOMENTUM).unlink()
    with pytest.raises(CheckpointError, match=checkpoint.MOMENTUM):
        checkpoint.verify(tmp_path / "b")


def test_an_albef_without_its_vocabulary_is_damaged(albef_dir: Path) -> None:
    shutil.rmtree(albef_dir / "tokenizer")
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="tokenizer"):
            checkpoint.load(albef_dir, verify=verify)


def test_loading_fills_no_weights_with_random_numbers(model_dir: Path) -> None:
    """It would take most of the time, and be overwritten."""
    drawn = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            drawn.extend([str(func)] if "uniform_" in str(func) or "normal_" in str(func) else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        checkpoint.load_for_training(model_dir)
    assert drawn == []
