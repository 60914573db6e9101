"""Losses are computed in float32, whatever the towers compute in."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast, nor on a GPU TF32, whose products have 10 bits: logits of 100 by it are off
    by some hundredths. What is made inside is exact; gradients of it are as the backward is."""
    with torch.autocast(device.type, enabled=False), _without_tf32(device):
        yield


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    switch.allow_tf32 = False
    try:
        yield
    finally:
        switch.allow_tf32 = before
