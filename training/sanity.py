"""What a run is told to look right: a line each, once a run, for what is often a mistake.

Start at `Sanity`; the loop calls it at its start and with every line of the log.
"""

import logging
import math
from collections.abc import Mapping

from clipserve.objectives import Contrastive, MomentumContrast, Sigmoid
from training.recipe import Run

logger = logging.getLogger(__name__)

_FINE_TUNING_LR = 1e-4
_FEW = 0.1  # of a model's weights; projections and a temperature may learn fast
_REPEATED = 0.05
_STARVED = 0.3
_FAR_ABOVE_CHANCE = 1.5


class Sanity:
    """Warns, of each thing at most once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told: set[str] = set()
        self._laps = 0

    def begin(self) -> None:
        """What can be said before the first step."""
        run = self._run
        for name, chance in self._chance_levels().items():
            what = "" if name == "sigmoid" else f" = ln {round(math.exp(chance))}"
            logger.info("a model that knows nothing has loss/%s %.3f%s", name, chance, what)
        if run.work is not None:
            peak = (
                "unknown: no MFU" if run.work.peak is None else f"{run.work.peak / 1e12:g} TFLOP/s"
            )
            logger.info(
                "a sample takes %.3g GFLOP, forward and backward; assumed peak of the device: %s",
                run.work.sample / 1e9,
                peak,
            )
        self._look_at_rates()
        self._look_at_warm_up()
        has_sigmoid = any(isinstance(o, Sigmoid) for o in run.config.objectives)
        if run.state.model.logit_bias is not None and not has_sigmoid:
            self._warn(
                "bias",
                "the model has a logit bias, as SigLIP's, which none of the objectives uses or"
                ' trains: it will fit no longer; use [[objectives]] name = "sigmoid"',
            )

    def look(self, values: Mapping[str, float]) -> None:
        """What a line of the log tells."""
        self._laps += 1
        if self._run.state.counters.step <= self._run.config.train.log_every:
            self._look_at_first_loss(values)
        limit = math.exp(self._run.max_logit_scale)
        if values["logit_scale"] >= limit * (1 - 1e-6):
            self._warn(
                "scale",
                f"the logit scale is at its limit of {limit:.4g}: the loss cannot get sharper",
            )
        repeated = values["repeated_captions"]
        if repeated > _REPEATED and self._takes_repeated_as_negatives:
            self._warn(
                "captions",
                f"{repeated:.0%} of a batch's captions occur in it before and count as wrong"
                ' answers; positives = ["caption"] in the objective lets them count as right',
            )
        waited = values["data_wait_fraction"]
        if waited > _STARVED and self._laps > 1:  # at first the workers only start
            self._warn(
                "data", f"{waited:.0%} of the time is spent waiting for data; raise data.workers"
            )

    def _look_at_rates(self) -> None:
        """Of what the model came with; fresh heads and adapters learn as fast as they like."""
        if self._run.config.model.pretrained is None:
            return
        own = {id(p): p.numel() for p in self._run.state.model.parameters()}
        fast = [
            (group["peak"], own[id(p)])
            for group in self._run.state.optimizer.param_groups
            if group["peak"] > _FINE_TUNING_LR
            for p in group["params"]
            if id(p) in own
        ]
        share = sum(size for _, size in fast) / sum(own.values())
        if share > _FEW:
            self._warn(
                "lr",
                f"{share:.0%} of a pretrained model learns at up to {max(fast)[0]:g}, a high rate"
                " for fine-tuning, by which it may forget what it knows; usual are 1e-6 to 1e-4",
            )

    def _look_at_warm_up(self) -> None:
        optim, total = self._run.config.optim, self._run.total_steps
        steps = total - (optim.unfreeze_after_steps or 0)
        if steps < optim.warmup_steps:
            late = ", of what is unfrozen," if optim.unfreeze_after_steps else ""
            self._warn(
                "warm-up",
                f"the warm-up{late} takes {optim.warmup_steps} steps (optim.warmup_steps), but the"
                f" run has {steps} for it and ends at {steps / optim.warmup_steps:.0%} of the"
                " learning rate; lower it, or train longer",
            )

    def _look_at_first_loss(self, values: Mapping[str, float]) -> None:
        for name, chance in self._chance_levels().items():
            loss = values.get(f"loss/{name}", 0.0)
            if loss > _FAR_ABOVE_CHANCE * chance:
                self._warn(
                    "loss",
                    f"the first loss/{name} is {loss:.3g}, where a model that knows nothing has"
                    f" {chance:.3g}; are weights and inputs right?",
                )

    def _chance_levels(self) -> dict[str, float]:
        bias, size = self._run.state.model.logit_bias, self._run.config.data.batch_size
        levels: dict[str, float] = {}
        for objective in self._run.config.objectives:
            if isinstance(objective, Contrastive):
                levels[objective.name] = math.log(size)
            if isinstance(objective, MomentumContrast):
                queue = self._run.networks.queue
                levels[objective.name] = math.log(size + (queue.filled if queue else 0))
            if isinstance(objective, Sigmoid) and bias is not None:
                levels[objective.name] = sigmoid_chance(size, bias.item())
        return levels

    @property
    def _takes_repeated_as_negatives(self) -> bool:
        return any(
            isinstance(objective, Contrastive | MomentumContrast | Sigmoid)
            and "caption" not in objective.positives
            for objective in self._run.config.objectives
        )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning(message)


def sigmoid_chance(size: int, bias: float) -> float:
    """SigLIP's loss where nothing is like anything (arXiv:2303.15343, section 3.2): the bias says
    no to one right pair and `size` - 1 wrong ones."""
    return math.log1p(math.exp(-bias)) + (size - 1) * math.log1p(math.exp(bias))
