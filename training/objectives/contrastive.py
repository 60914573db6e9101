"""Symmetric InfoNCE (CLIP, arXiv:2103.00020, figure 3; ConVIRT, arXiv:2010.00747, equations 2-4).

    L = 1/2N sum_i [lse_j(z_ij) - mean_p(z_ip)] + 1/2N sum_j [lse_i(z_ij) - mean_p(z_pj)]

with logits z_ij = scale image_i . text_j, lse the log of a sum of exponentials, and p the positives
of a row: its own pair, or all that `groups` say (UniCL, arXiv:2204.03610, equations 2-4). Start at
`contrastive_loss`.

Legend: B own rows, N global batch (all ranks), E embedding, G groups, Q queries, K keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.exact import in_float32
from training.objectives.positives import average_positives, find_positives


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    own: slice | None = None,
    groups: Tensor | None = None,
    tile_size: int | None = None,
) -> Tensor:
    """Mean of image-to-text and text-to-image cross-entropy: the share of the rows `own` in it.

    image, text: (N, E), unit length; scale: () is exp(log-temperature); groups: (N, G) ids, and
    rows that agree in any are positives of one another, with equal parts in a row's target.
    Returns () in nats; ln(N) for features without information. The shares of all ranks add up to
    the loss, and their gradients to its gradient where the gathered rows carry theirs.

    With `tile_size` the logits are made by squares of that many rows, and again in the backward: 4
    products instead of 3, in O(N) memory (benchmarks/contrastive.py). 2048 is a good size: squares
    of 512 are as fast alone, but slow where other programs make a CPU's threads wait for each other
    (6 times dense, 2-core Xeon, 2026-11). Logits are float32 at least, whatever autocast says: at a
    scale of 100 bf16 would round them to steps of a half.
    """
    own = slice(None) if own is None else own
    size, exact = len(image), torch.promote_types(image.dtype, torch.float32)
    with in_float32(image.device):
        text = text.to(exact)
        image = scale.to(exact) * image.to(exact)  # so the product is the logits
        if tile_size is None:
            total = _sum_dense(image, text, own, groups)
        else:
            total = _sum_tiled(image, text, own, groups, tile_size)
    return total / (2 * size)


def _sum_dense(image: Tensor, text: Tensor, own: slice, groups: Tensor | None) -> Tensor:
    """Both cross-entropies of the own rows, from their logits."""
    i2t = image[own] @ text.T  # (B, N)
    t2i = i2t.T if len(i2t) == len(text) else text[own] @ image.T  # (B, N)
    if groups is None:
        targets = torch.arange(len(text), device=text.device)[own]
    else:
        positives = find_positives(groups[own], groups)  # (B, N)
        targets = positives / positives.sum(dim=1, keepdim=True, dtype=text.dtype)
    total_i2t = F.cross_entropy(i2t, targets, reduction="sum")
    total_t2i = F.cross_entropy(t2i, targets, reduction="sum")
    return total_i2t + total_t2i


def _sum_tiled(
    image: Tensor, text: Tensor, own: slice, groups: Tensor | None, tile_size: int
) -> Tensor:
    """Likewise, from the features."""
    mean_i2t = _average_logits(image, text, own, groups)
    mean_t2i = mean_i2t if groups is None else _average_logits(text, image, own, groups)
    if len(mean_i2t) == len(text):
        return _sum_excess(image, text, mean_i2t, mean_t2i, tile_size)
    nothing = mean_i2t[:0]
    i2t = _sum_excess(image[own], text, mean_i2t, nothing, tile_size)
    return i2t + _sum_excess(text[own], image, mean_t2i, nothing, tile_size)


def _average_logits(queries: Tensor, keys: Tensor, own: slice, groups: Tensor | None) -> Tensor:
    """(B,) the mean logit of each own row's positives."""
    positives = keys if groups is None else average_positives(keys, groups)
    return (queries[own] * positives[own]).sum(dim=1)


def _sum_excess(
    queries: Tensor, keys: Tensor, row: Tensor, column: Tensor, tile_size: int
) -> Tensor:
    """The sum over q of lse_k(z_qk - row_q), plus that over k of lse_q(z_qk - column_k).

    z = queries (Q, E) @ keys.T (E, K); row (Q,); column (K,), or (0,) for rows alone. Subtracted
    first, as float32 knows an lse of 100 to 1e-5 only, and the difference is often small.
    """
    total: Tensor = _Excess.apply(queries, keys, row, column, tile_size)
    return total


class _Excess(torch.autograd.Function):
    """`_sum_excess` with no more logits at a time than a tile of them.

    A tile serves rows and columns: one product in the forward, three in the backward (logits again,
    and one for each gradient). Kept between them are the features and a number per row and column.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, row: Tensor, column: Tensor, tile_size: int
    ) -> Tensor:
        by_row, by_column = (torch.full_like(level, -torch.inf) for level in (row, column))
        for rows, columns in _tiles(len(queries), len(keys), tile_size):
            logits = queries[rows] @ keys[columns].T
            excess = (logits - row[rows, None]).logsumexp(1)
            by_row[rows] = torch.logaddexp(by_row[rows], excess)
            if len(column):
                excess = logits.sub_(column[columns]).logsumexp(0)
                by_column[columns] = torch.logaddexp(by_column[columns], excess)
        ctx.save_for_backward(queries, keys, row + by_row, column + by_column)
        ctx.tile_size = tile_size
        return by_row.sum() + by_column.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, by_row, by_column = ctx.saved_tensors  # log-sum-exps of the logits
        to_queries, to_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        for rows, columns in _tiles(len(queries), len(keys), ctx.tile_size):
            with in_float32(queries.device):
                logits = queries[rows] @ keys[columns].T
            softmax = (logits - by_row[rows, None]).exp_()
            if len(by_column):
                softmax += logits.sub_(by_column[columns]).exp_()
            to_queries[rows].addmm_(softmax, keys[columns])
            to_keys[columns].addmm_(softmax.T, queries[rows])
        (upstream,) = gradients
        to_levels = (-upstream.expand_as(level) for level in (by_row, by_column))
        return to_queries.mul_(upstream), to_keys.mul_(upstream), *to_levels, None


def _tiles(num_rows: int, num_columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile; those at the ends may be smaller."""
    for row in range(0, num_rows, size):
        for column in range(0, num_columns, size):
            yield slice(row, row + size), slice(column, column + size)
