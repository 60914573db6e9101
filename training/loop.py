"""The training loop, top to bottom, in the order in which things happen. Start at `train`."""

import contextlib
import copy
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from clipserve.config import Config, dump_toml
from clipserve.embed import prepare as prepare_for_inference
from clipserve.errors import CheckpointError, ClipserveError, TooManyBadSamples, TrainingError
from clipserve.files import write_atomic
from clipserve.model import Model
from training.clock import Clock
from training.data import open_data
from training.distributed import ALONE, connect, within_step
from training.evaluate.retrieval import evaluate_retrieval
from training.guard import (
    SkippedStep,
    count_skipped,
    find_end,
    keeping_statistics,
    roll_back,
    wants_roll_back,
)
from training.optim import set_rates
from training.recipe import Run, prepare
from training.run_directory import RunDirectory
from training.runs import noting
from training.sanity import Sanity
from training.signals import Signals, StopWaiting, Wish, listening
from training.sinks import check_packages, open_sinks
from training.state import seed_step
from training.step import train_step
from training.streaming import Batch
from training.track import Tracker
from training.vocabulary import find_or_build

logger = logging.getLogger(__name__)

_BAD_SAMPLES_ALWAYS_ALLOWED = 10
_FAILED = -1  # in place of a rank's number of samples


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    best: Path
    """the model directory with the best validation metric, or the last one"""
    step: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]
    stopped_by: signal.Signals | None = None
    """the signal that ended it early, with a checkpoint"""
    stopped_early: bool = False
    """whether train.early_stop did"""


def train(config: Config, resume: str = "auto", console: Console | None = None) -> TrainResult:
    """Train as `config` says, into `config.out`; alone, or as one of torchrun's processes.

    resume: "auto" continues from `latest` if it is there, "no" refuses a directory with a run,
    else the checkpoint directory to continue from. Raises ClipserveError.
    """
    check_packages(config.train.report_to)
    directory = RunDirectory(Path(config.out), config.train.keep_checkpoints)
    with connect() as world, contextlib.ExitStack() as stack:
        with world.main_first():
            data = open_data(config, directory, world.is_main)
            vocabulary = find_or_build(config, data.train, directory, world.is_main)
        run = prepare(config, data, world, vocabulary)
        if world.is_main:
            stack.enter_context(directory.lock())
        with world.main_first():
            _continue(run, directory, resume)
        with world.main_first():
            if world.is_main:
                write_atomic(directory.path / "config.toml", dump_toml(config))
            screen = (console or Console()) if world.is_main else None
            step = run.state.counters.step
            sinks = open_sinks(config, step) if world.is_main else []
            tracker = Tracker(directory.path, step, run.total_steps, screen, sinks)
            stack.enter_context(tracker)
        if not world.agrees(repr((run.state.position, run.state.counters)).encode()):
            raise CheckpointError(
                f"the processes of this run do not find the same checkpoint in {directory.path};"
                " give them one `out`, on a disk that all share"
            )
        signals = stack.enter_context(listening())
        if not world.is_main:
            return _loop(run, directory, tracker, signals)
        with noting(directory.path, run.total_steps) as standing:
            result = _loop(run, directory, tracker, signals)
            if result.stopped_by is not None:
                standing.state, standing.reason = "stopped", result.stopped_by.name
            return result


def _continue(run: Run, directory: RunDirectory, resume: str) -> None:
    """Take over the checkpoint that `resume` means, if there is one."""
    start = directory.find_start(resume)
    if start is None:
        return
    run.state.restore(start)
    if run.world.is_main:
        if resume != "auto":
            directory.go_back_to(start, run.state)
        logger.info("continuing from %s at step %d", start, run.state.counters.step)


def _loop(run: Run, directory: RunDirectory, tracker: Tracker, signals: Signals) -> TrainResult:
    config, state, world = run.config, run.state, run.world
    counters, per_epoch = state.counters, run.stream.order.batches_per_epoch
    early_stop = config.train.early_stop
    metrics: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    skipped: dict[str, Tensor] = {}
    base_seconds, clock, sanity = counters.seconds, Clock(run.work), Sanity(run)
    if world.is_main:
        sanity.begin()
    last_save, saved_step = time.monotonic(), counters.step
    is_due = epoch_ended = False
    fault: SkippedStep | None = None
    stopped_by: signal.Signals | None = None

    def save(is_scored: bool = False) -> None:
        nonlocal last_save, saved_step
        if counters.step == saved_step:
            return
        if world.is_main or state.is_split:
            _save(run, directory, metrics if is_scored else {})
        last_save, saved_step = time.monotonic(), counters.step

    batches = run.stream.batches(
        state.position,
        run.total_steps - counters.step,
        config.data.workers,
        pin=run.device.type == "cuda",
    )
    with contextlib.closing(batches):
        while counters.step < run.total_steps and not counters.is_stale(early_stop):
            # ---- data
            before = time.monotonic()
            batch, failure = _take(batches, signals)
            clock.waited += time.monotonic() - before
            for bad in batch.bad:
                tracker.bad_sample(counters.step + 1, bad)

            # ---- agree: what every rank has, and what was asked for meanwhile
            due = Wish.NOTHING if fault else _due(config, last_save)
            turn = _agree(run, batch, failure, signals, due)
            if turn.failure is not None:
                _save_despite(turn.failure, save, directory)
                raise turn.failure
            if Wish.SAVE in turn.wishes or turn.stopped_by:
                with clock.paused():
                    save()
            if turn.stopped_by:
                stopped_by = turn.stopped_by
                break

            # ---- step
            lr = set_rates(state.optimizer, config.optim, counters.step, run.total_steps)
            run.frozen.hold(counters.step)
            seed_step(config.train.seed, counters.step, world.rank)
            fault = None
            try:
                kept = keeping_statistics(state.model.network)
                with within_step(), kept, run.adapters.dropout():
                    losses = train_step(run, batch, turn.counts)
            except SkippedStep as skipped_step:
                fault, losses = skipped_step, skipped_step.losses
            except TrainingError as error:  # a rank is gone; no weight was changed yet
                _save_despite(error, save, directory)
                raise
            counters.step += 1
            counters.samples += sum(turn.counts)
            counters.bad_samples += run.stream.order.size_at(state.position) - sum(turn.counts)
            state.position = run.stream.order.advance(state.position)
            for name in [name for name in losses if name.endswith("/skipped")]:
                skipped[name] = skipped.get(name, 0) + losses[name]  # since the last line
            clock.count(sum(turn.counts), batch)
            tracker.advance(counters.step)
            counters.seconds = base_seconds + clock.total
            last = counters.step == run.total_steps
            if fault is not None:
                _skip(run, batch, fault, directory, tracker)
                end = find_end(counters, config.train.max_skipped, fault, last, directory.path)
                if end is not None:
                    _save_despite(end, save, directory)
                    raise end

            # ---- log
            if counters.step % config.train.log_every == 0 or last:
                values = {
                    "epoch": counters.step / per_epoch,
                    "samples": counters.samples,
                    **{name: loss.item() for name, loss in (losses | skipped).items()},
                    "skipped_steps": counters.skipped,
                    "lr": lr,
                    "logit_scale": state.model.logit_scale.item(),
                    **clock.lap(),
                }
                tracker.log(counters.step, values)
                if world.is_main:
                    sanity.look(values)
                skipped = {}

            # ---- evaluate and save; after a skipped step not yet, for the weights may be broken
            epoch_ended |= state.position.consumed == 0
            every = config.train.checkpoint_every_steps
            is_due |= every is not None and counters.step % every == 0
            if fault is not None and not last:
                continue
            with clock.paused():
                if epoch_ended or last:
                    if run.val is not None:
                        metrics = _evaluate(run)
                        tracker.log(counters.step, metrics)
                    if early_stop is not None:
                        if world.is_main:
                            counters.watch(metrics[early_stop.metric])
                        counters.stale = int(world.exchange(counters.stale)[0, 0])
                    save(is_scored=bool(metrics))
                elif is_due:
                    save()
            is_due = epoch_ended = False

    return TrainResult(
        best=directory.best,
        step=counters.step,
        seconds=counters.seconds,
        samples_per_second=counters.samples / max(counters.seconds, 1e-9),
        metrics=metrics,
        stopped_by=stopped_by,
        stopped_early=counters.is_stale(early_stop),
    )


def _take(
    batches: Iterator[Batch], signals: Signals
) -> tuple[Batch, ClipserveError | OSError | None]:
    """The next batch, an empty one if a signal came first, or why there is none."""
    empty = torch.empty(0)
    nothing = Batch(empty, empty, [], 0, groups=empty)
    try:
        with signals.waiting():
            return next(batches), None
    except StopWaiting:
        return nothing, None
    except (ClipserveError, OSError) as error:
        return nothing, error


@dataclass(frozen=True)
class _Turn:
    """What the ranks agreed on before a step: each one's good samples, or what comes instead."""

    counts: list[int]
    wishes: Wish = Wish.NOTHING
    stopped_by: signal.Signals | None = None
    failure: Exception | None = None


def _agree(run: Run, batch: Batch, failure: Exception | None, signals: Signals, due: Wish) -> _Turn:
    wishes = signals.take() | due
    stop = int(signals.stopped_by or 0) if Wish.STOP in wishes else 0
    try:
        found = run.world.exchange(_FAILED if failure else len(batch.samples), int(wishes), stop)
    except TrainingError as error:
        return _Turn([], failure=failure or error)
    counts = found[:, 0].tolist()
    if _FAILED in counts:
        what = f"process {counts.index(_FAILED)} of this run failed; its own message says why"
        return _Turn(counts, failure=failure or TrainingError(what))
    if number := int(found[:, 2].max()):
        return _Turn(counts, Wish.STOP, signal.Signals(number))
    wishes = Wish(int(np.bitwise_or.reduce(found[:, 1])))
    return _Turn(counts, wishes, failure=_find_too_many_bad(run, sum(counts), batch))


def _due(config: Config, last_save: float) -> Wish:
    """The checkpoint that time asks for."""
    minutes = config.train.checkpoint_every_minutes
    is_due = minutes is not None and time.monotonic() - last_save >= 60 * minutes
    return Wish.SAVE if is_due else Wish.NOTHING


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


def _save_despite(failure: Exception, save: Callable[[], None], directory: RunDirectory) -> None:
    """Save the steps done so far; if that fails too, the first failure is still the one to tell."""
    try:
        save()
    except (CheckpointError, TrainingError) as error:
        failure.add_note(f"and no checkpoint could be written: {error}")
        if (directory.path / "latest").exists():
            failure.add_note(f"the last one is {(directory.path / 'latest').resolve()}")


def _skip(
    run: Run, batch: Batch, fault: SkippedStep, directory: RunDirectory, tracker: Tracker
) -> None:
    """Count a step that was not taken, tell of its samples, and go back where that is wanted."""
    counters = run.state.counters
    count_skipped(counters)
    keys = [run.stream.data.key(sample) for sample in batch.samples]
    tracker.skipped_samples(counters.step, keys, str(fault))
    what = "its samples are in skipped_samples.jsonl"
    if run.config.train.roll_back and wants_roll_back(counters, fault):
        start = directory.find_start("auto")
        if start is None:
            what += "; there is no checkpoint yet to go back to"
        else:
            roll_back(run.state, start)
            what += f"; the weights are those of {start.name} again"
    if run.world.is_main:
        logger.warning("step %d skipped: %s; %s", counters.step, fault, what)


def _evaluate(run: Run) -> dict[str, float]:
    """Retrieval on the validation shards, by the model as it would be served.

    All ranks take part, the first has the numbers.
    """
    assert run.val is not None
    trained = run.state.whole()
    network = trained.network
    if not run.state.is_split:
        network = copy.deepcopy(network)  # the tokenizer's tables would take longer
    served = Model(
        network, trained.architecture, trained.transform, trained.tokenizer, trained.info
    )
    model = prepare_for_inference(served, str(run.device))
    settings = run.config.train
    return evaluate_retrieval(
        model,
        run.val,
        prefix="val/",
        rerank=settings.rerank,
        score=settings.rerank_score,
        world=run.world,
    )


def _save(run: Run, directory: RunDirectory, scores: dict[str, float]) -> None:
    """A checkpoint of this step; the best one if its score is."""
    counters = run.state.counters
    score = scores[run.config.train.best_metric] if scores else None
    is_best = score is not None and (counters.best is None or score > counters.best)
    if is_best:
        counters.best = score
    summary = {
        "step": counters.step,
        "samples": counters.samples,
        "epoch": counters.step / run.stream.order.batches_per_epoch,
        "seconds": round(counters.seconds, 1),
        "device": str(run.device),
        "precision": "bf16" if run.autocast else "fp32",
        "processes": run.world.size,
        **scores,
    }
    description = {
        "objective": tuple(objective.name for objective in run.config.objectives),
        "training": summary,
        "data_fingerprint": "+".join(d.fingerprint for d in run.stream.data.datasets),
    }
    world = run.world if run.state.is_split else ALONE
    directory.save(run.state, description, is_best, world)
