"""Runs that start from the weights of other programs, of other sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clipserve import checkpoint
from clipserve.config import load_config
from clipserve.convert import export_model
from clipserve.errors import ConfigError
from clipserve.model import create
from training.loop import train
from training.shards import pack

FEW_STEPS = [
    "optim.warmup_steps=1",
    "data.batch_size=8",
    "data.workers=0",
    "train.precision=fp32",
    "train.compile=off",
    "train.steps=3",
]


@pytest.fixture
def start(architecture: dict[str, Any], tmp_path: Path) -> Path:
    """transformers' CLIP with a text context of 77."""
    torch.manual_seed(0)
    text = architecture["text_cfg"] | {"context_length": 77}
    checkpoint.save(create(architecture | {"text_cfg": text}), tmp_path / "model", name="clip")
    export_model(tmp_path / "model", tmp_path / "start", "transformers")
    return tmp_path / "start"


def test_a_text_context_of_128_trains_from_weights_of_77(
    start: Path, captioned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(captioned(16), tmp_path / "shards")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}"]
    given = [f"model.pretrained={start}", "model.architecture.text_cfg.context_length=128"]
    train(load_config(None, [*where, *given, *FEW_STEPS]))
    assert "text positions 77 -> 128: the first 20 stay" in caplog.text
    trained = checkpoint.load_for_training(tmp_path / "run" / "latest")
    assert trained.context_length == 128
    assert trained.network.positional_embedding.shape == (128, 32)
    before = checkpoint.load_for_training(tmp_path / "model").network.state_dict()
    now = trained.network.state_dict()
    assert torch.allclose(now["ln_final.weight"], before["ln_final.weight"], atol=0.01)
    assert not torch.equal(now["positional_embedding"][:20], before["positional_embedding"][:20])
    assert trained.tokenizer(["word " * 100]).lengths == [102]


def test_another_architecture_than_that_of_the_weights_is_refused(
    start: Path, captioned: Any, tmp_path: Path
) -> None:
    pack(captioned(16), tmp_path / "shards")
    where = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}"]
    given = [f"model.pretrained={start}", "model.architecture.text_cfg.layers=2"]
    with pytest.raises(ConfigError, match=r"not that of model\.pretrained"):
        train(load_config(None, [*where, *given, *FEW_STEPS]))
