"""Several sets of shards as one: samples numbered through all of them. Start at `Mixture`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipserve.errors import DataError
from clipserve.shards import Sample, ShardSet
from training.order import Dataset


@dataclass(frozen=True)
class WeightedShards:
    """A set of shards, and how many passes over it an epoch makes."""

    shards: ShardSet
    weight: float = 1.0


class Mixture:
    """Reads any sample of any of the sets. Raises DataError for one that gives no sample."""

    def __init__(self, parts: Sequence[WeightedShards]) -> None:
        self.parts = tuple(parts)
        for part in self.parts:
            if round(part.weight * len(part.shards)) < 1:
                raise DataError(
                    f"{part.shards.location} holds {len(part.shards)} samples, which with weight"
                    f" {part.weight:g} gives none an epoch; leave it out or raise its weight"
                )
        self._starts = np.cumsum([0, *(len(part.shards) for part in self.parts)])
        shard_counts = [len(part.shards.shard_starts) - 1 for part in self.parts]
        self._first_shards = np.cumsum([0, *shard_counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """What the order of samples depends on."""
        return tuple(
            Dataset(part.shards.manifest.fingerprint, part.shards.shard_starts, part.weight)
            for part in self.parts
        )

    @property
    def is_remote(self) -> bool:
        """Whether any of the shards has to be fetched."""
        return any(part.shards.is_remote for part in self.parts)

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join(part.shards.location for part in self.parts)

    def read(self, sample: int) -> Sample:
        """As ShardSet.read."""
        part, own = self._locate(sample)
        return self.parts[part].shards.read(own)

    def key(self, sample: int) -> tuple[str, str]:
        """(shard, key) of a sample, without reading it; of several sets the shard with its set."""
        part, own = self._locate(sample)
        shards = self.parts[part].shards
        shard, key = shards.key(own)
        return (shard if len(self.parts) == 1 else f"{shards.location}/{shard}"), key

    def text_bytes(self, samples: np.ndarray) -> np.ndarray:
        """Caption lengths in bytes, without reading the samples."""
        lengths = np.empty(len(samples), np.int64)
        owner = np.searchsorted(self._starts, samples, side="right") - 1
        for number, part in enumerate(self.parts):
            mine = owner == number
            lengths[mine] = part.shards.text_bytes(samples[mine] - self._starts[number])
        return lengths

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of each sample's shard, counted through all sets; for `fetch`."""
        owner = np.searchsorted(self._starts, samples, side="right") - 1
        numbers = np.empty(len(samples), np.int64)
        for number, part in enumerate(self.parts):
            mine = owner == number
            own = samples[mine] - self._starts[number]
            shard = np.searchsorted(part.shards.shard_starts, own, side="right") - 1
            numbers[mine] = self._first_shards[number] + shard
        return numbers

    def fetch(self, shard: int) -> None:
        """Make a shard local ahead of its use; from any thread."""
        part = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        self.parts[part].shards.fetch(shard - int(self._first_shards[part]))

    def _locate(self, sample: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return part, sample - int(self._starts[part])
