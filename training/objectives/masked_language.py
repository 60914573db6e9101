"""Masked language modelling with a picture in view (ALBEF, arXiv:2107.07651, equations 3 and 7;
BERT, arXiv:1810.04805, section 3.1).

Legend: B rows, T text tokens, V vocabulary, M masked tokens of this rank.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_tokens(
    ids: Tensor,
    special_ids: Iterable[int],
    mask_id: int,
    vocab_size: int,
    noise: Tensor,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """The texts with some tokens hidden (B, T), and which positions were chosen (B, T) bool.

    Each token of `ids` (B, T) that is not special is chosen by itself with `probability`. Of the
    chosen, 80 % become `mask_id`, 10 % any token that is not special, 10 % stay as they are.
    noise (B, T, 3): uniform in [0, 1), for choice, kind and token; an argument so that a row's
    tokens do not depend on the rank that has it. ALBEF also masks [SEP], and writes special tokens.
    """
    special = sorted(set(special_ids))
    ordinary = vocab_size - len(special)
    choice, kind, token = noise.unbind(dim=-1)  # (B, T) each
    chosen = (choice < probability) & ~torch.isin(ids, ids.new_tensor(special))
    replacement = (token * ordinary).long().clamp(max=ordinary - 1)  # among the ordinary tokens ..
    for number in special:  # .. whose numbers leave gaps for the special ones
        replacement += replacement >= number
    written = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, replacement, ids))
    return torch.where(chosen, written, ids), chosen


def masked_language_loss(
    logits: Tensor,
    targets: Tensor,
    total: int,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """This rank's share of the mean over all ranks' `total` masked tokens; () in nats.

    logits (M, V) at the masked positions only, targets (M,): the tokens that were there.
    teacher_logits (M, V) of the momentum twin, without gradient: of each token's loss, `alpha` is
    the cross-entropy with the twin's softmax (equation 7) and 1 - alpha that with the token.
    M and `total` may be 0: the loss is then 0, with a graph, so that the ranks stay in step.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(dtype).log_softmax(dim=1)
    loss = F.nll_loss(log_p, targets, reduction="sum")
    if teacher_logits is not None and alpha:
        soft = teacher_logits.detach().to(dtype).softmax(dim=1)
        loss = torch.lerp(loss, -(soft * log_p).sum(), alpha)
    return loss / max(total, 1)
