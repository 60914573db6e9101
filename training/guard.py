"""Steps that are better not taken: a loss or gradient that is not finite, a spike of the loss.

What is decided depends on the loss and the gradient of all ranks together and on counters that each
of them holds, so all decide alike. Start at `check_step`, which a step asks before it changes
anything; the loop does the rest.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from clipserve.config import TrainConfig
from clipserve.errors import TooManySkippedSteps
from training.buffers import remember
from training.state import Counters, State

_WINDOW = 128
_FEWEST = 32  # losses; before that they fall too fast to tell
# In nats. Deviations of a loss that has come to rest may be tiny, a rise of half a nat is none.
_LEAST_DEVIATION = 0.05
_REMEMBERED_STEPS = 1000
_STUCK = 3


class SkippedStep(Exception):
    """Why a step was not taken; nothing that outlives a step was changed."""

    def __init__(self, reason: str, losses: dict[str, Tensor], is_spike: bool) -> None:
        super().__init__(reason)
        self.losses = losses
        self.is_spike = is_spike


def check_step(
    counters: Counters, settings: TrainConfig, losses: dict[str, Tensor], norm: Tensor
) -> None:
    """Remember the loss of a sound step. Raises SkippedStep for one that must not be taken.

    The one place where a step waits for its device.
    """
    loss, length = torch.stack([losses["loss"], norm.to(losses["loss"])]).tolist()
    for name, value in (("loss", loss), ("gradient's norm", length)):
        if not math.isfinite(value):
            raise SkippedStep(f"the {name} is {value}", losses, is_spike=False)
    limit = _find_limit(counters.losses, settings.spike)
    if loss > limit:
        reason = f"the loss is {loss:.4g}, a spike above {limit:.4g}"
        raise SkippedStep(reason, losses, is_spike=True)
    counters.losses = [*counters.losses[1 - _WINDOW :], loss]


@contextlib.contextmanager
def keeping_statistics(network: nn.Module) -> Iterator[None]:
    """A block after which buffers are as before if its step is skipped or fails."""
    put_back = remember(network)
    try:
        yield
    except BaseException:
        put_back()
        raise


def count_skipped(counters: Counters) -> None:
    """The step that `counters` names was not taken."""
    recent = [step for step in counters.skipped_at if step > counters.step - _REMEMBERED_STEPS]
    counters.skipped_at = [*recent, counters.step]
    counters.skipped += 1


def wants_roll_back(counters: Counters, fault: SkippedStep) -> bool:
    """Whether the weights themselves may be what is wrong."""
    return fault.is_spike or _in_a_row(counters) % _STUCK == 0


def roll_back(state: State, checkpoint: Path, released_at: int | None = None) -> None:
    """All that learns or remembers, as it was in a checkpoint; steps and data go on.

    So a continuation needs to know nothing of it, and no batch is seen again. `released_at` is the
    step before which weights were frozen: the losses until then tell nothing of those after it.
    """
    counters, position = state.counters, state.position
    state.restore(checkpoint)
    is_of_before = released_at is not None and state.counters.step <= released_at < counters.step
    counters.losses = [] if is_of_before else state.counters.losses
    counters.rolled_back += 1
    state.counters, state.position = counters, position


def find_end(
    counters: Counters, allowed: int, fault: SkippedStep, is_last: bool, run: Path
) -> TooManySkippedSteps | None:
    """Why a run has to stop after a skipped step, if it has to."""
    recent = len(counters.skipped_at)
    if recent > allowed:
        what = f"{recent} of the last {min(counters.step, _REMEMBERED_STEPS)} steps were skipped"
        limit = f", more than train.max_skipped = {allowed}"
    elif is_last and _in_a_row(counters) >= _STUCK:
        what, limit = f"the last {_in_a_row(counters)} steps of the run were skipped", ""
    else:
        return None
    usual = "; if such losses are usual, raise train.spike, or set it to 0" * fault.is_spike
    return TooManySkippedSteps(
        f"{what}{limit}; at step {counters.step} {fault}. If training diverged, lower optim.lr or"
        f" set optim.grad_clip, and go on from an earlier checkpoint in {run} with --resume DIR, or"
        f" start anew; if samples are broken, skipped_samples.jsonl names them{usual}"
    )


def _find_limit(losses: list[float], deviations: float) -> float:
    """The loss above which a step is a spike, by median and median absolute deviation."""
    if not deviations or len(losses) < _FEWEST:
        return math.inf
    middle = median(losses)
    deviation = median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(deviation, _LEAST_DEVIATION)


def _in_a_row(counters: Counters) -> int:
    """How many steps up to this one were skipped."""
    expected = range(counters.step, 0, -1)
    found = 0
    for step, skipped in zip(expected, reversed(counters.skipped_at), strict=False):
        if step != skipped:
            break
        found += 1
    return found
