"""The training loop, top to bottom, in the order in which things happen. Start at `train`."""

import contextlib
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from clipserve.config import Config, dump_toml
from clipserve.errors import TrainingError
from clipserve.files import write_atomic
from training.clock import Clock
from training.data import open_data
from training.distributed import connect, within_step
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
from training.saver import Saver
from training.signals import Signals, Wish, listening
from training.sinks import check_packages, open_sinks
from training.state import seed_step
from training.step import train_step
from training.streaming import Batch
from training.track import Tracker
from training.turn import agree, take
from training.vocabulary import find_or_build

logger = logging.getLogger(__name__)


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
    aside: Path | None = None
    """the checkpoint of its last step, if that was skipped and `latest` is an earlier one"""


def train(config: Config, resume: str = "auto", console: Console | None = None) -> TrainResult:
    """Train as `config` says, into `config.out`; alone, or as one of torchrun's processes.

    resume: "auto" continues from `latest` if it is there, "no" refuses a directory with a run,
    else the checkpoint directory to continue from. Raises ClipserveError.
    """
    check_packages(config.train.report_to)
    directory = RunDirectory(Path(config.out), config.train.keep_checkpoints)
    directory.check()
    with connect() as world, contextlib.ExitStack() as stack:
        with world.main_first():
            data = open_data(config, directory, world.is_main)
            vocabulary = find_or_build(config, data.train, directory, world.is_main)
        run = prepare(config, data, world, vocabulary)
        if world.is_main:
            stack.enter_context(directory.lock())
        with world.main_first():
            start = directory.find_start(resume)
            if start is not None:
                run.state.restore(start)
        restored = repr((run.state.position, run.state.counters))
        directory.check_shared(restored.encode(), "checkpoint", world)
        with world.main_first():
            if world.is_main:
                _take_over(run, directory, start, resume)
            screen = (console or Console()) if world.is_main else None
            step = run.state.counters.step
            sinks = open_sinks(config, step) if world.is_main else []
            tracker = Tracker(directory, step, run.total_steps, screen, sinks)
            stack.enter_context(tracker)
        settings = directory.path / "config.toml"
        seen = settings.read_bytes() if settings.exists() else b""
        directory.check_shared(seen, settings.name, world)
        signals = stack.enter_context(listening())
        if not world.is_main:
            return _loop(run, directory, tracker, signals)
        with noting(directory.path, run.total_steps) as standing:
            result = _loop(run, directory, tracker, signals)
            if result.stopped_by is not None:
                standing.state, standing.reason = "stopped", result.stopped_by.name
                tracker.is_finished = False
            return result


def _take_over(run: Run, directory: RunDirectory, start: Path | None, resume: str) -> None:
    """Make the run directory that of a run which goes on from `start`, if there is one."""
    counters = run.state.counters
    if start is not None:
        if resume != "auto":
            directory.go_back_to(start, counters.step)
        logger.info("continuing from %s at step %d", start, counters.step)
    if not (directory.path / "best").exists():  # that was of a course that was left, or of another
        counters.best = None
    write_atomic(directory.path / "config.toml", dump_toml(run.config))


def _loop(run: Run, directory: RunDirectory, tracker: Tracker, signals: Signals) -> TrainResult:
    config, state, world = run.config, run.state, run.world
    counters, early_stop = state.counters, config.train.early_stop
    losses: dict[str, Tensor] = {}
    skipped: dict[str, Tensor] = {}
    base_seconds, clock, sanity = counters.seconds, Clock(run.work), Sanity(run)
    saver = Saver(run, directory, tracker)
    if world.is_main:
        sanity.begin()
    stopped_by: signal.Signals | None = None

    batches = run.stream.batches(
        state.position,
        run.total_steps - counters.step,
        config.data.workers,
        pin=run.device.type == "cuda",
    )
    with contextlib.closing(batches):
        while True:
            # ---- evaluate and save
            with clock.paused():
                saver.settle()
            if counters.step >= run.total_steps or counters.is_stale(early_stop):
                break

            # ---- data
            before = time.monotonic()
            batch, failure = take(batches, signals)
            clock.waited += time.monotonic() - before
            for bad in batch.bad:
                tracker.bad_sample(counters.step + 1, bad)

            # ---- agree: what every rank has, and what was asked for meanwhile
            turn = agree(run, batch, failure, signals, saver.due)
            if turn.failure is not None:
                saver.save_despite(turn.failure, is_shared=bool(turn.counts))
                raise turn.failure
            if turn.stopped_by:
                stopped_by = turn.stopped_by
                saver.save()
                break
            if Wish.SAVE in turn.wishes:
                with clock.paused():
                    saver.settle(is_wanted=True)

            # ---- step
            lr = set_rates(state.optimizer, config.optim, counters.step, run.total_steps)
            run.frozen.hold(counters.step)
            if counters.step == run.frozen.until:
                counters.losses = []  # a tower's dropout, say, may raise them for good
            seed_step(config.train.seed, counters.step, world.rank)
            fault: SkippedStep | None = None
            try:
                kept = keeping_statistics(state.model.network)
                with within_step(), kept, run.adapters.dropout(config.train.seed, counters.step):
                    losses = train_step(run, batch, turn.counts)
            except SkippedStep as skipped_step:
                fault, losses = skipped_step, skipped_step.losses
            except Exception as error:  # another rank is gone, or there is no memory for it
                saver.save_despite(error, is_shared=False)
                raise

            # ---- count
            _count(run, sum(turn.counts))
            clock.count(sum(turn.counts), batch)
            counters.seconds = base_seconds + clock.total
            tracker.advance(counters.step)
            if fault is not None:
                end = _skip(run, batch, fault, directory, tracker)
                if end is not None:
                    saver.save_despite(end)
                    raise end

            # ---- log
            for name in [name for name in losses if name.endswith("/skipped")]:
                skipped[name] = skipped.get(name, 0) + losses[name]  # since the last line
            if counters.step % config.train.log_every == 0 or counters.step == run.total_steps:
                values = _numbers(run, losses | skipped, lr) | clock.lap()
                tracker.log(counters.step, values)
                if world.is_main:
                    sanity.look(values)
                skipped = {}

    return TrainResult(
        best=directory.best,
        step=counters.step,
        seconds=counters.seconds,
        samples_per_second=counters.samples / max(counters.seconds, 1e-9),
        metrics=saver.metrics,
        stopped_by=stopped_by,
        stopped_early=counters.is_stale(early_stop),
        aside=saver.aside,
    )


def _count(run: Run, samples: int) -> None:
    """One more step, of so many good samples on all ranks."""
    state, order = run.state, run.stream.order
    state.counters.step += 1
    state.counters.samples += samples
    state.counters.bad_samples += order.size_at(state.position) - samples
    state.position = order.advance(state.position)


def _numbers(run: Run, losses: Mapping[str, Tensor], lr: float) -> dict[str, float]:
    """What is told of a step."""
    counters = run.state.counters
    return {
        "epoch": counters.step / run.stream.order.batches_per_epoch,
        "samples": counters.samples,
        **{name: loss.item() for name, loss in losses.items()},
        "skipped_steps": counters.skipped,
        "lr": lr,
        "logit_scale": run.state.model.logit_scale.item(),
    }


def _skip(
    run: Run, batch: Batch, fault: SkippedStep, directory: RunDirectory, tracker: Tracker
) -> TrainingError | None:
    """Count a step that was not taken, tell of its samples, and go back where that is wanted.

    Returns why the run has to end, if it has to.
    """
    counters = run.state.counters
    count_skipped(counters)
    keys = [run.stream.data.key(sample) for sample in batch.samples]
    tracker.skipped_samples(counters.step, keys, str(fault))
    what = "its samples are in skipped_samples.jsonl"
    if run.config.train.roll_back and wants_roll_back(counters, fault):
        start = directory.find_latest(run.world)
        if start is None:
            what += "; there is no checkpoint yet to go back to"
        else:
            roll_back(run.state, start, run.frozen.until)
            what += f"; the weights are those of {start.name} again"
    if run.world.is_main:
        logger.warning("step %d skipped: %s; %s", counters.step, fault, what)
    is_last = counters.step == run.total_steps
    return find_end(counters, run.config.train.max_skipped, fault, is_last, directory.path)
