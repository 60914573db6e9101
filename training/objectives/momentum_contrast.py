"""Contrast against a momentum twin's features and a queue of them, with soft targets.

ALBEF (arXiv:2107.07651, equations 1, 2 and 6); with alpha 0 the loss of MoCo (arXiv:1911.05722,
equation 1) in both directions. It asks for nothing of the towers, so it serves CLIP's as well.

Legend: B own rows of this rank, N global batch (all ranks), E embedding, K queue length, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.exact import in_float32
from training.objectives.positives import find_positives


def momentum_contrast_loss(
    image: Tensor,
    text: Tensor,
    twin_image: Tensor,
    twin_text: Tensor,
    queue_image: Tensor,
    queue_text: Tensor,
    scale: Tensor,
    alpha: float = 0.0,
    *,
    own: slice | None = None,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
) -> Tensor:
    """This rank's share of the mean over N of both directions' cross-entropy; () in nats.

    image, text (B, E): this rank's features, with gradient. twin_image, twin_text (N, E): the
    twin's features of the whole batch, of which the rows `own` (None: all) are those of the same
    pairs. queue_image, queue_text (K, E), K may be 0. All features are unit length; scale () is
    exp(log-temperature).

    A picture is scored against the keys [twin_text | queue_text], a text against
    [twin_image | queue_image]. The target (equation 6) is alpha times the softmax of the twin's own
    scores plus 1 - alpha times a uniform distribution over the row's positives: its pair, and with
    groups (N, G) and queue_groups (K, G) every key that agrees with it in any column. Gradient
    flows into image, text and scale only. Scores are float32 whatever autocast says.
    """
    own = slice(None) if own is None else own
    size = len(twin_image)
    rows = torch.arange(size, device=image.device)[own]
    positives = _find_targets(rows, size + len(queue_image), groups, queue_groups)
    with in_float32(image.device):
        scale = scale.to(torch.promote_types(image.dtype, torch.float32))
        hard = positives.to(scale.dtype) / positives.sum(dim=1, keepdim=True)  # (B, N + K)
        i2t = _direct(image, twin_image[own], (twin_text, queue_text), hard, alpha, scale)
        t2i = _direct(text, twin_text[own], (twin_image, queue_image), hard, alpha, scale)
        return (i2t + t2i) / (2 * size)


def _direct(
    query: Tensor,
    twin_query: Tensor,
    keys: tuple[Tensor, Tensor],
    hard: Tensor,
    alpha: float,
    scale: Tensor,
) -> Tensor:
    """One direction's cross-entropy, summed over the B rows."""
    targets = hard
    if alpha:
        with torch.no_grad():
            targets = torch.lerp(hard, _score(twin_query, keys, scale).softmax(dim=1), alpha)
    return F.cross_entropy(_score(query, keys, scale), targets, reduction="sum")


def _score(query: Tensor, keys: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
    """(B, N + K) logits. Products are put together, not keys, so that no queue is copied."""
    query = query.to(scale.dtype)
    products = [query @ part.detach().to(scale.dtype).T for part in keys]
    return scale * torch.cat(products, dim=1)


def _find_targets(
    rows: Tensor, num_keys: int, groups: Tensor | None, queue_groups: Tensor | None
) -> Tensor:
    """(B, N + K) bool: a row's own pair, or the keys that agree with it in any group."""
    if groups is None:
        return rows[:, None] == torch.arange(num_keys, device=rows.device)
    assert queue_groups is not None
    own = groups[rows]
    return torch.cat([find_positives(own, keys) for keys in (groups, queue_groups)], dim=1)
