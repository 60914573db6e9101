"""How fast a run is: its training time, and rates since the last line of the log."""

import contextlib
import time
from collections.abc import Iterator

from training.streaming import Batch


class Clock:
    """Time spent training, without validation and saving; rates since the last lap."""

    def __init__(self) -> None:
        self._started = self._lap = time.monotonic()
        self.waited = 0.0
        self._samples = self._own = self._truncated = 0

    @property
    def total(self) -> float:
        return time.monotonic() - self._started

    def count(self, samples: int, own: Batch) -> None:
        """A step on `samples` samples of all ranks, of which these were this rank's."""
        self._samples += samples
        self._own += len(own.samples)
        self._truncated += own.num_truncated

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that counts for nothing."""
        before = time.monotonic()
        yield
        self._started += time.monotonic() - before
        self._lap += time.monotonic() - before

    def lap(self) -> dict[str, float]:
        """Rates since the last call."""
        elapsed = time.monotonic() - self._lap
        rates = {
            "samples_per_second": self._samples / elapsed,
            "data_wait_fraction": self.waited / elapsed,
            "truncated_fraction": self._truncated / max(self._own, 1),
        }
        self._lap, self.waited = time.monotonic(), 0.0
        self._samples = self._own = self._truncated = 0
        return rates
