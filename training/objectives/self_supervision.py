"""Image self-supervision on the image tower: two views of one picture should agree.

SimCLR beside CLIP is SLIP (arXiv:2112.12750). Every method brings a head for the image tower's
features, whose outputs for both views are gathered over the ranks with gradient, and a loss on
them. Start at `build_method`.

All losses compute in float32 at least, whatever autocast says, and return this rank's share: the
shares of all ranks add up to the loss of the whole batch, and so do their gradients. A loss whose
statistics are of the whole batch (Barlow Twins, VICReg) is computed on every rank; a rank's share
is then its part of the rows.

Legend: B own rows, N global batch, R ranks, F features, E embedding, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import ALONE, World
from training.objectives.exact import in_float32


def simclr_loss(
    first: Tensor, second: Tensor, *, temperature: float = 0.1, own: slice | None = None
) -> Tensor:
    """NT-Xent (SimCLR, arXiv:2002.05709, equation 1), the mean over all 2N views.

    For view i of a pair (i, j): -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), where s is
    the cosine and k runs over both views of all N pictures. first, second: (N, E), of any length.
    Returns () in nats; ln(2N - 1) for rows without information.
    """
    with in_float32(first.device):
        count = len(first)
        views = F.normalize(torch.stack([_exact(first), _exact(second)]), dim=-1)  # (2, N, E)
        own = slice(None) if own is None else own
        queries, keys = views[:, own].flatten(0, 1), views.flatten(0, 1)  # (2B, E), (2N, E)
        rows = torch.arange(count, device=first.device)[own]
        itself, partner = torch.cat([rows, rows + count]), torch.cat([rows + count, rows])
        logits = (queries @ keys.T / temperature).scatter(1, itself[:, None], -torch.inf)
        return F.cross_entropy(logits, partner, reduction="sum") / (2 * count)


def barlow_twins_loss(
    first: Tensor, second: Tensor, *, redundancy: float = 0.005, own: slice | None = None
) -> Tensor:
    """Barlow Twins (arXiv:2103.03230, equation 1).

    Sum over i of (1 - C_ii)^2 + redundancy * sum over i != j of C_ij^2, where C (E, E) is the
    correlation over the batch of the first view's features with the second's (equation 2). As in
    the published code, features are normalised as batch norm does, with its epsilon of 1e-5.
    first, second: (N, E).
    """
    with in_float32(first.device):
        first, second = (_standardise(_exact(view)) for view in (first, second))
        correlation = first.T @ second / len(first)  # (E, E)
        diagonal = correlation.diagonal()
        others = correlation.square().sum() - diagonal.square().sum()
        loss = (1 - diagonal).square().sum() + redundancy * others
    return loss * _own_part(len(first), own)


def vicreg_loss(
    first: Tensor,
    second: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    own: slice | None = None,
) -> Tensor:
    """VICReg (arXiv:2105.04906, equations 1 to 6, with the factors of algorithm 1).

    invariance * mean squared difference, over N and E
    + variance * sum over both views of the mean of max(0, 1 - sqrt(Var + 1e-4))
    + covariance * sum over both views of sum over i != j of Cov_ij^2 / E.
    Equation 5 sums the difference over E; algorithm 1 takes the mean, for which the weights are
    meant. The published code also halves the variance term. first, second: (N, E).
    """
    with in_float32(first.device):
        first, second = _exact(first), _exact(second)
        loss = invariance * F.mse_loss(first, second)
        for view in (first, second):
            hinge, redundant = _spread(view)
            loss = loss + variance * hinge + covariance * redundant
    return loss * _own_part(len(first), own)


def simsiam_loss(first: Tensor, second: Tensor, *, own: slice | None = None) -> Tensor:
    """SimSiam (arXiv:2011.10566, equations 1 and 2, with the stop-gradient of equation 4).

    Mean of -cos(p1, z2) / 2 - cos(p2, z1) / 2, where no gradient flows into z. first, second:
    (N, 2E) projections z, then predictions p, as `PredictingHead` gives them. From -1 to 1.
    """
    count = len(first)
    with in_float32(first.device):
        rows = slice(None) if own is None else own
        (z1, p1), (z2, p2) = (_exact(view[rows]).chunk(2, dim=1) for view in (first, second))
        agreement = F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())
        return -agreement.sum() / (2 * count)


class Projector(nn.Module):
    """SLIP's head (facebookresearch/SLIP d1de3e7, models.py): three layers, the last one bare."""

    def __init__(
        self, feature_size: int, hidden_size: int, output_size: int, world: World = ALONE
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_size, hidden_size),
            BatchNorm(hidden_size, world),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            BatchNorm(hidden_size, world),
            nn.ReLU(),
            nn.Linear(hidden_size, output_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, E)."""
        projected: Tensor = self.layers(features)
        return projected


class PredictingHead(nn.Module):
    """SimSiam's: a projection that ends in batch norm, and a bottleneck that predicts another's."""

    def __init__(
        self, feature_size: int, hidden_size: int, output_size: int, world: World = ALONE
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            Projector(feature_size, hidden_size, output_size, world), BatchNorm(output_size, world)
        )
        bottleneck = max(output_size // 4, 1)  # 512 of 2048 in the paper
        self.predictor = nn.Sequential(
            nn.Linear(output_size, bottleneck, bias=False),
            BatchNorm(bottleneck, world),
            nn.ReLU(),
            nn.Linear(bottleneck, output_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B, 2E): projections, then predictions."""
        projected = self.projector(features)
        return torch.cat([projected, self.predictor(projected).to(projected.dtype)], dim=1)


class BatchNorm(nn.Module):
    """Batch norm (arXiv:1502.03167) by the statistics of all ranks' rows, with their gradients.

    nn.SyncBatchNorm is for GPUs alone. Nothing is remembered for inference: heads of
    self-supervision are for training, so the batch's own statistics count in eval mode too. All
    ranks have to call it, one without rows as well.
    """

    def __init__(self, size: int, world: World = ALONE, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self._world, self._eps = world, eps

    def forward(self, rows: Tensor) -> Tensor:
        """(B, D) -> (B, D) float32."""
        with in_float32(rows.device):
            rows = _exact(rows)
            mean, variance = self._statistics(rows)
            return (rows - mean) * (variance + self._eps).rsqrt() * self.weight + self.bias

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(D) mean and biased variance over all ranks' rows, merged as Chan et al. (1983) do."""
        width = rows.shape[1]
        mean = rows.sum(0, keepdim=True) / max(len(rows), 1)
        squares = (rows - mean).square().sum(0, keepdim=True)
        own = torch.cat([mean.new_full((1, 1), len(rows)), mean, squares], dim=1)  # (1, 1 + 2D)
        everyone = self._world.gather(own, [1] * self._world.size)  # (R, 1 + 2D)
        counts, means, squares = torch.split(everyone, [1, width, width], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        return mean, (squares + counts * (means - mean).square()).sum(0) / total


class ViewLoss(Protocol):
    """A loss on the head's outputs for both views, (N, ...) each: () this rank's share."""

    def __call__(self, first: Tensor, second: Tensor, *, own: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class ImageSelfSupervision:
    """What a method brings; another method is another entry of `build_method`.

    One row holds all that the loss wants to know of a view, side by side (SimSiam: projection, then
    prediction). A method with a momentum twin (BYOL, MoCo v3, DINO) would have the twin's row there
    as well; nothing builds a `training.momentum.Twin` of tower and head yet.
    """

    build_head: Callable[[int, int, int, World], nn.Module]
    """(feature size, hidden size, output size, world) -> a module from (B, F) to rows"""
    loss: ViewLoss


def build_method(name: str, temperature: float) -> ImageSelfSupervision:
    """A method by its name in the configuration; `temperature` is SimCLR's."""
    methods = {
        "simclr": ImageSelfSupervision(Projector, partial(simclr_loss, temperature=temperature)),
        "barlow_twins": ImageSelfSupervision(Projector, barlow_twins_loss),
        "vicreg": ImageSelfSupervision(Projector, vicreg_loss),
        "simsiam": ImageSelfSupervision(PredictingHead, simsiam_loss),
    }
    return methods[name]


def _standardise(view: Tensor) -> Tensor:
    """(N, E) with mean 0 and variance 1 of each feature."""
    variance, mean = torch.var_mean(view, dim=0, correction=0)
    return (view - mean) * (variance + 1e-5).rsqrt()


def _spread(view: Tensor) -> tuple[Tensor, Tensor]:
    """() what the features lack to a standard deviation of 1; () their squared covariances."""
    centred = view - view.mean(dim=0)
    covariance = centred.T @ centred / max(len(view) - 1, 1)  # (E, E)
    variances = covariance.diagonal()
    hinge = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    return hinge, (covariance.square().sum() - variances.square().sum()) / len(variances)


def _own_part(count: int, own: slice | None) -> float:
    """The part of `count` rows that this rank answers for."""
    return 1.0 if own is None else len(range(count)[own]) / count


def _exact(rows: Tensor) -> Tensor:
    """In float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
