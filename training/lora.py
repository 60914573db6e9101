"""LoRA (arXiv:2106.09685): pairs of thin matrices learn in place of the weights.

The network always holds the merged weights, base + scale * up @ down, so everything else (towers,
averages, validation, checkpoints) sees an ordinary model. A merged weight's gradient becomes those
of its two matrices by the chain rule, and is dropped at once. Start at `Adapters`.

peft is not used: its layer for torch's attention, which open_clip's towers are made of, adds the
output projection's product twice (0.21.2), and its base weights drift by rounding, because it adds
and subtracts in every forward pass.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from clipserve.errors import ConfigError
from clipserve.lora import LoraConfig
from training.frozen import match
from training.order import Purpose
from training.parts import Weight
from training.state import step_generator


class Adapter(nn.Module):
    """That of one weight (out, in): `down` (rank, in) begins random, `up` (out, rank) at zero."""

    base: Tensor

    def __init__(self, target: Weight, settings: LoraConfig) -> None:
        super().__init__()
        weight = target.parameter
        rows, columns = weight.shape
        if settings.rank * (rows + columns) >= rows * columns:
            raise ConfigError(
                f"lora.rank = {settings.rank} gives {target.name} ({rows}, {columns}) an adapter no"
                " smaller than itself; lower it, or leave that weight out of lora.targets"
            )
        self.target = target  # not registered: it is the network's
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout
        self.down = nn.Parameter(weight.new_empty(settings.rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, settings.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as in microsoft/LoRA
        self.register_buffer("base", weight.detach().clone())
        self.kept: Tensor | None = None
        weight.register_post_accumulate_grad_hook(self._take_gradient)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def drop(self, random: torch.Generator) -> None:
        """Draw which inputs are left out, and merge what is kept."""
        drawn = torch.rand(self.down.shape[1], generator=random, device=self.down.device)  # (in,)
        self.kept = (drawn >= self.dropout) / (1 - self.dropout)
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Write base + scale * up @ down into the network."""
        merged = torch.addmm(self.base, self.up, self._kept_down(), alpha=self.scale)
        self.target.parameter.copy_(merged)

    def _kept_down(self) -> Tensor:
        return self.down if self.kept is None else self.down * self.kept

    @torch.no_grad()
    def _take_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, weight.grad = weight.grad * self.scale, None
        down = self.up.T @ gradient
        _add_gradient(self.up, gradient @ self._kept_down().T)
        _add_gradient(self.down, down if self.kept is None else down * self.kept)

    def get_extra_state(self) -> Tensor:
        """The scale, for the state dict: another one would make another model of the same pair."""
        return torch.tensor(self.scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if state.item() != self.scale:
            raise ValueError(f"lora.alpha / lora.rank was {state.item()}, not {self.scale}")


class Adapters(nn.Module):
    """Those of a network; there may be none."""

    def __init__(self, targets: Sequence[Weight] = (), settings: LoraConfig | None = None) -> None:
        super().__init__()
        for target in targets:
            assert settings is not None
            self.add_module(target.name.replace(".", "/"), Adapter(target, settings))
        self.is_noisy = bool(settings and settings.dropout)

    def __iter__(self) -> Iterator[Adapter]:
        for module in self.children():
            assert isinstance(module, Adapter)
            yield module

    def replace(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights with both matrices of an adapter in the place of each that has one."""
        own = {id(adapter.target.parameter): adapter for adapter in self}
        found = []
        for weight in weights:
            adapter = own.get(id(weight.parameter))
            if adapter is None:
                found.append(weight)
            else:
                for name, parameter in adapter.named_parameters():
                    found.append(Weight(f"{weight.name}.{name}", parameter, decays=True))
        return found

    def merge(self) -> None:
        """Make the network what its adapters say, with nothing left out; after every update."""
        for adapter in self:
            adapter.kept = None
            adapter.merge()

    @contextlib.contextmanager
    def dropout(self, seed: int, step: int) -> Iterator[None]:
        """Within it some inputs of the adapters are left out, the same on all ranks; ended by
        `merge` or a failure."""
        if not self.is_noisy:
            yield
            return
        device = next(self.parameters()).device
        random = step_generator(device, Purpose.ADAPTERS, seed, step)
        try:
            for adapter in self:
                adapter.drop(random)
            yield
        finally:
            self.merge()


def choose(
    weights: Sequence[Weight],
    settings: LoraConfig,
    frozen: Sequence[Weight] = (),
    fresh: Iterable[nn.Parameter] = (),
) -> tuple[list[Weight], list[Weight]]:
    """What adapters are for, and what is then frozen: all but them, `fresh` and what is whole.

    `frozen` already is, and gets no adapters. Raises ConfigError if that leaves none.
    """
    held = {weight.name for weight in frozen}
    whole = {weight.name for weight in match(weights, settings.whole, "lora.whole")}
    if both := sorted(held & whole):
        raise ConfigError(f"{both[0]} is in lora.whole and in optim.freeze; take it out of one")
    own = {id(parameter) for parameter in fresh}
    whole |= {weight.name for weight in weights if id(weight.parameter) in own}
    matrices = [weight for weight in weights if weight.is_hidden_matrix]
    _check_defaults(matrices, settings)
    targets = [
        weight
        for weight in match(matrices, settings.targets, "lora.targets")
        if weight.name not in held | whole
    ]
    if not targets:
        raise ConfigError(
            f"lora.targets = {list(settings.targets)} leaves nothing to adapt: all of it is frozen"
            " or trained whole"
        )
    trained = {weight.name for weight in targets} | (whole - held)
    still = [weight for weight in weights if weight.name not in trained]
    return targets, still


def _check_defaults(matrices: Sequence[Weight], settings: LoraConfig) -> None:
    """ConfigError, not of a pattern that nobody wrote, where a tower has other layers."""
    if settings.targets != LoraConfig().targets:
        return
    for tower in ("image", "text"):
        if not any(weight.part == tower for weight in matrices):
            raise ConfigError(
                f"lora: the {tower} tower of this architecture has no layers of matrices, which the"
                f" default lora.targets = {list(settings.targets)} means; name others as"
                " lora.targets"
            )


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
