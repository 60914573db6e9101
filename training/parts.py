"""What a run may train, by the names that settings use, and how deep in its tower each weight is.

    image.*    the picture's tower             heads.*    what objectives alone use
    text.*     the text's tower                logit_scale, logit_bias
    fusion.*   what sees both

The rest of a name is the network's own: `image.transformer.resblocks.0.mlp.c_fc.weight`. Start at
`find_weights`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

_BEGINNINGS = {
    "visual.": "image.",
    "text.": "text.",
    "fusion.": "fusion.",
    "text_decoder.": "fusion.text_decoder.",
    "matching_head.": "heads.matching_head.",
    "token_head.": "heads.token_head.",
    "logit_": "logit_",
}
_LAYER = re.compile(r"^(.*?\b(?:resblocks|blocks|layers?|fusion|cross_attn))\.(\d+)\.")
_IS_LAYER = re.compile(r"\b(?:resblocks|blocks|layers?|fusion|cross_attn)\.\d+$")
_BELOW_LAYERS = re.compile(
    r"\.(conv1|ln_pre|norm_pre|cls_token|reg_token|cls_emb|\w*embed\w*)(\.|$)"
)


@dataclass(frozen=True)
class Weight:
    """One parameter."""

    name: str
    parameter: nn.Parameter
    decays: bool
    """open_clip_train/optim.py: gains, biases and logit scale have at most one dimension; position
    and class embeddings are declared by the towers"""

    @property
    def part(self) -> str:
        """Of `clipserve.optim.PARTS`; else the whole name."""
        return self.name.split(".")[0]

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it maps within a layer, not into or out of the network; a table is no map."""
        return self.parameter.ndim == 2 and self.stack is not None and self.decays

    @property
    def stack(self) -> str | None:
        """The sequence of layers that it stands in."""
        found = _LAYER.match(self.name)
        return found[1] if found else None

    @property
    def layer(self) -> int | None:
        """Its place in that sequence, from 0; -1 below the first layer, None above the last."""
        found = _LAYER.match(self.name)
        if found:
            return int(found[2])
        return -1 if _BELOW_LAYERS.search(self.name) else None


def find_weights(network: nn.Module, heads: nn.Module | None = None) -> list[Weight]:
    """All of them, in the network's order; `heads` is what objectives learn beside the model."""
    declare: Callable[[], set[str]] | None = getattr(network, "no_weight_decay", None)
    declared = declare() if declare else set()
    found = [
        Weight(_rename(name), parameter, parameter.ndim > 1 and name not in declared)
        for name, parameter in network.named_parameters()
    ]
    for name, parameter in heads.named_parameters() if heads is not None else ():
        found.append(Weight(f"heads.{name}", parameter, parameter.ndim > 1))
    return found


def count_layers(weights: Iterable[Weight]) -> int | None:
    """Of a tower's weights; None if its layers do not form exactly one sequence."""
    layered = [weight for weight in weights if weight.stack is not None]
    if len({weight.stack for weight in layered}) != 1:
        return None
    return 1 + max(weight.layer or 0 for weight in layered)


def is_layer(name: str) -> bool:
    """Whether a module of this name is one of a tower's layers."""
    return _IS_LAYER.search(name) is not None


def _rename(name: str) -> str:
    for beginning, ours in _BEGINNINGS.items():
        if name.startswith(beginning):
            return ours + name.removeprefix(beginning)
    return f"text.{name}"  # open_clip's CLIP is its own text tower
