"""What a forward pass changes by itself: the running means and variances of batch norm."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that have them, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Of all such layers; without the numbers of batches, which are counted alike everywhere."""
    buffers = [buffer for norm in batch_norms(network).values() for buffer in norm.buffers()]
    return [buffer for buffer in buffers if buffer.is_floating_point()]


def remember(network: nn.Module) -> Callable[[], None]:
    """Note all buffers; returns what puts them back."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def put_back() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return put_back


@contextlib.contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """A block after which buffers are as before."""
    put_back = remember(network)
    try:
        yield
    finally:
        put_back()
