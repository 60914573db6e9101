"""Image-text matching: hard negatives by similarity, and the two-way loss (ALBEF,
arXiv:2107.07651, section 3.2, equation 4).

The batch that ALBEF makes, and for which `draw_negatives` is asked twice: all pairs; then each text
with the picture drawn for it; then each picture with the text drawn for it. Rows for which nothing
was found are left out, so there may be fewer than two negatives to a pair.

Legend: B own rows of this rank, M keys that negatives come from, R rows that are matched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_STEEPEST = 1e4  # float32 still tells apart differences of 1e-3 there


@torch.no_grad()
def draw_negatives(similarity: Tensor, allowed: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One key for each row, with probability softmax(similarity) over its allowed keys.

    similarity (B, M): logits of any size; infinities count as very large, NaN as very unlikely.
    allowed (B, M) bool: false for a row's positives. noise (B, M): uniform in [0, 1], an argument
    so that any number of ranks draws the same.

    Returns the keys (B,) int64 and whether there was one (B,) bool; where not, the key is any valid
    number. All rows at once, by the Gumbel-max trick (arXiv:1611.00712, section 3): no sum of
    probabilities is formed that could be zero, on which ALBEF's multinomial fails (ALBEF#18, #93).
    """
    if not similarity.shape[1]:
        return allowed.new_zeros(len(allowed), dtype=torch.int64), allowed.any(dim=1)
    steep = similarity.float().nan_to_num(nan=-_STEEPEST).clamp(-_STEEPEST, _STEEPEST)
    limits = torch.finfo(torch.float32)
    gumbel = -(-noise.float().clamp(limits.tiny, 1 - limits.eps / 2).log()).log()
    scores = (steep + gumbel).masked_fill(~allowed, -torch.inf)
    return scores.argmax(dim=1), allowed.any(dim=1)


def matching_loss(logits: Tensor, matches: Tensor, total: int) -> Tensor:
    """This rank's share of the mean cross-entropy over all ranks' `total` rows; () in nats.

    logits (R, 2), of which the second says "match"; matches (R,) bool. R and `total` may be 0: the
    loss is then 0, with a graph, so that the ranks stay in step. ALBEF's mean is plain too, though
    two of three rows are negatives.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, matches.long(), reduction="sum") / max(total, 1)


def count_right(logits: Tensor, matches: Tensor) -> Tensor:
    """How many of the rows are decided right: () int64. Over R it is the accuracy."""
    return (logits.argmax(dim=1) == matches).sum()
