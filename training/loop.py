"""The training loop, top to bottom, in the order in which things happen. Start at `train`."""

import contextlib
import copy
import fcntl
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipserve import checkpoint
from clipserve.config import Config, dump_toml
from clipserve.embed import prepare as prepare_for_inference
from clipserve.errors import CheckpointError, ConfigError, TooManyBadSamples, TrainingError
from clipserve.files import link_atomic, new_directory, write_atomic
from clipserve.model import Model
from training.evaluate.retrieval import evaluate_retrieval
from training.objectives.contrastive import contrastive_loss
from training.optim import clamp_logit_scale, learning_rate
from training.recipe import Run, prepare
from training.state import Counters, restore_state, save_state
from training.streaming import Batch
from training.track import Tracker

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_BAD_SAMPLES_ALWAYS_ALLOWED = 10


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    best: Path
    """the model directory with the best validation metric, or the last one"""
    step: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, float]


def train(config: Config, resume: str = "auto", console: Console | None = None) -> TrainResult:
    """Train as `config` says, into `config.out`.

    resume: "auto" continues from `latest` if it is there, "no" refuses a directory with a run,
    else the checkpoint directory to continue from. Raises ClipserveError.
    """
    run = prepare(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        start = _find_start(out, resume)
        counters = Counters()
        if start is not None:
            counters = restore_state(start, run.model, run.optimizer, run.order)
            logger.info("continuing from %s at step %d", start, counters.step)
        write_atomic(out / "config.toml", dump_toml(config))
        with Tracker(out, counters.step, run.total_steps, console or Console()) as tracker:
            return _loop(run, out, counters, tracker)


def _loop(run: Run, out: Path, counters: Counters, tracker: Tracker) -> TrainResult:
    config, per_epoch = run.config, run.stream.batches_per_epoch
    forward = _compile(run)
    metrics: dict[str, float] = {}
    started, base_seconds = time.monotonic(), counters.seconds
    window_start, window_samples, waited, truncated = time.monotonic(), 0, 0.0, 0

    batches = run.stream.batches(
        counters.step, run.total_steps, config.data.workers, pin=run.device.type == "cuda"
    )
    while counters.step < run.total_steps:
        # ---- data
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        for bad in batch.bad:
            tracker.bad_sample(bad)
        counters.bad_samples += len(batch.bad)
        counters.samples += len(batch.samples)
        _check_bad(counters, config.data.max_bad_fraction if batch.samples else 0.0)

        # ---- step
        lr = learning_rate(config.optim, counters.step, run.total_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        losses = _step(run, forward, batch)
        clamp_logit_scale(run.model)
        counters.step += 1
        window_samples += len(batch.samples)
        truncated += batch.num_truncated
        tracker.advance(counters.step)
        counters.seconds = base_seconds + time.monotonic() - started

        # ---- log
        epoch_end = counters.step % per_epoch == 0
        last = counters.step == run.total_steps
        if counters.step % config.train.log_every == 0 or last:
            elapsed = time.monotonic() - window_start
            values = {name: loss.item() for name, loss in losses.items()}
            _check_finite(values, counters, out)
            tracker.log(
                counters.step,
                {
                    "epoch": counters.step / per_epoch,
                    "samples": counters.samples,
                    **values,
                    "lr": lr,
                    "logit_scale": run.model.logit_scale.item(),
                    "samples_per_second": window_samples / elapsed,
                    "data_wait_fraction": waited / elapsed,
                    "truncated_fraction": truncated / max(window_samples, 1),
                },
            )
            window_start, window_samples, waited, truncated = time.monotonic(), 0, 0.0, 0

        # ---- evaluate and save
        every = config.train.checkpoint_every_steps
        if epoch_end or last or (every is not None and counters.step % every == 0):
            paused = time.monotonic()
            if run.val is not None and (epoch_end or last):
                metrics = _evaluate(run)
                tracker.log(counters.step, metrics)
            _save(run, out, counters, metrics, is_scored=bool(metrics) and (epoch_end or last))
            window_start += time.monotonic() - paused

    return TrainResult(
        best=(out / "best" if (out / "best").exists() else out / "latest"),
        step=counters.step,
        seconds=counters.seconds,
        samples_per_second=counters.samples / max(counters.seconds, 1e-9),
        metrics=metrics,
    )


def _step(run: Run, forward: Forward, batch: Batch) -> dict[str, Tensor]:
    """Forward, backward, optimizer step; returns the loss and its terms."""
    pixels = batch.pixels.to(run.device, non_blocking=True)
    ids = batch.ids.to(run.device, non_blocking=True)
    with _precision(run):
        image, text = forward(run.model.transform.normalize(pixels), ids)
    terms = {}
    total = torch.zeros((), device=run.device)
    for objective in run.config.objectives:
        terms[f"loss/{objective.name}"] = contrastive_loss(image, text, run.model.logit_scale)
        total = total + objective.weight * terms[f"loss/{objective.name}"]
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    if run.config.optim.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.grad_clip)
    run.optimizer.step()
    return {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}


def _compile(run: Run) -> Forward:
    return torch.compile(run.model) if run.compile else run.model


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
    trained = run.model
    network = copy.deepcopy(trained.network)  # the tokenizer's tables would take longer
    served = Model(
        network, trained.architecture, trained.transform, trained.tokenizer, trained.info
    )
    model = prepare_for_inference(served, str(run.device))
    return evaluate_retrieval(model, run.val, prefix="val/")


def _save(
    run: Run, out: Path, counters: Counters, metrics: dict[str, float], is_scored: bool
) -> None:
    """Write checkpoints/step-N, then move `latest` and perhaps `best`, then drop old ones."""
    score = metrics[run.config.train.best_metric] if is_scored else None
    is_best = score is not None and (counters.best is None or score > counters.best)
    if is_best:
        counters.best = score
    name = f"step-{counters.step:09d}"
    summary = {
        "step": counters.step,
        "samples": counters.samples,
        "epoch": counters.step / run.stream.batches_per_epoch,
        "seconds": round(counters.seconds, 1),
        "device": str(run.device),
        "precision": "bf16" if run.autocast else "fp32",
        **(metrics if is_scored else {}),
    }
    with new_directory(out / "checkpoints" / name) as folder:
        checkpoint.write_into(
            folder,
            run.model,
            name=out.resolve().name,
            objective=tuple(objective.name for objective in run.config.objectives),
            training=summary,
            data_fingerprint=run.order.data_fingerprint,
        )
        save_state(folder, run.optimizer, counters, run.order)
    if is_best:  # first: what `latest` says was best must be linked
        link_atomic(out / "best", f"checkpoints/{name}")
    link_atomic(out / "latest", f"checkpoints/{name}")
    _drop_old_checkpoints(out, run.config.train.keep_checkpoints)


def _drop_old_checkpoints(out: Path, keep: int) -> None:
    linked = {(out / link).resolve() for link in ("latest", "best")}
    found = sorted((out / "checkpoints").glob("step-*"))
    for folder in found[:-keep]:
        if folder.resolve() not in linked:
            shutil.rmtree(folder)


def _find_start(out: Path, resume: str) -> Path | None:
    latest = out / "latest"
    for unfinished in (out / "checkpoints").glob(".*.tmp"):  # of a killed process
        shutil.rmtree(unfinished)
    if latest.is_symlink() and not latest.exists() and resume in ("auto", "no"):
        raise CheckpointError(
            f"{latest} leads nowhere; name the checkpoint to continue from with --resume DIR"
        )
    if resume == "no":
        if latest.exists():
            raise ConfigError(
                f"{out} already holds a run; choose another `out`, or continue with --resume auto"
            )
        return None
    if resume == "auto":
        return latest.resolve() if latest.exists() else None
    if not checkpoint.is_model_directory(resume):
        raise CheckpointError(f"--resume {resume}: not a checkpoint directory")
    return Path(resume)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One process at a time trains into a run directory; a killed one leaves no lock behind."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training into {out}; choose another `out`"
            ) from None
        yield


def _check_finite(values: dict[str, float], counters: Counters, out: Path) -> None:
    if not math.isfinite(values["loss"]):
        raise TrainingError(
            f"the loss is {values['loss']} at step {counters.step}: training diverged; lower"
            f" optim.lr or set optim.grad_clip; the last good checkpoint is {out / 'latest'}"
        )


def _check_bad(counters: Counters, allowed: float) -> None:
    seen = counters.samples + counters.bad_samples
    always = _BAD_SAMPLES_ALWAYS_ALLOWED if allowed else 0
    if counters.bad_samples > max(allowed * seen, always):
        raise TooManyBadSamples(
            f"{counters.bad_samples} of {seen} samples were bad, more than"
            f" data.max_bad_fraction {allowed}; see bad_samples.jsonl"
        )
