"""What a reader hands over, before it is made one of our models; and where that may go."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clipserve.errors import ConfigError
from clipserve.images import ImageTransform
from clipserve.model import ModelInfo


@dataclass(frozen=True)
class Found:
    """Weights under open_clip's names, and what belongs to them."""

    tensors: dict[str, Tensor]
    architecture: dict[str, Any]
    transform: ImageTransform | None
    """None: open_clip's default for the input size"""
    tokenizer: Path | None
    """the folder with its files; None for CLIP's own, which ships with open_clip"""
    info: ModelInfo
    momentum: dict[str, Tensor] | None = None
    """an ALBEF's momentum weights and queues, as `checkpoint.save` takes them"""
    data_fingerprint: str | None = None
    notes: list[str] = field(default_factory=list)
    """what is not as it was there, a line each"""


def refuse_existing(out: Path) -> None:
    """ConfigError if there is a file, or a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; choose a new name")


def count_parts(names: Iterable[str], prefix: str) -> int:
    """How many numbered parts there are below a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
