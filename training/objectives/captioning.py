"""Captioning: the caption's next word, given the picture and the words before it (CoCa).

Legend: B own rows, T text tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.exact import in_float32


def captioning_loss(logits: Tensor, targets: Tensor, pad_id: int, total: int) -> Tensor:
    """CoCa's L_Cap (arXiv:2205.01917, equation 3), the mean over the batch's words.

    -log P(y_t | y_<t, x) for each position t that is no padding. logits: (B, T, V), of which
    position t has seen the words before t; targets: (B, T) are the words at t (of token ids
    (B, T + 1) all but the first). Returns () in nats, this rank's share: the sum over its own words
    / `total`, which is `caption_tokens` of all ranks. Float32 whatever autocast says.

    As in open_clip, a token whose id is `pad_id` counts as padding: with CLIP's own tokenizer also
    an exclamation mark that stands before a rare run of signs.
    """
    is_word = targets != pad_id
    with in_float32(logits.device):
        # Words only: captions are short, and a row of float32 logits is 200 kB.
        words = logits[is_word]  # (words, V)
        words = words.to(torch.promote_types(words.dtype, torch.float32))
        return F.cross_entropy(words, targets[is_word], reduction="sum") / max(total, 1)


def caption_tokens(targets: Tensor, pad_id: int) -> int:
    """How many of the targets (B, T) are no padding."""
    return int((targets != pad_id).sum())
