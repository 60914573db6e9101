"""Rows that go round the ranks, so that each scores its own against everyone's, block by block.

Start at `ring`. Its user is the sigmoid loss (SigLIP, arXiv:2303.15343, section 3.3), of which no
rank needs all logits at once.

Legend: B own rows, N global batch (all ranks), C rows of a block, M most rows of a rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import World, together


def ring(rows: Tensor, counts: list[int], world: World) -> Iterator[tuple[slice, Tensor]]:
    """Each rank's rows in turn, own ones first, with the places in the global batch they have.

    rows (B, ...): this rank's part of the N = sum(counts) rows, which lie in the order of ranks.
    Yields (place, (C, ...)). What is passed on is passed back in the backward, which thus adds up
    what all ranks' losses say of a row. Every rank has to go all the way round, and to make the
    same backward call, also one without rows (there, too, `rows` requires a gradient or not as
    elsewhere). Raises TrainingError when a rank is gone.
    """
    block = rows
    if world.size > 1:
        block = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    for step in range(world.size):
        if step:
            block = _PassOn.apply(block, world)
        rank = (world.rank - step) % world.size
        first = sum(counts[:rank])
        yield slice(first, first + counts[rank]), block[: counts[rank]]


class _PassOn(torch.autograd.Function):
    """A block to the next rank, for that of the one before; its gradient the other way."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _pass(block, world, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _pass(gradients[0], ctx.world, -1), None


def _pass(block: Tensor, world: World, step: int) -> Tensor:
    """Send (M, ...) to the rank `step` places on; what comes from the one as far behind."""
    block = block.contiguous()
    received = torch.empty_like(block)
    to, source = (world.rank + step) % world.size, (world.rank - step) % world.size
    with together():
        sending = dist.P2POp(dist.isend, block, to)
        receiving = dist.P2POp(dist.irecv, received, source)
        for message in dist.batch_isend_irecv([sending, receiving]):
            message.wait()
    return received
