"""All that resuming needs beside the model directory, saved and restored as one.

A checkpoint is a model directory plus `state/`: the optimizer's moments as safetensors, counters
and generators as JSON. Never pickle: a checkpoint may come from anywhere.
"""

import base64
import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from clipserve import checkpoint
from clipserve.errors import CheckpointError
from clipserve.files import sha256 as file_sha256
from clipserve.model import Model

_COUNTERS = "counters.json"
_OPTIMIZER = "optimizer.safetensors"


@dataclass
class Counters:
    """Where a run stands. `step` is the number of optimizer steps done."""

    step: int = 0
    samples: int = 0
    bad_samples: int = 0
    best: float | None = None
    seconds: float = 0.0
    """time spent training, over all sessions"""


@dataclass(frozen=True)
class Order:
    """What the order of samples depends on; a run that goes on must have the same."""

    data_fingerprint: str
    batch_size: int
    seed: int


def save_state(
    folder: Path, optimizer: torch.optim.Optimizer, counters: Counters, order: Order
) -> None:
    """Write into a new checkpoint folder."""
    from safetensors.torch import save_file

    state = folder / "state"
    state.mkdir()
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }
    save_file(tensors, state / _OPTIMIZER)
    content = {
        "counters": asdict(counters),
        "order": asdict(order),
        "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "optimizer_sha256": file_sha256(state / _OPTIMIZER),
    }
    content["checksum"] = _checksum(content)
    (state / _COUNTERS).write_text(json.dumps(content, indent=1))


def verify_state(directory: Path) -> None:
    """Check every byte of a checkpoint's state/, if it has one. Raises CheckpointError."""
    if (directory / "state").is_dir():
        _read_state(directory / "state")


def restore_state(
    directory: Path, model: Model, optimizer: torch.optim.Optimizer, order: Order
) -> Counters:
    """Load a checkpoint's weights, moments, counters and generator into the given objects.

    Raises CheckpointError if it is damaged, of another architecture, or of another sample order.
    """
    from safetensors.torch import load_file

    saved = checkpoint.load_for_training(directory)
    if saved.architecture != model.architecture:
        raise CheckpointError(
            f"{directory} has another architecture than this run; start anew in another `out`"
        )
    content = _read_state(directory / "state")
    for name, found in asdict(order).items():
        before = content["order"][name]
        if found != before:
            what = {"data_fingerprint": "the training shards"}.get(name, name)
            raise CheckpointError(
                f"{what} changed since {directory.name} was written, from {str(before)[:12]} to"
                f" {str(found)[:12]}; change it back, or start anew in another `out`"
            )
    model.network.load_state_dict(saved.network.state_dict())
    moments = load_file(directory / "state" / _OPTIMIZER)
    optimizer.load_state_dict(_optimizer_state(optimizer, moments))
    generator = base64.b64decode(content["torch_rng"])
    torch.set_rng_state(torch.frombuffer(bytearray(generator), dtype=torch.uint8))
    return Counters(**content["counters"])


def _read_state(state: Path) -> dict[str, Any]:
    """counters.json, with both files checked."""
    try:
        text = (state / _COUNTERS).read_text()
        content: dict[str, Any] = json.loads(text)
        digest = file_sha256(state / _OPTIMIZER)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{state} cannot be resumed from: {error}") from None
    if text != json.dumps(content, indent=1) or content.get("checksum") != _checksum(content):
        raise CheckpointError(f"{state / _COUNTERS} was changed after it was written")
    if digest != content["optimizer_sha256"]:
        raise CheckpointError(f"{state / _OPTIMIZER} is damaged; resume from another checkpoint")
    return content


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
