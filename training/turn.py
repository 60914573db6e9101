"""What comes before a step: a batch for every rank, and what they agree to do with it.

Start at `take` and `agree`.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from clipserve.errors import ClipserveError, TooManyBadSamples, TrainingError
from training.recipe import Run
from training.signals import Signals, StopWaiting, Wish
from training.streaming import Batch

_BAD_SAMPLES_ALWAYS_ALLOWED = 10
_FAILED = -1  # in place of a rank's number of samples


def take(batches: Iterator[Batch], signals: Signals) -> tuple[Batch, Exception | None]:
    """The next batch, an empty one if a signal came first, or why there is none."""
    empty = torch.empty(0)
    nothing = Batch(empty, empty, [], 0, groups=empty)
    try:
        with signals.waiting():
            return next(batches), None
    except StopWaiting:
        return nothing, None
    except Exception as error:  # of any kind: from a worker that lacks memory, say
        return nothing, error


@dataclass(frozen=True)
class Turn:
    """What the ranks agreed on before a step: each one's good samples, or what comes instead."""

    counts: list[int]
    """empty if a rank is gone"""
    wishes: Wish = Wish.NOTHING
    stopped_by: signal.Signals | None = None
    failure: Exception | None = None


def agree(run: Run, batch: Batch, failure: Exception | None, signals: Signals, due: Wish) -> Turn:
    """The same on all ranks, but for `failure`: a rank that has one of its own keeps it."""
    wishes = signals.take() | due
    stop = int(signals.stopped_by or 0) if Wish.STOP in wishes else 0
    try:
        found = run.world.exchange(_FAILED if failure else len(batch.samples), int(wishes), stop)
    except TrainingError as error:
        return Turn([], failure=failure or error)
    counts = found[:, 0].tolist()
    if _FAILED in counts:
        what = f"process {counts.index(_FAILED)} of this run failed; its own message says why"
        return Turn(counts, failure=failure or TrainingError(what))
    if number := int(found[:, 2].max()):
        return Turn(counts, Wish.STOP, signal.Signals(number))
    wishes = Wish(int(np.bitwise_or.reduce(found[:, 1])))
    return Turn(counts, wishes, failure=_find_too_many_bad(run, sum(counts), batch))


def _find_too_many_bad(run: Run, good: int, batch: Batch) -> ClipserveError | None:
    """What is wrong with the batch that gave `good` samples, on all ranks together."""
    counters = run.state.counters
    size = run.stream.order.size_at(run.state.position)
    if not good:
        first = f"; the first: {batch.bad[0].reason}" if batch.bad else ""
        return TooManyBadSamples(
            f"none of the {size} samples of step {counters.step + 1} can be used{first}; see"
            " bad_samples.jsonl"
        )
    bad = counters.bad_samples + size - good
    seen = counters.samples + counters.bad_samples + size
    allowed = run.config.data.max_bad_fraction
    if bad <= max(allowed * seen, _BAD_SAMPLES_ALWAYS_ALLOWED if allowed else 0):
        return None
    return TooManyBadSamples(
        f"{bad} of {seen} samples were bad, more than data.max_bad_fraction {allowed}; see"
        " bad_samples.jsonl"
    )
