"""Parameter groups, the optimizer, and the learning rate over time. Start at `build_optimizer`."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.objectives import Objective, Sigmoid
from clipserve.optim import PARTS, OptimConfig
from training.distributed import is_split
from training.frozen import Frozen
from training.parts import Weight, count_layers

MAX_LOGIT_SCALE = math.log(100)
_TIMM = {"stableadamw": "adamwlegacy"}  # what has another name there
# open_clip's own, timm's (SigLIP, ALBEF), and its EVA and PE
_VITS = ("VisionTransformer", "Eva")
_STABLE_RMS = 1.0  # StableAdamW's clipping of the update (arXiv:2304.13013)


def build_optimizer(
    model: Model, config: OptimConfig, weights: Sequence[Weight], frozen: Frozen | None = None
) -> torch.optim.Optimizer:
    """The optimizer of all weights that are ever trained. Raises ConfigError if they do not fit.

    Betas and epsilon are by open_clip's rule if absent, but for Lion and ADOPT, which have timm's.
    """
    visual = model.network.visual
    is_vit = type(getattr(visual, "trunk", visual)).__name__ in _VITS
    betas = config.betas or ((0.9, 0.98) if is_vit else (0.9, 0.999))
    eps = config.eps or (1e-6 if is_vit else 1e-8)
    groups = parameter_groups(weights, config, frozen)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, fused=True)

    from timm.optim import get_optimizer_class  # type: ignore[attr-defined]

    options: dict[str, Any] = {"betas": betas, "eps": eps}
    if config.name in ("lion", "adopt"):
        given = {"betas": config.betas, "eps": config.eps}
        options = {name: value for name, value in given.items() if value is not None}
    if config.name == "stableadamw":
        options["clipping_threshold"] = _STABLE_RMS
    if config.name == "muon":
        _split_for_muon(groups, weights, eps)
        del options["eps"]  # Muon's own is what keeps a norm from being zero
    kind: Any = get_optimizer_class(_TIMM.get(config.name, config.name))
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.lr, **options)
    return optimizer


def parameter_groups(
    weights: Sequence[Weight], config: OptimConfig, frozen: Frozen | None = None
) -> list[dict[str, Any]]:
    """Each weight that is ever trained, in exactly one group of those that learn alike.

    A group says its `peak` learning rate and the step at which it `begin`s. Matrices are decayed;
    gains, biases, logit scale and embeddings that towers declare are not. With layer decay d, layer
    l of L has the rate d**(L - l) of what is above them, embeddings that of layer 0 (BEiT,
    arXiv:2106.08254, as in open_clip).
    """
    held = {id(weight.parameter) for weight in frozen.weights} if frozen else set()
    late = frozen.until if frozen else None
    trained = [w for w in weights if late is not None or id(w.parameter) not in held]
    parts = {weight.part for weight in trained}
    _check_parts(config, parts, {weight.part for weight in weights})
    scales = _layer_scales([weight for weight in weights if weight.part in parts], config)
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for weight in sorted(trained, key=lambda weight: not weight.decays):
        own = config.part(weight.part)
        lr = config.lr if own is None or own.lr is None else own.lr
        decay = config.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        peak = lr * scales.get(id(weight.parameter), 1.0)
        begin = (late or 0) if id(weight.parameter) in held else 0
        group = {
            "weight_decay": decay if weight.decays else 0.0,
            "lr": peak,
            "peak": peak,
            "begin": begin,
        }
        alike = (*group.values(), is_split(weight.parameter))  # torch updates one kind at a time
        groups.setdefault(alike, {"params": [], **group})["params"].append(weight.parameter)
    return list(groups.values())


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int
) -> float:
    """Give each group its learning rate of step 0, 1, ...; what begins late has its own course.

    Returns that of a group without a peak of its own.
    """
    for group in optimizer.param_groups:
        begin = group["begin"]
        group["lr"] = (
            learning_rate(config, step - begin, total - begin, group["peak"])
            if step >= begin
            else 0.0
        )
    return learning_rate(config, step, total)


def learning_rate(
    config: OptimConfig, step: int, total_steps: int, peak: float | None = None
) -> float:
    """Rate of step 0, 1, ...: linear warm-up to `peak` or `config.lr`, then as the schedule says.

    cosine falls to zero (open_clip's); constant stays; wsd (warm-up, stable, decay) stays and falls
    linearly over the last `decay_steps`, ending as cosine does with zero after the last step.
    """
    peak = config.lr if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        return peak * min(1.0, max(total_steps - step, 0) / config.decay_steps)
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def check_steps(config: OptimConfig, total_steps: int) -> None:
    """Raises ConfigError for a course that does not fit into the run."""
    begin = config.unfreeze_after_steps or 0
    if begin >= total_steps and begin:
        raise ConfigError(
            f"optim.unfreeze_after_steps = {begin} is not before the last of the run's"
            f" {total_steps} steps; lower it, or leave it out to keep the weights frozen"
        )
    needed = begin + config.warmup_steps + (config.decay_steps or 0)
    if config.schedule == "wsd" and needed > total_steps:
        raise ConfigError(
            f"optim.warmup_steps and optim.decay_steps (after unfreezing) need {needed} steps, the"
            f" run has {total_steps}; lower them or train longer"
        )


def largest_logit_scale(model: Model, objectives: Sequence[Objective]) -> float:
    """What the log-temperature of a run may grow to: ln 100 as in CLIP (section 2.5), or where it
    begins if that is more, as of an ALBEF. SigLIP has no limit (big_vision): published ones have
    117, and a bias that fits that."""
    if any(isinstance(objective, Sigmoid) for objective in objectives):
        return math.inf
    return max(MAX_LOGIT_SCALE, float(model.network.logit_scale.item()))


@torch.no_grad()
def clamp_logit_scale(model: Model, largest: float = MAX_LOGIT_SCALE) -> None:
    """Keep the log-temperature between 0 and `largest`, in place."""
    scale = model.network.logit_scale
    if scale.requires_grad:
        scale.clamp_(0, largest)


def _layer_scales(weights: Iterable[Weight], config: OptimConfig) -> dict[int, float]:
    """The factor of the learning rate of each tower's weight, by its identity."""
    scales: dict[int, float] = {}
    for part in ("image", "text"):
        own = [weight for weight in weights if weight.part == part]
        decay = config.layer_decay_of(part)
        if decay is None or decay == 1 or not own:
            continue
        num_layers = count_layers(own)
        if num_layers is None:
            raise ConfigError(
                f"optim.layer_decay needs a tower with one row of layers, which the {part} tower of"
                f" this model is not; set optim.{part}.layer_decay = 1"
            )
        for weight in own:
            layer = num_layers if weight.layer is None else max(weight.layer, 0)
            scales[id(weight.parameter)] = decay ** (num_layers - layer)
    return scales


def _check_parts(config: OptimConfig, trained: set[str], known: set[str]) -> None:
    for part in PARTS:
        if config.part(part) is not None and part not in trained:
            reason = "all of it is frozen" if part in known else "this model has no such part"
            raise ConfigError(f"optim.{part} has no effect: {reason}")


def _split_for_muon(groups: list[dict[str, Any]], weights: Iterable[Weight], eps: float) -> None:
    """Of each group, what Muon is for, and what its AdamW takes, in place.

    It orthogonalises the updates of maps between hidden states; embeddings, patches and the last
    projections are none (Muon's author, kellerjordan.github.io/posts/muon).
    """
    hidden = {id(weight.parameter) for weight in weights if weight.is_hidden_matrix}
    split = []
    for group in groups:
        inner = [p for p in group["params"] if id(p) in hidden]
        rest = [p for p in group["params"] if id(p) not in hidden]
        split += [group | {"params": inner, "use_muon": True}] if inner else []
        split += [group | {"params": rest, "use_muon": False, "eps": eps}] if rest else []
    if not any(group["use_muon"] for group in split):
        raise ConfigError(
            "optim.name = muon has no effect: of what is trained no matrix stands within a layer"
        )
    groups[:] = split
