"""The presets: each is a configuration that trains."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture

from clipserve import checkpoint
from clipserve.config import dump_toml, load_config, preset_names
from clipserve.objectives import SelfSupervision, check_against_architecture, find_momentum
from clipserve.towers import architecture_config, build_network
from training.shards import pack

STEPS = 20


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_is_a_configuration_whose_objectives_fit_its_network(preset: str) -> None:
    config = load_config(
        None, ["out=run", "data.train=shards", "train.epochs=1", f"model.preset={preset}"]
    )
    architecture = config.model.architecture
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    assert table is not None
    with torch.device("meta"):
        network: Any = build_network(table)
    check_against_architecture(
        config.objectives,
        has_fusion="fusion_cfg" in table,
        has_token_head=getattr(network, "token_head", None) is not None,
        has_bias=network.logit_bias is not None,
        has_decoder="multimodal_cfg" in table,
    )
    assert not config.train.rerank or "fusion_cfg" in table
    wanted = {"albef": "matching", "siglip": "sigmoid", "slip": "simclr"}
    family = preset.split("_")[0]
    assert wanted.get(family, "contrastive") in [o.name for o in config.objectives]


def test_the_presets_are_those_that_are_promised() -> None:
    assert set(preset_names()) == {
        "tiny",
        "albef_tiny",
        "albef_vit_b16",
        "clip_vit_b32",
        "siglip_vit_b16",
        "slip_tiny",
        "slip_vit_b16",
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_trains(preset: str, captioned: Any, tmp_path: Path) -> None:
    """Twenty steps of two pairs, through the command line; half a minute to minutes each."""
    pack(captioned(2 * STEPS + 2), tmp_path / "shards")
    pack(captioned(4, "others"), tmp_path / "val")
    out = tmp_path / "run"
    config = load_config(
        None,
        [
            f"out={out}",
            f"data.train={tmp_path / 'shards'}",
            f"data.val={tmp_path / 'val'}",
            f"model.preset={preset}",
            "data.batch_size=2",
            "data.workers=0",
            f"train.steps={STEPS}",
            "train.log_every=1",
        ],
    )
    file = tmp_path / "config.toml"
    text = dump_toml(config)
    momentum = find_momentum(config.objectives)
    if momentum is not None:
        text = text.replace(f"queue_size = {momentum.queue_size}\n", "queue_size = 7\n")
    file.write_text(text)
    subprocess.run(
        [sys.executable, "-m", "clipserve", "train", str(file)],
        check=True,
        timeout=1800,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    names = {f"loss/{objective.name}" for objective in config.objectives}
    for line in steps:
        assert names <= set(line)
        assert all(math.isfinite(value) for value in line.values())
    scores = lines[-1]
    assert "val/mean_r1" in scores
    assert ("val/reranked_mean_r1" in scores) == bool(config.train.rerank)
    checkpoint.verify(out / "best")
    model = checkpoint.load(out / "best")
    vectors = model.embed_images([make_picture(seed=1)])
    assert vectors.shape == (1, model.embed_dim)
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(model.embed_texts(["picture number 3"])) == pytest.approx(1, abs=1e-2)
    has_heads = any(isinstance(o, SelfSupervision) for o in config.objectives)
    assert (out / "latest/state/heads.safetensors").exists() == has_heads
    assert (out / "latest/state/queue.safetensors").exists() == (momentum is not None)
