from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_architecture
from safetensors.torch import load_file

from clipserve import checkpoint
from clipserve.convert import export_model, import_model
from clipserve.errors import CheckpointError, ConfigError
from clipserve.interpolate import interpolate, load_pair, mix
from clipserve.model import create


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Of the architecture of `model_dir`, other weights."""
    return save(tmp_path / "tuned", seed=1)


def save(folder: Path, seed: int = 0, **more: Any) -> Path:
    torch.manual_seed(seed)
    model = create(tiny_architecture() | more)
    checkpoint.save(model, folder, name=folder.name, objective=("sigmoid",), data_fingerprint="d")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / checkpoint.WEIGHTS))


def test_the_ends_are_the_two_models_to_the_last_bit(
    model_dir: Path, tuned: Path, tmp_path: Path
) -> None:
    for alpha, end in ((0.0, model_dir), (1.0, tuned)):
        out = tmp_path / f"at-{alpha}"
        fingerprint = interpolate(model_dir, tuned, alpha, out)
        assert fingerprint == checkpoint.verify(end)["fingerprint"]
        assert (out / checkpoint.WEIGHTS).read_bytes() == (end / checkpoint.WEIGHTS).read_bytes()


def test_in_between_every_weight_is(model_dir: Path, tuned: Path, tmp_path: Path) -> None:
    interpolate(model_dir, tuned, 0.25, tmp_path / "mixed")
    start, end, found = (weights(folder) for folder in (model_dir, tuned, tmp_path / "mixed"))
    assert found.keys() == start.keys()
    for name, value in found.items():
        assert torch.allclose(value, 0.75 * start[name] + 0.25 * end[name], atol=1e-6), name


def test_the_result_says_what_it_is_made_of(model_dir: Path, tuned: Path, tmp_path: Path) -> None:
    interpolate(model_dir, tuned, 0.5, tmp_path / "mixed")
    model = checkpoint.load(tmp_path / "mixed", device="cpu")
    assert model.info.name == "mixed"
    assert model.info.objective == ("contrastive", "sigmoid")
    assert model.info.training == {
        "alpha": 0.5,
        "start": "tiny",
        "start_fingerprint": checkpoint.verify(model_dir)["fingerprint"],
        "tuned": "tuned",
        "tuned_fingerprint": checkpoint.verify(tuned)["fingerprint"],
    }
    assert checkpoint.verify(tmp_path / "mixed")["data_fingerprint"] == "d"


def test_counts_are_those_of_the_nearer_model() -> None:
    start, tuned = create("RN50"), create("RN50")
    tuned.network.visual.bn1.num_batches_tracked.fill_(7)
    tuned.network.visual.bn1.running_mean.fill_(1.0)
    assert mix(start, tuned, 0.4).network.visual.bn1.num_batches_tracked == 0
    mixed = mix(start, tuned, 0.6).network.visual.bn1
    assert mixed.num_batches_tracked == 7
    assert mixed.running_mean[0].item() == pytest.approx(0.6)


def test_models_of_another_kind_are_refused_with_what_differs(
    model_dir: Path, tmp_path: Path
) -> None:
    vision = tiny_architecture()["vision_cfg"] | {"width": 48}
    other = save(tmp_path / "other", vision_cfg=vision)
    with pytest.raises(ConfigError, match=r"differ in vision_cfg\.width, 32 and 48") as caught:
        interpolate(model_dir, other, 0.5, tmp_path / "mixed")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mixed").exists()


def test_what_changes_no_vector_is_no_difference(model_dir: Path, tmp_path: Path) -> None:
    table = tiny_architecture()
    vision = table["vision_cfg"] | {"patch_dropout": 0.5, "mlp_ratio": 4.0}
    other = save(tmp_path / "other", vision_cfg=vision, quick_gelu=False)
    for alpha, end in ((0.0, model_dir), (1.0, other)):
        fingerprint = interpolate(model_dir, other, alpha, tmp_path / f"at-{alpha}")
        assert fingerprint == checkpoint.verify(end)["fingerprint"]


def test_a_model_and_its_round_trip_through_transformers_are_of_one_kind(
    model_dir: Path, tmp_path: Path
) -> None:
    export_model(model_dir, tmp_path / "theirs", "transformers")
    import_model(tmp_path / "theirs", tmp_path / "back")
    interpolate(model_dir, tmp_path / "back", 0.5, tmp_path / "mixed")
    start, found = weights(model_dir), weights(tmp_path / "mixed")
    assert all(torch.equal(start[name], found[name]) for name in start)


def begun(folder: Path, start: Path | None, seed: int) -> Path:
    """A model that says of which one it was trained."""
    training = {}
    if start is not None:
        told = checkpoint.read_description(start)
        training = {"start": told["name"], "start_fingerprint": told["fingerprint"]}
    torch.manual_seed(seed)
    checkpoint.save(create(tiny_architecture()), folder, name=folder.name, training=training)
    return folder


def test_a_start_that_the_second_was_not_trained_from_is_warned_of(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = begun(tmp_path / "other", None, 1)
    tuned, twin = (begun(tmp_path / name, model_dir, n) for n, name in ((2, "tuned"), (3, "twin")))
    for start in (model_dir, twin, tuned):
        load_pair(start, tuned)
    load_pair(tuned, model_dir)
    load_pair(model_dir, other)  # which does not say
    assert caplog.text == ""
    load_pair(other, tuned)
    (line,) = caplog.messages
    assert f"{tuned} was trained from tiny (" in line
    assert f"not from {other} (" in line


def test_another_tokenizer_is_another_kind(tmp_path: Path) -> None:
    from albefs import albef_table, vocabulary

    folders = []
    for name in ("a", "b"):
        vocabulary(tmp_path / "words")
        file = tmp_path / "words" / "tokenizer.json"
        if name == "b":
            file.write_text(file.read_text().replace('"cat"', '"cax"'))
        table = albef_table()
        table["text_cfg"] |= {"tokenizer_path": str(tmp_path / "words")}
        checkpoint.save(create(table), tmp_path / name, name=name)
        folders.append(tmp_path / name)
    with pytest.raises(ConfigError, match=r"differ in tokenizer\.tokenizer/tokenizer\.json"):
        interpolate(*folders, 0.5, tmp_path / "mixed")


def test_what_is_there_already_stays(model_dir: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        interpolate(model_dir, tuned, 0.5, tuned)
    with pytest.raises(CheckpointError, match="not a model directory"):
        interpolate(model_dir, tmp_path / "nowhere", 0.5, tmp_path / "mixed")
