"""Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, section 3.1, the equation and algorithm 1).

    L = -1/N sum_i sum_j log sigmoid(y_ij (scale image_i . text_j + bias))

with y_ij = 1 where picture and text belong together, else -1. Every pair counts by itself, so the
texts may come in blocks: all at once from a gather (`sigmoid_loss`), or one rank's after the other
from a ring (`sigmoid_ring_loss`; training/ring.py), which is the paper's section 3.3.

Legend: B own rows, N global batch (all ranks), C rows of a block, E embedding, G groups.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.objectives.exact import in_float32
from training.objectives.positives import find_positives


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    own: slice | None = None,
    groups: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The sum over all pairs / N: the share of the own pictures in it, with all texts.

    image, text: (N, E), unit length; scale: () is exp(log-temperature); bias: (); groups: (N, G)
    ids, and rows that agree in any are positives of one another, else each is its own. Returns ()
    in nats. The shares of all ranks add up to the loss, and so do their gradients.

    With `chunk_size` that many texts at a time, whose logits are made again in the backward:
    O(B chunk_size) memory. Logits are float32 at least, whatever autocast says.
    """
    own = slice(None) if own is None else own
    blocks = [(slice(0, len(text)), text)]
    return sigmoid_ring_loss(
        image[own],
        blocks,
        scale,
        bias,
        own=own,
        total=len(text),
        groups=groups,
        chunk_size=chunk_size,
    )


def sigmoid_ring_loss(
    image: Tensor,
    blocks: Iterable[tuple[slice, Tensor]],
    scale: Tensor,
    bias: Tensor,
    *,
    own: slice,
    total: int,
    groups: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """`sigmoid_loss` of the own pictures (B, E) with texts in blocks, which together are all.

    blocks: places in the global batch, and the texts (C, E) of these places; `own`: the places of
    the pictures; total: N; groups: those of the global batch (N, G), or None.
    """
    exact = torch.promote_types(image.dtype, torch.float32)
    groups = torch.arange(total, device=image.device)[:, None] if groups is None else groups
    loss = image.new_zeros((), dtype=exact)
    with in_float32(image.device):
        scaled = scale.to(exact) * image.to(exact)
        for places, text in blocks:
            inputs = (scaled, text.to(exact), bias.to(exact), groups[own], groups[places])
            if chunk_size is None:
                loss = loss + _sum_pairs(*inputs)
            else:
                loss = loss + _sum_chunks(*inputs, chunk_size)
    return loss / total


def _sum_chunks(
    image: Tensor, text: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, chunk_size: int
) -> Tensor:
    total = image.new_zeros(())
    chunks = (torch.split(whole, chunk_size) for whole in (text, columns))
    for texts, ids in zip(*chunks, strict=True):
        total = total + checkpoint(
            _sum_pairs,
            image,
            texts,
            bias,
            rows,
            ids,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random inside
        )
    return total


def _sum_pairs(image: Tensor, text: Tensor, bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """-log sigmoid(y (image @ text.T + bias)), summed; rows (B, G) and columns (C, G) make y."""
    with in_float32(image.device):  # in chunks they are made again in the backward
        logits = image @ text.T + bias  # (B, C)
    signed = torch.where(find_positives(rows, columns), logits, -logits)
    return -F.logsigmoid(signed).sum()
