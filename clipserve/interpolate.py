"""A model between two others: the weights of one, moved a part of the way to the other's.

WiSE-FT (arXiv:2109.01903): between a model and what fine-tuning made of it lie models that have
learnt most of the new and forgotten little of the old. Start at `interpolate`.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve import checkpoint
from clipserve.errors import ConfigError
from clipserve.model import Model, ModelInfo


def interpolate(start: Path, tuned: Path, alpha: float, out: Path) -> str:
    """Write the model at `alpha` between two model directories; returns its fingerprint.

    0 is `start` and 1 `tuned`, to the last bit. ConfigError if they are not of one kind, or if
    something is in `out`; CheckpointError for a damaged one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; choose another --out")
    models = load_pair(start, tuned)
    described = [checkpoint.read_description(folder) for folder in (start, tuned)]
    known = dict.fromkeys(d["data_fingerprint"] for d in described if d["data_fingerprint"])
    return checkpoint.save(
        mix(*models, alpha),
        out,
        name=out.resolve().name,
        objective=tuple(dict.fromkeys(name for d in described for name in d["objective"])),
        training={
            "alpha": alpha,
            "start": described[0]["name"],
            "start_fingerprint": described[0]["fingerprint"],
            "tuned": described[1]["name"],
            "tuned_fingerprint": described[1]["fingerprint"],
        },
        data_fingerprint="+".join(known) or None,
    )


def load_pair(start: Path, tuned: Path) -> tuple[Model, Model]:
    """Both models, in float32 on the CPU. ConfigError names the first thing that differs."""
    before, after = (_kind(checkpoint.read_description(folder)) for folder in (start, tuned))
    if found := _first_difference(before, after):
        name, one, other = found
        raise ConfigError(
            f"{start} and {tuned} differ in {name}, {one} and {other}: between weights of different"
            " models there is nothing; take a model and one that was trained from it"
        )
    return checkpoint.load_for_training(start), checkpoint.load_for_training(tuned)


@torch.no_grad()
def mix(start: Model, tuned: Model, alpha: float) -> Model:
    """(1 - alpha) start + alpha tuned, tensor by tensor; whole numbers are those of the nearer."""
    network: Any = copy.deepcopy(start.network)
    others = tuned.network.state_dict()
    mixed = {n: _between(own, others[n], alpha) for n, own in start.network.state_dict().items()}
    network.load_state_dict(mixed)
    return Model(network, start.architecture, start.transform, start.tokenizer, ModelInfo())


def _between(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not start.is_floating_point():
        return tuned if alpha > 0.5 else start
    return torch.lerp(start, tuned, alpha)  # exact at both ends


def _kind(description: dict[str, Any]) -> dict[str, Any]:
    """What two models must have in common."""
    files = description["files"]
    return {
        **description["architecture"],
        "image_transform": description["image_transform"],
        "tokenizer": {n: files[n][:12] for n in files if n.startswith("tokenizer/")},
    }


def _first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first key of nested tables under which they differ, and its two values."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else (name, one, other)
    for key in sorted(one.keys() | other.keys()):
        inner = f"{name}.{key}" if name else key
        if found := _first_difference(one.get(key), other.get(key), inner):
            return found
    return None
