"""Weights that are not trained: which ones patterns mean, and what holds them still.

LiT (arXiv:2111.07991) freezes the picture's tower; a linear probe freezes all but the last maps.
Start at `choose`.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from clipserve.errors import ConfigError
from training.parts import Weight, find_weights


def choose(weights: Sequence[Weight], patterns: Sequence[str]) -> list[Weight]:
    """Those that `patterns` freeze: a later one wins, `!PATTERN` takes out.

    Raises ConfigError for a pattern that changes nothing, and if nothing is left to train.
    """
    frozen = match(weights, patterns, "optim.freeze")
    if len(frozen) == len(weights):
        raise ConfigError(f"optim.freeze = {list(patterns)} leaves nothing to train")
    return frozen


def match(weights: Sequence[Weight], patterns: Sequence[str], setting: str) -> list[Weight]:
    """Those that the patterns of `setting` mean; ConfigError for one that changes nothing."""
    names = [weight.name for weight in weights]
    found: set[str] = set()
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        matched = {name for name in names if fnmatchcase(name, plain)}
        changed = matched & found if pattern.startswith("!") else matched - found
        if not changed:
            raise ConfigError(f"{setting}: {_explain(pattern, plain, bool(matched), names)}")
        found ^= changed
    return [weight for weight in weights if weight.name in found]


class Frozen:
    """Holds weights still, for good or until a number of steps is done.

    What consists of frozen weights alone is in evaluation mode meanwhile: no dropout, no patch
    dropout, no change of running statistics. So is patch dropout, which has no weights, where all
    that learns in its tower stands above the layers. Gradients go through only where they must.
    """

    def __init__(
        self,
        weights: Iterable[Weight] = (),
        modules: Sequence[nn.Module] = (),
        until: int | None = None,
    ) -> None:
        self.weights = list(weights)
        self.until = until
        self._still = _find_still(self.weights, modules) if modules else []
        self._is_held = False

    def hold(self, step: int) -> None:
        """Freeze or release, as is right for step 0, 1, ...; call it before each."""
        wanted = self.until is None or step < self.until
        if wanted == self._is_held:
            return
        self._is_held = wanted
        for weight in self.weights:
            weight.parameter.requires_grad_(not wanted)
        for module in self._still:
            module.train(not wanted)


def _find_still(weights: Sequence[Weight], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost modules that have parameters, all of them frozen, and those without beside
    layers above which alone something learns."""
    frozen = {id(weight.parameter) for weight in weights}
    layered = {id(weight.parameter) for weight in weights if weight.stack is not None}
    above = {id(weight.parameter) for weight in find_weights(*modules) if weight.layer is None}

    def find(module: nn.Module, is_below: bool = False) -> list[nn.Module]:
        own = {id(parameter) for parameter in module.parameters()}
        if own <= frozen and (own or is_below):
            return [module]
        is_below = bool(own & layered) and own - frozen <= above
        return [found for child in module.children() for found in find(child, is_below)]

    return [found for module in modules for found in find(module)]


def _explain(pattern: str, plain: str, is_known: bool, names: list[str]) -> str:
    if is_known:
        state = "is not chosen" if pattern.startswith("!") else "is chosen already"
        return f"{pattern!r} has no effect, for what it names {state}"
    folders = {".".join(name.split(".")[:n]) + ".*" for name in names for n in (1, 2, 3, 4)}
    known = sorted({*names, *(folder for folder in folders if folder[:-2] not in names)})
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    parts = dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in names)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(parts)}"
    return f"{pattern!r} names no weight; {hint}"
