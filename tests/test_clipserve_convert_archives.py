import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transplants import clip_table, shaken

from clipserve.convert import open_clip_files, read_model
from clipserve.convert.archives import is_archive, read_archive
from clipserve.errors import CheckpointError
from clipserve.model import create


class Wrapped(nn.Module):
    """What OpenAI's archives hold, in their names: CLIP with three numbers beside the weights."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("context_length", torch.tensor(32))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.visual(pixels)  # type: ignore[operator]
        return features


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """As OpenAI's ViTs: heads 64 wide, QuickGELU; half precision but for the scale."""
    table = clip_table() | {"quick_gelu": True}
    vision = table["vision_cfg"] | {"width": 128, "head_width": 64}
    torch.manual_seed(0)
    network = shaken(create(table | {"vision_cfg": vision}).network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "logit_scale":
                parameter.copy_(parameter.half())
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    traced = torch.jit.trace(Wrapped(network), torch.zeros(1, 3, 32, 32), check_trace=False)
    torch.jit.save(traced, tmp_path / "ViT-tiny.pt")
    return tmp_path / "ViT-tiny.pt", weights


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def test_an_archive_of_openai_is_read_without_running_it(
    archive: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    file, weights = archive
    assert is_archive(file)
    found = read_archive(file)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    model = read_model(file).model
    assert model.architecture["quick_gelu"] is True
    assert model.architecture["vision_cfg"]["layers"] == 2
    own = model.network.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in weights)


def test_an_archive_computes_quickgelu_whatever_the_named_table_says(
    archive: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As RN50 and ViT-B-32 of open_clip's tables do not."""
    file, _ = archive
    own = read_model(file).model
    plain = {key: value for key, value in own.architecture.items() if key != "quick_gelu"}
    monkeypatch.setattr(open_clip_files, "architecture_config", lambda name: plain)
    named = read_model(file, architecture="ViT-tiny").model
    assert named.architecture["quick_gelu"] is True
    texts = ["a photo of a cat", "two dogs"]
    assert np.array_equal(named.embed_texts(texts), own.embed_texts(texts))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_an_archive_that_calls_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil(), protocol=2))
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"asks for \w+\.mkdir"):
        read_archive(Path("evil.pt"))
    assert not Path("evil").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02N.", b"junk"])
def test_an_archive_without_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_archive(tmp_path / "x.pt")


def test_files_of_torch_save_are_none(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    assert not is_archive(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no zip")
    assert not is_archive(tmp_path / "b.pt")
