"""What outlives a step: the momentum twin of a network, and a queue of its features.

MoCo (arXiv:1911.05722, section 3.2) and ALBEF (arXiv:2107.07651, section 3.2). A step calls
`Twin.update` and `FeatureQueue.push` behind the optimizer (training/step.py). Every rank holds the
same twin and the same queue, because all ranks do the same to them.

Legend: B rows of a batch, K queue size, E embedding, G groups.
"""

import copy
from collections import defaultdict
from typing import Any, Self

import torch
from torch import Tensor, nn

from clipserve.errors import ConfigError
from clipserve.objectives import Objective, find_momentum
from training.fsdp import own_part


class Twin(nn.Module):
    """A copy of a network whose weights follow slowly and are never trained.

    It stays in evaluation mode, so its targets carry no dropout noise (ALBEF leaves its own in
    training mode, ALBEF#124). Its `state_dict` has the network's names, and weights that are tied
    once, which is what safetensors stores. Raises ConfigError for a momentum outside 0 to 1.
    """

    def __init__(self, network: nn.Module, momentum: float = 0.995) -> None:
        if not 0 <= momentum <= 1:
            raise ConfigError(f"momentum = {momentum}; use a number from 0 to 1, such as 0.995")
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum = momentum
        self._ties = _find_ties(self.network)
        self.eval()
        self.register_state_dict_post_hook(_strip_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_restore_names)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any) -> Any:
        """What the network answers; call it under `torch.no_grad`."""
        return self.network(*inputs)

    def train(self, mode: bool = True) -> Self:
        """A twin has no training mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, network: nn.Module, momentum: float | None = None) -> None:
        """theta_m <- m theta_m + (1 - m) theta (MoCo, equation 2), in place; m may be another.

        Buffers of floats, such as running means, are averaged too; integers are copied. Buffers
        that are not saved are constants (open_clip's causal mask, with its infinities) and stay.
        """
        online = network.state_dict()
        keep = self.momentum if momentum is None else momentum
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(
            lambda: ([], [])  # one fused call for each dtype
        )
        for name, split in self.state_dict().items():
            value = own_part(split)
            if value.is_floating_point():
                own, other = averaged[value.dtype]
                own.append(value)
                other.append(own_part(online[name]))
            else:
                value.copy_(own_part(online[name]))
        for own, other in averaged.values():
            torch._foreach_lerp_(own, other, 1 - keep)


def ramped(momentum: float, step: int) -> float:
    """The momentum of an average that begins at step 0, so that the first weights fade at once.

    The rule of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    return min(momentum, (1 + step) / (10 + step))


def alpha_ramp(objectives: tuple[Objective, ...], step: int, steps_per_epoch: int) -> float:
    """How far distillation's alpha has grown: linearly over its first epochs (ALBEF)."""
    settings = find_momentum(objectives)
    if settings is None or not settings.alpha_ramp_epochs:
        return 1.0
    return min(1.0, step / (settings.alpha_ramp_epochs * steps_per_epoch))


class FeatureQueue(nn.Module):
    """The last K features of pictures and texts, with their groups.

    The n-th pair ever pushed lies in slot n mod K, which is all there is to know: the oldest is
    overwritten first, and any batch wraps exactly. It begins empty, where MoCo and ALBEF begin with
    random vectors. K may be 0.
    """

    stored_image: Tensor
    stored_text: Tensor
    stored_groups: Tensor

    def __init__(self, size: int, embed_dim: int, num_groups: int = 1) -> None:
        if size < 0:
            raise ConfigError(f"queue_size = {size}; use 0 (no queue) or more")
        super().__init__()
        self.size = size
        self.pushed = 0  # a plain number: reading one from a GPU would make each step wait for it
        self.register_buffer("stored_image", torch.zeros(size, embed_dim))
        self.register_buffer("stored_text", torch.zeros(size, embed_dim))
        self.register_buffer("stored_groups", torch.zeros(size, num_groups, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_check_sizes)  # type: ignore[no-untyped-call]

    @property
    def cursor(self) -> int:
        """The slot that is written next."""
        return self.pushed % max(self.size, 1)

    @property
    def filled(self) -> int:
        """How many slots hold a pair."""
        return min(self.pushed, self.size)

    @property
    def image(self) -> Tensor:
        """(filled, E) float32, a view."""
        return self.stored_image[: self.filled]

    @property
    def text(self) -> Tensor:
        """(filled, E) float32, a view."""
        return self.stored_text[: self.filled]

    @property
    def groups(self) -> Tensor:
        """(filled, G) int64, a view."""
        return self.stored_groups[: self.filled]

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, groups: Tensor) -> None:
        """Store B pairs over the oldest ones: image and text (B, E), groups (B, G).

        Of more than K pairs the last K stay. Writes in place, so a loss that read the views must
        have gone through its backward pass.
        """
        assert len(image) == len(text) == len(groups)
        surplus = max(len(image) - self.size, 0)
        kept = len(image) - surplus
        self.pushed += surplus
        start, until_end = self.cursor, min(kept, self.size - self.cursor)
        for stored, rows in (
            (self.stored_image, image[surplus:]),
            (self.stored_text, text[surplus:]),
            (self.stored_groups, groups[surplus:]),
        ):
            stored[start : start + until_end] = rows[:until_end]
            stored[: kept - until_end] = rows[until_end:]
        self.pushed += kept

    def get_extra_state(self) -> Tensor:
        """`pushed`, for the state dict."""
        return torch.tensor(self.pushed)

    def set_extra_state(self, state: Tensor) -> None:
        self.pushed = int(state)


def _strip_names(twin: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """From the twin's names to its network's, each tensor once."""
    assert isinstance(twin, Twin)
    inner = f"{prefix}network."
    for name in [name for name in state if name.startswith(inner)]:
        value, plain = state.pop(name), name.removeprefix(inner)
        if plain not in twin._ties:
            state[prefix + plain] = value


def _restore_names(twin: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """From the network's names to the twin's, with a tensor for every tied name."""
    assert isinstance(twin, Twin)
    inner = f"{prefix}network."
    for name in [name for name in state if name.startswith(prefix)]:
        state[inner + name.removeprefix(prefix)] = state.pop(name)
    for name, first in twin._ties.items():
        if inner + first in state:
            state.setdefault(inner + name, state[inner + first])


def _find_ties(network: nn.Module) -> dict[str, str]:
    """Each further name of a tensor, and its first one."""
    first: dict[int, str] = {}
    named = network.state_dict(keep_vars=True)  # the tensors themselves, not views of them
    firsts = {name: first.setdefault(id(value), name) for name, value in named.items()}
    return {name: other for name, other in firsts.items() if name != other}


def _check_sizes(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, own in module.named_buffers():
        saved = state.get(prefix + name)
        if saved is not None and saved.shape != own.shape:
            raise ConfigError(
                f"the saved queue has {name} of {tuple(saved.shape)}, this run's has"
                f" {tuple(own.shape)}; set the objective's queue size and the model back, or start"
                " anew in another `out`"
            )
