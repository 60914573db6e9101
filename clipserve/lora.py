"""LoRA as settings: which weights get adapters, and how large ones.

Patterns are over the names that `optim.freeze` uses. Start at `LoraConfig`.
"""

from typing import Annotated

from pydantic import Field

from clipserve.optim import Pattern, Rate
from clipserve.sections import Section


class LoraConfig(Section):
    """Thin matrices that are trained in place of the weights, and merged into what is saved."""

    rank: Annotated[int, Field(ge=1)] = 8
    """rows and columns that an adapter's two matrices share"""
    alpha: Rate = 16.0
    """their product is added times alpha / rank"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """part of an adapter's inputs that is left out in a step, the same for the whole batch"""
    targets: Annotated[tuple[Pattern, ...], Field(min_length=1)] = ("image.*", "text.*")
    """which of the matrices within layers (attention, MLP) get one; a later `!` takes some out"""
    whole: tuple[Pattern, ...] = ()
    """weights beside them that are trained themselves, as `logit_scale`"""
