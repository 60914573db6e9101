import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import open_clip_vision, timm_vision, tiny_albef
from conftest import tiny_architecture

from clipserve import checkpoint
from clipserve.config import Config
from clipserve.convert.reading import read_pretrained
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model, create
from training.distributed import ALONE
from training.forward import Networks, modules_of
from training.networks import build
from training.objectives.self_supervision import PredictingHead, Projector
from training.optim import build_optimizer
from training.parts import find_weights

CONTRASTIVE = {"name": "contrastive"}
MOMENTUM = {"name": "momentum_contrast", "queue_size": 6, "momentum": 0.9}


def configure(*objectives: dict[str, Any], **model: Any) -> Config:
    return Config.model_validate(
        {
            "out": "run",
            "model": {"architecture": tiny_architecture()} | model,
            "data": {"train": "not read"},
            "objectives": objectives,
            "train": {"steps": 1},
        }
    )


def networks(model: Model, *objectives: dict[str, Any], **settings: Any) -> Networks:
    return build(configure(*objectives, **settings), model, ALONE)


def test_plain_objectives_need_the_model_alone(tiny_model: Model) -> None:
    found = networks(tiny_model, CONTRASTIVE)
    assert found.model is found.forward is tiny_model
    assert len(found.heads) == 0
    assert (found.momentum, found.twin, found.queue, found.teacher) == (None, None, None, None)
    assert modules_of(found) == {}


def test_the_momentum_copy_begins_as_the_model_and_is_never_trained(tiny_model: Model) -> None:
    found = networks(tiny_model.train(), CONTRASTIVE, MOMENTUM)
    assert found.momentum is not None
    assert found.twin is not None
    assert found.twin.momentum == 0.9
    theirs = tiny_model.network.state_dict()
    for name, value in found.twin.state_dict().items():
        assert torch.equal(value, theirs[name])
        assert value.data_ptr() != theirs[name].data_ptr()
    assert not any(p.requires_grad for p in found.momentum.parameters())
    assert not any(m.training for m in found.twin.modules())
    pixels, ids = torch.randn(2, 3, 32, 32), tiny_model.tokenizer(["a", "b"]).ids
    assert found.momentum_forward is not None
    image = found.momentum_forward(pixels, ids).image
    assert torch.allclose(image, tiny_model.eval()(pixels, ids).image, atol=1e-6)
    with torch.no_grad():  # what the copy computes with is what the loop updates
        found.twin.state_dict()["visual.conv1.weight"].add_(torch.randn(32, 3, 16, 16))
    assert not torch.allclose(found.momentum_forward(pixels, ids).image, image, atol=1e-2)
    assert set(modules_of(found)) == {"momentum", "queue"}


@pytest.mark.parametrize("size", [0, 6])
def test_the_queue_has_the_size_asked_for_and_begins_empty(tiny_model: Model, size: int) -> None:
    queue = networks(tiny_model, MOMENTUM | {"queue_size": size}).queue
    assert queue is not None
    assert queue.stored_image.shape == queue.stored_text.shape == (size, 16)
    assert queue.stored_groups.shape == (size, 3)
    assert queue.filled == 0


@pytest.mark.parametrize(
    ("name", "kind", "length"),
    [
        ("simclr", Projector, 6),
        ("barlow_twins", Projector, 6),
        ("vicreg", Projector, 6),
        ("simsiam", PredictingHead, 12),
    ],
)
def test_self_supervision_brings_a_head_of_its_sizes(
    tiny_model: Model, name: str, kind: type, length: int
) -> None:
    found = networks(tiny_model, CONTRASTIVE, {"name": name, "hidden_size": 8, "output_size": 6})
    head = found.heads[name]
    assert type(head) is kind
    assert head(torch.randn(3, 32)).shape == (3, length)  # 32: the tower's width, not E
    assert set(modules_of(found)) == {"heads"}


@pytest.fixture
def teacher(tmp_path: Path) -> Any:
    """teacher(embed_dim) -> its model directory."""

    def make(embed_dim: int) -> str:
        folder = tmp_path / f"teacher-{embed_dim}"
        checkpoint.save(create(tiny_architecture() | {"embed_dim": embed_dim}), folder, name="t")
        return str(folder)

    return make


def test_a_teacher_is_frozen_and_no_part_of_the_state(tiny_model: Model, teacher: Any) -> None:
    found = networks(tiny_model, {"name": "distill", "teacher": teacher(16)})
    assert found.teacher is not None
    assert not found.teacher.training
    assert not any(p.requires_grad for p in found.teacher.parameters())
    assert len(found.heads) == 0  # vectors of one length are compared as they are
    assert modules_of(found) == {}


def test_a_teacher_with_longer_vectors_gets_linear_maps(tiny_model: Model, teacher: Any) -> None:
    found = networks(tiny_model, {"name": "distill", "teacher": teacher(24)})
    assert {name: tuple(p.shape) for name, p in found.heads.named_parameters() if p.ndim == 2} == {
        "distill_image.weight": (24, 16),
        "distill_text.weight": (24, 16),
    }
    by_affinity = {"name": "distill", "teacher": teacher(24), "features": 0}
    assert len(networks(tiny_model, by_affinity).heads) == 0


def test_a_teacher_that_is_not_there_or_damaged_is_named(
    tiny_model: Model, teacher: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"distill: teacher = 'nowhere' is not a model directory"):
        networks(tiny_model, {"name": "distill", "teacher": "nowhere"})
    folder = teacher(16)
    for file in Path(folder).glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="teacher-16"):
        networks(tiny_model, {"name": "distill", "teacher": folder})


def test_heads_are_trained_with_the_model(tiny_model: Model) -> None:
    settings = configure(CONTRASTIVE, {"name": "simclr", "hidden_size": 8, "output_size": 6})
    found = build(settings, tiny_model, ALONE)
    weights = find_weights(tiny_model.network, found.heads)
    optimizer = build_optimizer(tiny_model, settings.optim, weights)
    decayed, plain = (set(map(id, group["params"])) for group in optimizer.param_groups)
    heads = dict(found.heads.named_parameters())
    assert {id(p) for p in (*tiny_model.parameters(), *heads.values())} == decayed | plain
    assert not decayed & plain
    assert {id(p) for p in heads.values() if p.ndim == 2} <= decayed
    assert {id(p) for p in heads.values() if p.ndim == 1} <= plain


def imported(
    folder: Path, pairs: int, vision: dict[str, Any] | None = None
) -> tuple[Model, dict[str, torch.Tensor]]:
    """A model directory as `clipserve import` writes it: other momentum weights, a full queue."""
    model = tiny_albef(folder / "words", vision)
    twin = {
        f"twin.{name}": value + 1
        for name, value in model.network.state_dict().items()
        if not name.startswith("matching_head")
    }
    queue = {
        "queue.image": torch.randn(pairs, 16),
        "queue.text": torch.randn(pairs, 16),
        "queue.cursor": torch.tensor([2]),
    }
    checkpoint.save(model, folder / "model", name="albef", momentum=twin | queue)
    return model, twin | queue


def test_imported_momentum_weights_and_queue_go_on(tmp_path: Path) -> None:
    model, remembered = imported(tmp_path, 6)
    found = networks(model, MOMENTUM, pretrained=str(tmp_path / "model"), architecture=None)
    assert found.twin is not None
    assert found.queue is not None
    for name, value in found.twin.state_dict().items():
        own = model.network.state_dict()[name]
        assert torch.equal(value, remembered.get(f"twin.{name}", own)), name
    assert torch.equal(found.queue.image, remembered["queue.image"])
    assert torch.equal(found.queue.text, remembered["queue.text"])
    assert (found.queue.filled, found.queue.cursor) == (6, 2)
    numbers = found.queue.groups
    assert (numbers < -(2**62)).all()  # those of no sample
    assert len(set(numbers[:, 0].tolist())) == 6


def test_a_queue_of_another_size_begins_empty_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = imported(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        found = networks(model, MOMENTUM, pretrained=str(tmp_path / "model"), architecture=None)
    assert found.queue is not None
    assert found.queue.filled == 0
    assert "holds 4 pairs and is left out; queue_size = 6 begins empty" in caplog.text


def test_a_pretrained_model_without_a_momentum_copy_gets_a_new_one(
    model_dir: Path, tiny_model: Model
) -> None:
    found = networks(tiny_model, MOMENTUM, pretrained=str(model_dir), architecture=None)
    assert found.twin is not None
    scale = found.twin.state_dict()["logit_scale"]
    assert scale.item() == pytest.approx(math.log(1 / 0.07))


def test_momentum_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    model, remembered = imported(tmp_path, 6)
    name = next(name for name in remembered if name.startswith("twin.text."))
    remembered["twin.stranger"] = remembered.pop(name)
    checkpoint.save(model, tmp_path / "model", name="albef", momentum=remembered)
    with pytest.raises(CheckpointError, match="1 are missing and 1 unknown"):
        networks(model, MOMENTUM, pretrained=str(tmp_path / "model"), architecture=None)


def test_momentum_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    model, remembered = imported(tmp_path, 6)
    remembered["twin.text_projection.bias"] = torch.zeros(17)
    checkpoint.save(model, tmp_path / "model", name="albef", momentum=remembered)
    with pytest.raises(CheckpointError, match="1 unknown, or of another size"):
        networks(model, MOMENTUM, pretrained=str(tmp_path / "model"), architecture=None)


@pytest.mark.parametrize("vision", [open_clip_vision(), timm_vision()])
def test_momentum_weights_follow_the_model_to_another_image_size(
    vision: dict[str, Any], tmp_path: Path
) -> None:
    imported(tmp_path, 6, vision)
    source = str(tmp_path / "model")
    larger = read_pretrained(source, {"vision_cfg": {"image_size": 48}}).model
    found = networks(larger, MOMENTUM, pretrained=source, architecture=None)
    assert found.twin is not None
    own, twin = larger.network.state_dict(), found.twin.state_dict()
    name = next(name for name in own if name.endswith(("pos_embed", "visual.positional_embedding")))
    assert torch.allclose(twin[name], own[name] + 1, atol=1e-5)
