"""The optimizer as settings: what is trained, how fast, by which rule; what is refused.

Names of weights begin with the part that they belong to: `image.`, `text.`, `fusion.` (what sees
both), `heads.`; logit scale and bias belong to none. Start at `OptimConfig`.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from clipserve.sections import Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Pattern = Annotated[str, Field(min_length=1)]
PARTS = ("image", "text", "fusion", "heads")


class PartOptim(Section):
    """What is other for one part of the model than for the rest."""

    lr: Rate | None = None
    """peak learning rate of this part; absent: `optim.lr`"""
    weight_decay: Decay | None = None
    """decay of this part's matrices; absent: `optim.weight_decay`"""


class TowerOptim(PartOptim):
    """Likewise for a tower."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """of this tower, in place of `optim.layer_decay`; 1 turns it off"""


class OptimConfig(Section):
    """The optimizer with open_clip's decay groups, and the learning rate over time."""

    name: Literal["adamw", "stableadamw", "lion", "muon", "nadamw", "adopt"] = "adamw"
    """torch's AdamW, or one of timm's; muon is for matrices within layers, AdamW for the rest"""
    lr: Rate = 5e-4
    """peak learning rate"""
    weight_decay: Decay = 0.2
    """decay of matrices; gains, biases, position and class embeddings and the scale have none"""
    betas: tuple[Beta, Beta] | None = None
    """Adam's betas; default (0.9, 0.98) for a ViT, (0.9, 0.999) otherwise, as in open_clip"""
    eps: Rate | None = None
    """Adam's epsilon; default 1e-6 for a ViT, 1e-8 otherwise, as in open_clip"""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    """steps of linear warm-up"""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """learning rate after warm-up: cosine to zero, constant, or constant with a decay at the end"""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """of wsd: the last steps of the run, over which the learning rate falls linearly to zero"""
    grad_clip: Rate | None = None
    """largest norm of the gradient; absent: not clipped"""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """each layer of a tower learns this much slower than the one above it; 0.75 is usual"""
    freeze: tuple[Pattern, ...] = ()
    """names of weights that are not trained, as `image.*`; a later `!image.proj` takes some out"""
    unfreeze_after_steps: Annotated[int, Field(ge=1)] | None = None
    """after so many steps the frozen weights are trained too, with a warm-up of their own"""
    image: TowerOptim | None = None
    text: TowerOptim | None = None
    fusion: PartOptim | None = None
    heads: PartOptim | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ValueError("optim.schedule = wsd needs optim.decay_steps, the length of the end")
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"optim.decay_steps has no use with optim.schedule = {self.schedule}; use wsd"
            )
        if self.unfreeze_after_steps is not None and not self.freeze:
            raise ValueError("optim.unfreeze_after_steps has no use without optim.freeze")
        if self.name == "lion" and self.eps is not None:
            raise ValueError("optim.eps has no use with optim.name = lion, which has no epsilon")
        towers = (self.image, self.text)
        if self.layer_decay and all(t is not None and t.layer_decay is not None for t in towers):
            raise ValueError("optim.layer_decay has no use: both towers have one of their own")
        return self

    def part(self, name: str) -> PartOptim | None:
        """What is set for the part of that name, if there is such a part and something is."""
        found = getattr(self, name) if name in PARTS else None
        assert found is None or isinstance(found, PartOptim)
        return found

    def layer_decay_of(self, part: str) -> float | None:
        """The factor from layer to layer of a tower; None for none."""
        own = self.part(part)
        if not isinstance(own, TowerOptim):
            return self.layer_decay if part in ("image", "text") else None
        return self.layer_decay if own.layer_decay is None else own.layer_decay
