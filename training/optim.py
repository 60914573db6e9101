"""Parameter groups and learning-rate schedules, with open_clip's rules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clipserve.config import OptimConfig
from clipserve.model import Model

MAX_LOGIT_SCALE = math.log(100)


def build_optimizer(
    model: Model, config: OptimConfig, heads: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW with a decayed and a plain group; betas and epsilon by open_clip's rule if absent.

    `heads` is what objectives learn beside the model.
    """
    is_vit = "Transformer" in type(model.network.visual).__name__
    betas = config.betas or ((0.9, 0.98) if is_vit else (0.9, 0.999))
    eps = config.eps or (1e-6 if is_vit else 1e-8)
    groups = parameter_groups(model.network, config.weight_decay)
    if heads is not None:
        for group, more in zip(groups, parameter_groups(heads, config.weight_decay), strict=True):
            group["params"] += more["params"]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=eps,
        fused=True,
    )


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; vectors, scalars and what `no_weight_decay()` names are not.

    open_clip_train/optim.py: gains, biases and logit scale have at most one dimension; position and
    class embeddings are declared by the towers.
    """
    declare: Callable[[], set[str]] | None = getattr(network, "no_weight_decay", None)
    declared = declare() if declare else set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name in declared
            (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then cosine to zero or constant (open_clip's)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def clamp_logit_scale(model: Model) -> None:
    """Keep the log-temperature in [0, ln 100], in place, as CLIP does (section 2.5)."""
    with torch.no_grad():
        model.network.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
