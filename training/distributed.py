"""The processes of a run (ranks), and the few things they tell each other.

One process is a World of size 1, in which every operation is the identity: the loop is the same for
one and for many. Start at `connect`.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipserve.errors import ConfigError, TrainingError
from training.buffers import running_statistics

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GONE = "another process of this run is gone; its own message says why"

# Others wait while rank 0 saves, by gloo. On a CPU a process that dies is noticed at once, by its
# closed connection; NCCL waits as long, for torch's timeout is one for both.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among `size`, numbered from 0; `local_rank` is its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    @property
    def gpu(self) -> torch.device:
        """That of this process. Raises ConfigError where nothing said which it is."""
        if self.local_rank is None:
            raise ConfigError(
                f"WORLD_SIZE = {self.size}, but LOCAL_RANK, the number of the process's GPU, is not"
                " set; start the run with torchrun, or set it (under srun to SLURM_LOCALID)"
            )
        return torch.device("cuda", self.local_rank)

    def stripe(self, count: int) -> slice:
        """This rank's part of `count` things; the ranks' stripes in their order make the whole."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def exchange(self, *values: int) -> np.ndarray:
        """(size, len(values)) int64: what every rank gave."""
        own = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return own[None].numpy()
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        with together():
            dist.all_gather(everyone, own)
        return torch.stack(everyone).numpy()

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """All ranks' rows, (sum(counts), ...), in the order of ranks, with their gradients.

        Backward adds up what all ranks' losses say of a row. So each rank may score its own rows
        against everyone's; every rank has to make the same calls, also one without rows.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self, tuple(counts))
        return gathered

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, without a gradient."""
        values = values.detach().clone()
        if self.size > 1:
            _add_up(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all ranks; where only some have one, the others' are zero.

        What no rank has a gradient for keeps none, so that the optimizer leaves it as it is. Of
        weights that are split over the ranks (`training.fsdp`) torch has done so in the backward.
        """
        trained = [p for p in parameters if p.requires_grad and not is_split(p)]
        if self.size == 1 or not trained:
            return
        found = self.total(torch.tensor([p.grad is not None for p in trained], dtype=torch.int32))
        trained = [p for p, ranks in zip(trained, found.tolist(), strict=True) if ranks]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for kind in dict.fromkeys(parameter.dtype for parameter in trained):
            gradients = [p.grad for p in trained if p.grad is not None and p.dtype == kind]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            _add_up(flat)  # as large as the weights: no second copy
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def same_weights(self, network: nn.Module) -> None:
        """Overwrite parameters and buffers with those of rank 0."""
        if self.size > 1:
            with together():
                for tensor in network.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def same_statistics(self, network: nn.Module) -> None:
        """Overwrite running means and variances with those of rank 0, as DistributedDataParallel
        does: of batch norm, where they are of a rank's own rows."""
        buffers = running_statistics(network) if self.size > 1 else []
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        with together():
            dist.broadcast(flat, src=0)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def collect(self, value: T) -> list[T]:
        """What every rank gave, in the order of ranks."""
        if self.size == 1:
            return [value]
        given: list[T] = [value] * self.size
        with together():
            dist.all_gather_object(given, value)
        return given

    def tell(self, text: str) -> str:
        """What rank 0 says."""
        if self.size == 1:
            return text
        said = [text]
        with together():
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def agrees(self, value: bytes) -> bool:
        """Whether every rank gave the same."""
        own = int.from_bytes(sha256(value).digest()[:7], "big")
        return len(set(self.exchange(own)[:, 0].tolist())) == 1

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block alone, then the others: what it writes, they find."""
        if not self.is_main:
            self.exchange(0)
        yield
        if self.is_main:
            self.exchange(0)


ALONE = World()


def _add_up(values: Tensor) -> None:
    """Make them, in place, the sum of all ranks' values."""
    with together():
        dist.all_reduce(values)


class _Gather(torch.autograd.Function):
    """all_gather of unequal numbers of rows; of the gradients, summed, the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, counts: tuple[int, ...]) -> Tensor:
        ctx.world, ctx.first = world, sum(counts[: world.rank])
        ctx.count = len(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = [torch.empty_like(padded) for _ in counts]
        with together():
            dist.all_gather(everyone, padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = ctx.world.total(gradients[0].contiguous())
        return whole[ctx.first : ctx.first + ctx.count], None, None


def is_split(tensor: Tensor) -> bool:
    """Whether each rank has a part of it: a DTensor, whose class takes a second to import."""
    return hasattr(tensor, "placements")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what the ranks do with each other: TrainingError when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(_GONE) from error


@contextlib.contextmanager
def within_step() -> Iterator[None]:
    """Likewise around a step, in which torch lets ranks with split weights talk to each other."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise TrainingError(_GONE) from error
        raise


def is_one_of_many() -> bool:
    """Whether something else, torchrun say, started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def connect() -> Iterator[World]:
    """The World that torchrun's environment variables describe; alone without them.

    Raises ConfigError when the other processes cannot be reached.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit():
        raise ConfigError(f"WORLD_SIZE = {size!r} is no number; start the run with torchrun")
    if int(size) <= 1:
        yield ALONE
        return
    logger.info("waiting for the %s processes of this run", size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"the other processes of this run cannot be reached: {first}") from None
    try:
        local_rank = os.environ.get("LOCAL_RANK", "")
        number = int(local_rank) if local_rank.isdigit() else None
        yield World(dist.get_rank(), dist.get_world_size(), number)
    finally:
        dist.destroy_process_group()
