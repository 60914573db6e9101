"""A model between two others: the weights of one, moved a part of the way to the other's.

WiSE-FT (arXiv:2109.01903): between a model and what fine-tuning made of it lie models that have
learnt most of the new and forgotten little of the old. Start at `interpolate`.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve import checkpoint
from clipserve.architecture import essence, first_difference
from clipserve.convert.found import refuse_existing
from clipserve.errors import ConfigError
from clipserve.model import Model, ModelInfo

logger = logging.getLogger(__name__)


def interpolate(start: Path, tuned: Path, alpha: float, out: Path) -> str:
    """Write the model at `alpha` between two model directories; returns its fingerprint.

    0 is `start` and 1 `tuned`, to the last bit. ConfigError if they are not of one kind, or if
    something is in `out`; CheckpointError for a damaged one.
    """
    refuse_existing(out)
    start, tuned = checkpoint.pin(start), checkpoint.pin(tuned)
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
    """Both models, in float32 on the CPU. ConfigError names the first thing that differs; a warning
    says if the second is known to come from another model than the first."""
    described = [checkpoint.read_description(folder) for folder in (start, tuned)]
    before, after = (_kind(description) for description in described)
    if found := first_difference(before, after):
        name, one, other = found
        raise ConfigError(
            f"{start} and {tuned} differ in {name}, {one} and {other}: between weights of different"
            " models there is nothing; take a model and one that was trained from it"
        )
    _warn_of_another_start(start, tuned, *described)
    return checkpoint.load_for_training(start), checkpoint.load_for_training(tuned)


@torch.no_grad()
def mix(start: Model, tuned: Model, alpha: float) -> Model:
    """(1 - alpha) start + alpha tuned, tensor by tensor; all that is no weight, and whole numbers,
    are those of the nearer."""
    nearer = tuned if alpha > 0.5 else start
    network: Any = copy.deepcopy(nearer.network)
    others = tuned.network.state_dict()
    mixed = {n: _between(own, others[n], alpha) for n, own in start.network.state_dict().items()}
    network.load_state_dict(mixed)
    return Model(network, nearer.architecture, nearer.transform, nearer.tokenizer, ModelInfo())


def _between(start: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not start.is_floating_point():
        return tuned if alpha > 0.5 else start
    return torch.lerp(start, tuned, alpha)  # exact at both ends


def _kind(description: dict[str, Any]) -> dict[str, Any]:
    """What two models must have in common."""
    files = description["files"]
    return {
        **essence(description["architecture"]),
        "image_transform": description["image_transform"],
        "tokenizer": {n: files[n][:12] for n in files if n.startswith("tokenizer/")},
    }


def _warn_of_another_start(
    start: Path, tuned: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Two that come from the same weights are as good; of many nothing is known."""
    begun = after["training"].get("start_fingerprint")
    akin = {before["fingerprint"], before["training"].get("start_fingerprint")}
    if begun is None or {begun, after["fingerprint"]} & akin:
        return
    logger.warning(
        "%s was trained from %s (%.12s), not from %s (%.12s): between models that do not come from"
        " the same weights there is seldom a good one",
        tuned,
        after["training"].get("start"),
        begun,
        start,
        before["fingerprint"],
    )
