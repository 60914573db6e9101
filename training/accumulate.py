"""A batch through a network a micro-batch at a time, with the gradients of the whole batch.

GradCache (Gao et al., arXiv:2101.06983, section 3.2): what the network makes of a micro-batch is
kept and its graph is not; when backward has the gradient of all that was kept, each micro-batch
goes through the network again, with graph, and passes its part of the gradient on. Losses are of
the whole batch, and see nothing of this; what they use directly, such as the logit scale, has its
gradient once. The result differs from that of the whole batch by rounding alone, for random numbers
are those of the whole batch too. Start at `MicroBatches`.

In memory stay, for the whole of this process's batch: its pixels as bytes, the vectors, of an ALBEF
the states of all tokens, the logits of masked words, and the losses' own graphs. Of the network's
graph there is never more than one micro-batch's. But a layer that drops activations draws for the
whole batch each time, of which a micro-batch takes its rows: for so long there is one such tensor.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipserve.errors import ConfigError, TrainingError
from training.buffers import batch_norms

Function = Callable[..., tuple[Tensor, ...]]
_FACTORIES = {"aten::rand", "aten::randn"}
_FILLS = {"aten::bernoulli_", "aten::uniform_", "aten::normal_", "aten::exponential_"}


@dataclass(frozen=True)
class MicroBatches:
    """In how many parts rows go through a network: 1 is the ordinary way."""

    number: int = 1
    draws: bool = False
    """whether the network draws random numbers"""
    least: int = 1
    """passes that are made in any case; those without rows of their own repeat one, for nothing"""

    def alike(self, counts: list[int]) -> "MicroBatches":
        """The same number of passes on every rank, whose rows are `counts`: in each of them the
        ranks bring together the weights that `training.fsdp` has split."""
        return replace(self, least=min(self.number, max(counts)))

    def __call__(self, function: Function, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `function(slice(0, count), *tensors)` returns, with its gradients.

        `function(rows, *tensors)` works on some of `count` rows and returns tensors that begin with
        a dimension of rows, or of one for each call, and that are put together. Rows do not depend
        on each other. Its random numbers are of rows. Gradients go to weights and to the tensors.
        """
        if self.number == 1:
            return function(slice(0, count), *tensors)
        anchor = torch.zeros((), requires_grad=True)  # pixels and ids want no gradient
        found: tuple[Tensor, ...] = _InParts.apply(self, function, count, anchor, *tensors)
        return found

    def split(self, count: int) -> list[slice]:
        """Parts of equal size, give or take a row; none is empty unless all is."""
        number = max(min(self.number, count), 1)
        return [slice(count * i // number, count * (i + 1) // number) for i in range(number)]

    def passes(self, count: int) -> list[slice]:
        """These parts, and then the first one again until there are enough."""
        parts = self.split(count)
        return parts + parts[:1] * (self.least - len(parts))

    def drawing(self, rows: slice, count: int) -> contextlib.AbstractContextManager[object]:
        """Where random numbers are those that these rows of `count` have in the whole batch."""
        return _DrawnWhole(rows, count) if self.draws and count else contextlib.nullcontext()


class _InParts(torch.autograd.Function):
    """The rows in parts without graph; in backward each part again, with one."""

    @staticmethod
    def forward(
        ctx: Any, plan: MicroBatches, function: Function, count: int, _: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        device = tensors[0].device
        ctx.plan, ctx.function, ctx.count = plan, function, count
        ctx.random = _random_state(device)
        ctx.autocast = (
            device.type,
            torch.get_autocast_dtype(device.type),
            torch.is_autocast_enabled(device.type),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        found = []
        for rows in plan.passes(count):
            _set_random_state(device, ctx.random)
            with plan.drawing(rows, count):
                found.append(function(rows, *tensors))
        torch.clear_autocast_cache()  # of weights without gradient, which later layers would take
        del found[len(plan.split(count)) :]
        ctx.lengths = [[len(part) for part in parts] for parts in zip(*found, strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
        device = tensors[0].device
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        passes = ctx.plan.passes(ctx.count)
        cut = [
            _cut(gradient, lengths, len(passes))
            for gradient, lengths in zip(gradients, ctx.lengths, strict=True)
        ]
        with _own_random_state(device):
            for rows, *wanted in zip(passes, *cut, strict=True):
                _set_random_state(device, ctx.random)
                # Around backward too: layers that checkpoint their activations draw again there.
                with ctx.plan.drawing(rows, ctx.count):
                    kind, dtype, enabled = ctx.autocast
                    with torch.enable_grad(), torch.autocast(kind, dtype, enabled):
                        found = ctx.function(rows, *leaves)
                    pairs = [
                        pair
                        for pair in zip(found, wanted, strict=True)
                        if pair[1] is not None and pair[0].requires_grad
                    ]
                    if pairs:
                        outputs, given = zip(*pairs, strict=True)
                        torch.autograd.backward(outputs, given)
        return (None, None, None, None, *(leaf.grad for leaf in leaves))


def _cut(gradient: Tensor | None, lengths: list[int], number: int) -> list[Tensor | None]:
    """Of each pass; zero of those that only repeated the first."""
    if gradient is None:
        return [None] * number
    parts = list(torch.split(gradient, lengths))
    return [*parts, *[torch.zeros_like(parts[0])] * (number - len(parts))]


class _DrawnWhole(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random numbers for the rows `rows` of `count`: drawn for all, of which these are kept.

    Whatever draws calls one of a few operators of torch, which are caught here; those that do not
    draw row by row are refused.
    """

    def __init__(self, rows: slice, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows, self._count = rows, count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        name = func._schema.name
        if name in _FACTORIES:
            own = self._own(args[0])
            whole = func([self._whole(args[0]), *args[0][1:]], *args[1:], **kwargs)
            return whole[own].clone()
        if name in _FILLS and not isinstance(args[1] if len(args) > 1 else None, Tensor):
            whole = func(self._empty(args[0]), *args[1:], **kwargs)
            return args[0].copy_(whole[self._own(args[0].shape)])
        if name == "aten::native_dropout":
            return self._drop(func, *args)
        if _dropout_of(func, args, kwargs) == 0:  # an attention kernel that could draw
            return func(*args, **kwargs)
        raise TrainingError(
            f"the network draws random numbers with {name}, which train.accum_freq cannot draw as"
            " the whole batch would; use train.accum_freq = 1"
        )

    def _drop(self, func: Any, x: Tensor, rate: float, training: bool) -> tuple[Tensor, Tensor]:
        """A GPU's dropout, which draws and multiplies at once."""
        _, whole = func(self._empty(x).fill_(1), rate, training)
        mask = whole[self._own(x.shape)].clone()
        factor = 1 / (1 - rate) if rate < 1 else 0.0
        return (x.float() * mask * factor).to(x.dtype), mask

    def _empty(self, like: Tensor) -> Tensor:
        """Room for the whole, laid out in memory as the part is: that is the order of drawing."""
        order = sorted(range(like.ndim), key=like.stride, reverse=True)
        size = (self._whole(like.shape), *like.shape[1:])
        return torch.empty_permuted(size, order, dtype=like.dtype, device=like.device)

    def _whole(self, shape: Any) -> int:
        return self._per_row(shape) * self._count

    def _own(self, shape: Any) -> slice:
        each = self._per_row(shape)
        return slice(self._rows.start * each, self._rows.stop * each)

    def _per_row(self, shape: Any) -> int:
        """How many of the first dimension belong to a row: heads, for instance."""
        rows = self._rows.stop - self._rows.start
        if not shape or shape[0] % rows:
            raise TrainingError(
                f"the network draws random numbers of shape {tuple(shape)} for {rows} rows, which"
                " train.accum_freq cannot draw as the whole batch would; use train.accum_freq = 1"
            )
        return int(shape[0] // rows)


def check_separable(network: nn.Module, thaws: bool) -> None:
    """ConfigError if rows depend on each other. `thaws`: what is frozen will be trained later."""
    for name, norm in batch_norms(network).items():
        if norm.training or thaws:
            raise ConfigError(
                f"train.accum_freq: {name} is batch norm, whose statistics are of the whole batch;"
                " use train.accum_freq = 1, or a ViT"
            )


@torch.no_grad()
def draws(network: nn.Module, *inputs: Tensor) -> bool:
    """Whether it draws random numbers; it and the generators are afterwards as they were."""
    device = inputs[0].device
    with _own_random_state(device):
        before = _random_state(device)
        network(*inputs)
        pairs = zip(before, _random_state(device), strict=True)
        return not all(torch.equal(old, new) for old, new in pairs)


def _dropout_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return None
    place = names.index("dropout_p")
    rate: float = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
    return rate


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that layers on this device draw from."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextlib.contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within, the generators are afterwards as they were."""
    states = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(device, states)
