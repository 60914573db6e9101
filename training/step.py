"""One optimizer step: forward, the objectives, backward, update, and what follows the weights."""

import torch
from torch import Tensor

from clipserve.errors import ConfigError
from training.forward import look
from training.fsdp import clip_gradients, gradient_norm
from training.guard import check_step
from training.momentum import alpha_ramp, ramped
from training.optim import clamp_logit_scale
from training.parts import find_weights
from training.precision import LossScale, attention_kernel, computing
from training.recipe import Run
from training.streaming import Batch
from training.terms import compute


def train_step(run: Run, batch: Batch, counts: list[int]) -> dict[str, Tensor]:
    """One optimizer step; returns the loss over the global batch, its terms, and reports.

    Nothing that a checkpoint holds is changed before the ranks have told each other everything: a
    rank that dies, or whose memory is full, leaves all at the end of the step before. Raises
    SkippedStep, on all ranks alike, for a step that must not be taken, and ConfigError if there is
    nothing that could learn.
    """
    networks, state, world = run.networks, run.state, run.world
    per_epoch = run.stream.order.batches_per_epoch
    # ---- forward: features once, then each objective's share of the loss
    with computing(run.precision, run.device):
        step = look(
            networks,
            batch,
            counts,
            world,
            seed=run.config.train.seed,
            step=state.counters.step,
            ramp=alpha_ramp(run.config.objectives, state.counters.step, per_epoch),
        )
        shares = {
            f"loss/{objective.name}": compute(objective, step)
            for objective in run.config.objectives
        }
    weights = [objective.weight for objective in run.config.objectives]
    total = sum(
        (weight * share for weight, share in zip(weights, shares.values(), strict=True)),
        start=torch.zeros((), device=run.device),
    )

    # ---- backward
    scale = LossScale(state.counters, run.precision.scales_loss)
    state.optimizer.zero_grad(set_to_none=True)
    if total.requires_grad:
        with attention_kernel(run.precision, run.device):
            (scale.factor * total).backward()  # type: ignore[no-untyped-call]
    world.sum_gradients(run.parameters)
    if not step.reports.get("matching/skipped", 0):  # a batch without negatives teaches nothing
        _check_reached(run)
    world.same_statistics(state.model.network)
    scale.undo(run.parameters)
    numbers = {"loss": total, **shares, **step.reports}
    summed = world.total(torch.stack([value.float() for value in numbers.values()]))
    losses = dict(zip(numbers, summed, strict=True))

    # ---- update
    norm = gradient_norm(run.parameters, world)
    if run.config.optim.grad_clip is not None:
        clip_gradients(run.parameters, run.config.optim.grad_clip, norm)
    if scale.overflows(norm, losses["loss"]):
        return {**losses, "overflow/skipped": torch.ones((), device=run.device)}
    check_step(state.counters, run.config.train, losses, norm)
    state.is_torn = True
    state.optimizer.step()
    run.adapters.merge()
    clamp_logit_scale(state.model, run.max_logit_scale)

    # ---- averages follow, and what this batch was compared with becomes old
    if state.ema is not None:
        state.ema.update(state.model.network, ramped(state.ema.momentum, state.counters.step))
    if networks.twin is not None:
        networks.twin.update(state.model.network)
    if networks.queue is not None and step.momentum is not None:
        networks.queue.push(step.momentum.image, step.momentum.text, step.groups)
    state.is_torn = False
    return {**losses, "grad_norm": norm}


def _check_reached(run: Run) -> None:
    """ConfigError unless something that is trained has a gradient; all ranks see the same."""
    if any(parameter.grad is not None for parameter in run.parameters):
        return
    weights = find_weights(run.state.model.network, run.networks.heads)
    trained = [weight for weight in weights if weight.parameter.requires_grad]
    parts = dict.fromkeys(f"{w.part}.*" if "." in w.name else w.name for w in trained)
    names = ", ".join(objective.name for objective in run.config.objectives)
    until = f" in the first {run.frozen.until} steps" if run.frozen.until else ""
    setting = "optim.freeze" if run.config.lora is None else "lora.targets"
    raise ConfigError(
        f"nothing would learn{until}: of what is trained, {', '.join(parts)}, the objectives"
        f" ({names}) use nothing; add an objective that does, or train other weights with {setting}"
    )
