"""The numbers that a step computes in, and the loss scale that fp16 needs.

Weights, gradients, moments and losses are float32 in all of them; what differs is how the towers
multiply.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipserve.embed import computes_bf16
from clipserve.errors import ConfigError
from training.distributed import ALONE, World
from training.fsdp import scale_gradients
from training.state import Counters

logger = logging.getLogger(__name__)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GROWTH_INTERVAL = 2000
_LARGEST_SCALE = 2.0**24


@dataclass(frozen=True)
class Precision:
    """`name` is fp32, tf32, bf16 or fp16."""

    name: str = "fp32"

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in, if it does."""
        return _AUTOCAST.get(self.name)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale: fp16 has no numbers below 6e-8."""
        return self.name == "fp16"


def choose(wanted: str, device: torch.device, world: World = ALONE) -> Precision:
    """What `train.precision` means on a device; sets torch's switches for TF32, which are global.

    "auto" is what rank 0 finds best, on all ranks. Raises ConfigError for tf32 where there is none.
    """
    best = world.tell("bf16" if computes_bf16(device) else "fp32")  # asked for or not: all must
    wanted = best if wanted == "auto" else wanted
    if wanted == "tf32" and not _computes_tf32(device):
        raise ConfigError(
            f"train.precision = tf32 needs a GPU that has it (compute capability 8.0 or more), not"
            f" this {device.type}; use auto, bf16 or fp32"
        )
    slow = (wanted == "bf16" and not computes_bf16(device)) or (
        wanted == "fp16" and device.type == "cpu"
    )
    if slow:
        logger.warning("train.precision = %s, which this %s computes slowly", wanted, device.type)
    if device.type == "cuda":  # cuDNN's is on in a fresh torch, so fp32 would not be that
        torch.backends.cuda.matmul.allow_tf32 = wanted == "tf32"
        torch.backends.cudnn.allow_tf32 = wanted == "tf32"
    return Precision(wanted)


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Forward. On a CPU with the plain attention kernel: the fused one's bf16 backward took 41 % of
    a step (2-core Xeon with AMX, 2026-11). And without torch's shortcut through attention in
    evaluation mode, which autocast makes slower than the long way: the momentum copy's."""
    if precision.autocast is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=precision.autocast))
        stack.enter_context(attention_kernel(precision, device))
        stack.enter_context(without_shortcut())
        yield


@contextlib.contextmanager
def without_shortcut() -> Iterator[None]:
    """Attention in evaluation mode by the operations that it has in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def attention_kernel(precision: Precision, device: torch.device) -> Iterator[None]:
    """That of `computing`; also around backward, where activations are computed again."""
    with contextlib.ExitStack() as stack:
        if precision.autocast is not None and device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, section 3.2), with torch's numbers.

    Not torch.amp.GradScaler, which decides by what one rank has of the gradients; this decides by
    the norm that all ranks share, and lives in the counters, so that a continuation is exact. The
    scale is a power of two: it changes no digit of what is in range.
    """

    counters: Counters
    is_on: bool

    @property
    def factor(self) -> float:
        return self.counters.loss_scale if self.is_on else 1.0

    def undo(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gradients of the loss, from those of the scaled loss."""
        if self.is_on:
            scale_gradients(parameters, 1 / self.factor)

    def overflows(self, norm: Tensor, loss: Tensor) -> bool:
        """Count one more step; whether a smaller scale, from now on, may make its gradient finite.

        The same on all ranks, as `norm` and `loss` are.
        """
        if not self.is_on:
            return False
        counters = self.counters
        length, value = torch.stack([norm, loss.to(norm)]).tolist()
        if not math.isfinite(length) and math.isfinite(value) and counters.loss_scale > 1:
            counters.loss_scale /= 2
            counters.steps_at_scale = 0
            return True
        counters.steps_at_scale += 1
        if counters.steps_at_scale == _GROWTH_INTERVAL:
            counters.loss_scale = min(2 * counters.loss_scale, _LARGEST_SCALE)
            counters.steps_at_scale = 0
        return False


def _computes_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
