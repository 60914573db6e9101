"""Samples per second of a data loader once it is under way, for both sides of a comparison."""

import multiprocessing
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def measure(
    batches: Iterable[tuple[Tensor, Tensor]], batch_size: int, skip: int, count: int
) -> dict[str, float]:
    """Take `skip` batches of float32 pixels and ids while queues fill, then time `count` more.

    The processor time of the worker is given beside the time that passed: it hardly changes when
    other programs run.
    """
    started = time.perf_counter()
    first = start = worker_start = 0.0
    for number, (pixels, ids) in enumerate(batches):
        if number == 0:
            first = time.perf_counter() - started
        if pixels.dtype != torch.float32 or len(pixels) != batch_size or ids.shape[1] != 77:
            raise ValueError(f"a batch of {pixels.dtype} {pixels.shape}, ids {ids.shape}")
        if number == skip:
            start, worker_start = time.perf_counter(), _worker_seconds()
        if number == skip + count:
            break
    seconds, worker = time.perf_counter() - start, _worker_seconds() - worker_start
    samples = batch_size * count
    return {
        "samples_per_s": samples / seconds,
        "worker_cpu_ms_per_sample": 1000 * worker / samples,
        "first_batch_s": first,
    }


def _worker_seconds() -> float:
    """Processor time of all child processes so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time, proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")
