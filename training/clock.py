"""How fast a run is: its training time, and rates since the last line of the log."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from training.streaming import Batch
from training.work import Work


class Clock:
    """Time spent training, without validation and saving; rates since the last lap."""

    def __init__(self, work: Work | None = None) -> None:
        self._started = self._lap = time.monotonic()
        self._work = work
        self.waited = 0.0
        self._forget()

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    def count(self, samples: int, own: Batch) -> None:
        """A step on `samples` samples of all ranks, of which these were this rank's."""
        self._steps += 1
        self._samples += samples
        self._own += len(own.samples)
        self._truncated += own.num_truncated
        if self._work is not None:
            self._flops += self._work.of(own)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that counts for nothing."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before
        self._lap += time.monotonic() - before

    def lap(self) -> dict[str, float]:
        """Rates since the last call, and the most memory used so far; of this process."""
        elapsed = time.monotonic() - self._lap
        rates = {
            "samples_per_second": self._samples / elapsed,
            "step_seconds": elapsed / max(self._steps, 1),
            "data_wait_fraction": self.waited / elapsed,
            "truncated_fraction": self._truncated / max(self._own, 1),
            "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            rates["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if self._work is not None:
            rates["tflops"] = self._flops / elapsed / 1e12
            if self._work.peak is not None:
                rates["mfu"] = self._flops / elapsed / self._work.peak
        self._lap, self.waited = time.monotonic(), 0.0
        self._forget()
        return rates

    def _forget(self) -> None:
        self._steps = self._samples = self._own = self._truncated = 0
        self._flops = 0.0
