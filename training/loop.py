"""The training loop, top to bottom, in the order in which things happen. Start at `train`."""

import contextlib
import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipserve.config import Config, dump_toml
from clipserve.embed import prepare as prepare_for_inference
from clipserve.errors import ClipserveError, TooManyBadSamples, TrainingError
from clipserve.files import write_atomic
from clipserve.model import Model
from training.data import open_data
from training.distributed import connect
from training.evaluate.retrieval import evaluate_retrieval
from training.objectives.contrastive import contrastive_loss
from training.optim import clamp_logit_scale, learning_rate
from training.recipe import Run, prepare
from training.run_directory import RunDirectory
from training.signals import Signals, Wish, listening
from training.state import seed_step
from training.streaming import Batch
from training.track import Tracker

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
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


def train(config: Config, resume: str = "auto", console: Console | None = None) -> TrainResult:
    """Train as `config` says, into `config.out`; alone, or as one of torchrun's processes.

    resume: "auto" continues from `latest` if it is there, "no" refuses a directory with a run,
    else the checkpoint directory to continue from. Raises ClipserveError.
    """
    directory = RunDirectory(Path(config.out), config.train.keep_checkpoints)
    with connect() as world, contextlib.ExitStack() as stack:
        signals = stack.enter_context(listening())
        with world.main_first():
            data = open_data(config, directory)
        run = prepare(config, data, world)
        with world.main_first():
            if world.is_main:
                stack.enter_context(directory.lock())
                write_atomic(directory.path / "config.toml", dump_toml(config))
        start = directory.find_start(resume)
        if start is not None:
            run.state.restore(start)
            if world.is_main:
                logger.info("continuing from %s at step %d", start, run.state.counters.step)
        step = run.state.counters.step
        with world.main_first():
            screen = (console or Console()) if world.is_main else None
            tracker = Tracker(directory.path, step, run.total_steps, screen)
        with tracker:
            return _loop(run, directory, tracker, signals)


def _loop(run: Run, directory: RunDirectory, tracker: Tracker, signals: Signals) -> TrainResult:
    config, state, world = run.config, run.state, run.world
    counters, per_epoch = state.counters, run.stream.order.batches_per_epoch
    forward = _compile(run)
    metrics: dict[str, float] = {}
    losses: dict[str, Tensor] = {}
    base_seconds, clock = counters.seconds, _Clock()
    last_save, saved_step = time.monotonic(), counters.step

    def save(is_scored: bool = False) -> None:
        nonlocal last_save, saved_step
        if losses:
            _check_finite(losses, counters.step, directory)
        if world.is_main:
            _save(run, directory, metrics if is_scored else {})
        last_save, saved_step = time.monotonic(), counters.step

    batches = run.stream.batches(
        state.position,
        run.total_steps - counters.step,
        config.data.workers,
        pin=run.device.type == "cuda",
    )
    with contextlib.closing(batches):
        while counters.step < run.total_steps:
            # ---- data
            before = time.monotonic()
            batch, failure = _take(batches)
            clock.waited += time.monotonic() - before

            # ---- agree: what every rank has, and what was asked for meanwhile
            wish = signals.take() | _due(config, last_save)
            found = world.exchange(_FAILED if failure else len(batch.samples), int(wish))
            counts, wishes = found[:, 0].tolist(), Wish(int(np.bitwise_or.reduce(found[:, 1])))
            for bad in batch.bad:
                tracker.bad_sample(counters.step + 1, bad)
            failure = failure or _find_failure(run, counts)
            if (wishes or failure) and counters.step > saved_step:
                _save_despite(failure, save)
            if failure:
                raise failure
            if Wish.STOP in wishes:
                break
            counters.samples += sum(counts)
            counters.bad_samples += run.stream.order.size_at(state.position) - sum(counts)

            # ---- step
            lr = learning_rate(config.optim, counters.step, run.total_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            seed_step(config.train.seed, counters.step, world.rank)
            losses = _step(run, forward, batch, counts)
            clamp_logit_scale(state.model)
            state.position = run.stream.order.advance(state.position)
            counters.step += 1
            clock.count(sum(counts), batch)
            tracker.advance(counters.step)
            counters.seconds = base_seconds + clock.total

            # ---- log
            last = counters.step == run.total_steps
            if counters.step % config.train.log_every == 0 or last:
                _check_finite(losses, counters.step, directory)
                tracker.log(
                    counters.step,
                    {
                        "epoch": counters.step / per_epoch,
                        "samples": counters.samples,
                        **{name: loss.item() for name, loss in losses.items()},
                        "lr": lr,
                        "logit_scale": state.model.logit_scale.item(),
                        **clock.lap(),
                    },
                )

            # ---- evaluate and save
            epoch_end = state.position.consumed == 0
            every = config.train.checkpoint_every_steps
            if epoch_end or last:
                with clock.paused():
                    if run.val is not None and world.is_main:
                        metrics = _evaluate(run)
                        tracker.log(counters.step, metrics)
                    save(is_scored=bool(metrics))
            elif every is not None and counters.step % every == 0:
                with clock.paused():
                    save()

    return TrainResult(
        best=directory.best,
        step=counters.step,
        seconds=counters.seconds,
        samples_per_second=counters.samples / max(counters.seconds, 1e-9),
        metrics=metrics,
        stopped_by=signals.stopped_by if counters.step < run.total_steps else None,
    )


def _take(batches: Iterator[Batch]) -> tuple[Batch, ClipserveError | OSError | None]:
    """The next batch, or why there is none."""
    try:
        return next(batches), None
    except (ClipserveError, OSError) as error:
        return Batch(torch.empty(0), torch.empty(0), [], 0), error


def _due(config: Config, last_save: float) -> Wish:
    """The checkpoint that time asks for."""
    minutes = config.train.checkpoint_every_minutes
    is_due = minutes is not None and time.monotonic() - last_save >= 60 * minutes
    return Wish.SAVE if is_due else Wish.NOTHING


def _find_failure(run: Run, counts: list[int]) -> ClipserveError | None:
    """What must stop every rank: one of them failed, or too many samples were bad."""
    if _FAILED in counts:
        return TrainingError(f"process {counts.index(_FAILED)} of this run failed; see its message")
    counters, good = run.state.counters, sum(counts)
    bad = counters.bad_samples + run.stream.order.size_at(run.state.position) - good
    seen = counters.samples + good + bad
    allowed = run.config.data.max_bad_fraction if good else 0.0
    if bad <= max(allowed * seen, _BAD_SAMPLES_ALWAYS_ALLOWED if allowed else 0):
        return None
    return TooManyBadSamples(
        f"{bad} of {seen} samples were bad, more than data.max_bad_fraction {allowed}; see"
        " bad_samples.jsonl"
    )


def _save_despite(failure: Exception | None, save: Callable[[], None]) -> None:
    """Save; if that fails too, the first failure is still the one to tell."""
    try:
        save()
    except OSError as error:
        if failure is None:
            raise
        failure.add_note(f"and no checkpoint could be written: {error.strerror}")


def _step(run: Run, forward: Forward, batch: Batch, counts: list[int]) -> dict[str, Tensor]:
    """Forward, backward, optimizer step; returns the loss over the global batch, and its terms."""
    model, optimizer, world = run.state.model, run.state.optimizer, run.world
    image, text = _encode(run, forward, batch)
    image, text = world.gather(image, counts), world.gather(text, counts)
    scale = world.share(model.logit_scale)
    terms = {}
    total = torch.zeros((), device=run.device)
    for objective in run.config.objectives:
        terms[f"loss/{objective.name}"] = contrastive_loss(image, text, scale)
        total = total + objective.weight * terms[f"loss/{objective.name}"]
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    world.sum_gradients(model.parameters())
    if run.config.optim.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.config.optim.grad_clip)
    optimizer.step()
    return {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}


def _encode(run: Run, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features of this rank's pairs, (B, E) each."""
    if not batch.samples:  # a short batch may leave a rank without; towers refuse an empty one
        nothing = torch.zeros(0, run.state.model.embed_dim, device=run.device)
        return nothing, nothing
    pixels = batch.pixels.to(run.device, non_blocking=True)
    ids = batch.ids.to(run.device, non_blocking=True)
    with _precision(run):
        return forward(run.state.model.transform.normalize(pixels), ids)


def _compile(run: Run) -> Forward:
    return torch.compile(run.state.model) if run.compile else run.state.model


@contextlib.contextmanager
def _precision(run: Run) -> Iterator[None]:
    """bf16 autocast. On a CPU with the plain attention kernel: the fused one's bf16 backward took
    41 % of a step (2-core Xeon with AMX, 2026-11)."""
    if not run.autocast:
        yield
        return
    with torch.autocast(run.device.type, dtype=torch.bfloat16), contextlib.ExitStack() as stack:
        if run.device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _evaluate(run: Run) -> dict[str, float]:
    """Retrieval on the validation shards, by the model as it would be served."""
    assert run.val is not None
    trained = run.state.model
    network = copy.deepcopy(trained.network)  # the tokenizer's tables would take longer
    served = Model(
        network, trained.architecture, trained.transform, trained.tokenizer, trained.info
    )
    model = prepare_for_inference(served, str(run.device))
    return evaluate_retrieval(model, run.val, prefix="val/")


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
    directory.save(run.state, description, is_best)


def _check_finite(losses: dict[str, Tensor], step: int, directory: RunDirectory) -> None:
    loss = losses["loss"].item()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step}: training diverged; lower optim.lr or set"
            f" optim.grad_clip; the last good checkpoint is {directory.path / 'latest'}"
        )


class _Clock:
    """Time spent training, without validation and saving; rates since the last lap."""

    def __init__(self) -> None:
        self._started = self._lap = time.monotonic()
        self.waited = 0.0
        self._samples = self._own = self._truncated = 0

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    def count(self, samples: int, own: Batch) -> None:
        """A step on `samples` samples of all ranks, of which these were this rank's."""
        self._samples += samples
        self._own += len(own.samples)
        self._truncated += own.num_truncated

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Left out of the rates, not of the total."""
        before = time.monotonic()
        yield
        self._lap += time.monotonic() - before

    def lap(self) -> dict[str, float]:
        """Rates since the last call."""
        elapsed = time.monotonic() - self._lap
        rates = {
            "samples_per_second": self._samples / elapsed,
            "data_wait_fraction": self.waited / elapsed,
            "truncated_fraction": self._truncated / max(self._own, 1),
        }
        self._lap, self.waited = time.monotonic(), 0.0
        self._samples = self._own = self._truncated = 0
        return rates
