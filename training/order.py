"""Which samples make up which batch: a pure function of (settings, epoch, manifests).

No state is walked: batch b of epoch e can be asked for at any time, so a run continues at any
position without a replay, and any number of workers and ranks sees the same batches. Start at
`SampleOrder.batches`.

Every dataset is an endless sequence of passes, each pass a permutation of its own; an epoch takes
`weight` passes' worth from it, where the last epoch stopped. So with weight 1 an epoch is exactly
one pass, with 0.5 two epochs are, and nothing is favoured by chance.
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np

TextBytes = Callable[[np.ndarray], np.ndarray]


class Purpose(enum.IntEnum):
    """Stands behind the seed wherever random numbers are drawn, so that no two uses share any."""

    PASSES = 0
    MIXING = 1
    BUCKETS = 2
    VIEW = 3
    STEP = 4
    DRAWS = 5
    ADAPTERS = 6


@dataclass(frozen=True)
class Draw:
    """Sample number `sample` seen for the `view`-th time: with the seed, all its randomness."""

    view: int
    sample: int


@dataclass(frozen=True)
class Position:
    """Where a run stands: `consumed` samples of epoch `epoch` were trained on."""

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class Dataset:
    """What the order needs to know of one dataset."""

    fingerprint: str
    shard_starts: np.ndarray
    """(num_shards + 1,) number of each shard's first sample"""
    weight: float = 1.0
    """passes over it in one epoch"""

    @property
    def size(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def per_epoch(self) -> int:
        return round(self.weight * self.size)


@dataclass(frozen=True)
class OrderSettings:
    """How samples are drawn and batched; see the settings of the same names under [data]."""

    batch_size: int
    seed: int = 0
    last_batch: Literal["drop", "keep", "pad"] = "drop"
    replacement: bool = False
    shuffle_shards: int | None = None
    bucket_batches: int = 0


class SampleOrder:
    """The batches of every epoch. Samples are numbered through all datasets, in their order.

    `text_bytes` gives the caption lengths of samples; only `bucket_batches` asks for them.
    """

    def __init__(
        self, datasets: tuple[Dataset, ...], settings: OrderSettings, text_bytes: TextBytes
    ) -> None:
        self.datasets, self.settings = datasets, settings
        self._text_bytes = text_bytes
        self._offsets = np.cumsum([0, *(dataset.size for dataset in datasets)])

    @property
    def identity(self) -> dict[str, Any]:
        """All that the order depends on; two runs with equal ones draw the same batches."""
        content = [[d.fingerprint, d.weight] for d in self.datasets]
        return {"datasets": sha256(repr(content).encode()).hexdigest(), **asdict(self.settings)}

    @property
    def epoch_size(self) -> int:
        """Samples drawn in an epoch, before the last batch is dropped or padded."""
        return sum(dataset.per_epoch for dataset in self.datasets)

    @property
    def batches_per_epoch(self) -> int:
        whole, rest = divmod(self.epoch_size, self.settings.batch_size)
        return whole + (rest > 0 and self.settings.last_batch != "drop")

    def batches(self, start: Position) -> Iterator[list[Draw]]:
        """The batches from `start` on, for ever."""
        epoch, first = start.epoch, start.consumed
        while True:
            yield from self._epoch_batches(epoch, first)
            epoch, first = epoch + 1, 0

    def advance(self, position: Position) -> Position:
        """The position after the batch that begins at `position`."""
        consumed = position.consumed + self.settings.batch_size
        last = self.batches_per_epoch * self.settings.batch_size
        return (
            Position(position.epoch + 1) if consumed >= last else Position(position.epoch, consumed)
        )

    def size_at(self, position: Position) -> int:
        """Samples of the batch that begins at `position`, over all ranks."""
        if self.settings.last_batch == "keep":
            return min(self.settings.batch_size, self.epoch_size - position.consumed)
        return self.settings.batch_size

    def draws(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, views) of an epoch, both int64, in their order; without buckets or padding."""
        parts = [self._dataset_draws(d, epoch) for d in range(len(self.datasets))]
        if len(parts) == 1:
            return parts[0]
        # Which dataset each place belongs to; within one its own order stays.
        owner = np.repeat(np.arange(len(parts)), [len(samples) for samples, _ in parts])
        self._random(Purpose.MIXING, epoch).shuffle(owner)
        samples, views = np.empty(len(owner), np.int64), np.empty(len(owner), np.int64)
        for d, (own_samples, own_views) in enumerate(parts):
            samples[owner == d], views[owner == d] = own_samples, own_views
        return samples, views

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[Draw]]:
        size = self.settings.batch_size
        samples, views = self.draws(epoch)
        if self.settings.bucket_batches:
            by_length = self._bucket(samples, epoch)
            samples, views = samples[by_length], views[by_length]
        if self.settings.last_batch == "pad":
            padded = np.arange(self.batches_per_epoch * size) % len(samples)
            samples, views = samples[padded], views[padded]
        for begin in range(first, self.batches_per_epoch * size, size):
            chosen = slice(begin, begin + size)
            pairs = zip(views[chosen].tolist(), samples[chosen].tolist(), strict=True)
            yield [Draw(view, sample) for view, sample in pairs]

    def _dataset_draws(self, d: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        count = self.datasets[d].per_epoch
        begin = epoch * count
        if self.settings.replacement:
            samples = self._resample(d, epoch, count)
            views = np.arange(begin, begin + count)
        else:
            samples, views = self._passes(d, begin, count)
        return samples + self._offsets[d], views

    def _passes(self, d: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Places begin .. begin + count of the dataset's endless sequence of passes."""
        size = self.datasets[d].size
        first, last = begin // size, -(-(begin + count) // size)
        numbers = range(first, last)
        samples = np.concatenate([np.empty(0, np.int64), *(self._pass(d, n) for n in numbers)])
        views = np.repeat(np.arange(first, last), size)
        chosen = slice(begin - first * size, begin - first * size + count)
        return samples[chosen], views[chosen]

    def _pass(self, d: int, number: int) -> np.ndarray:
        """A permutation; with `shuffle_shards` of few shards at a time, so that few are needed."""
        random = self._random(Purpose.PASSES, d, number)
        dataset, window = self.datasets[d], self.settings.shuffle_shards
        if window is None:
            return random.permutation(dataset.size)
        starts = dataset.shard_starts
        shards = random.permutation(len(starts) - 1)
        return self._in_windows(starts, shards, window, random.permutation)

    def _resample(self, d: int, epoch: int, count: int) -> np.ndarray:
        """Draws with replacement; with `shuffle_shards` shards are drawn, then samples of them."""
        random = self._random(Purpose.PASSES, d, epoch)
        dataset, window = self.datasets[d], self.settings.shuffle_shards
        if window is None:
            return random.integers(dataset.size, size=count)
        starts = dataset.shard_starts
        drawn = [np.empty(0, np.int64)]
        while sum(map(len, drawn)) < count:  # every shard alike, for each gives its size
            shards = random.integers(len(starts) - 1, size=len(starts) - 1)
            drawn.append(
                self._in_windows(
                    starts, shards, window, lambda own: random.choice(own, size=len(own))
                )
            )
        return np.concatenate(drawn)[:count]

    @staticmethod
    def _in_windows(
        starts: np.ndarray,
        shards: np.ndarray,
        window: int,
        draw: Callable[[np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """`draw` applied to the samples of every `window` shards."""
        drawn = [np.empty(0, np.int64)]
        for begin in range(0, len(shards), window):
            own = [np.arange(starts[s], starts[s + 1]) for s in shards[begin : begin + window]]
            drawn.append(draw(np.concatenate(own)))
        return np.concatenate(drawn)

    def _bucket(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """A reordering in which captions of a batch are of like length, and batches are mixed.

        Within every `bucket_batches` batches; the last, short batch stays where it is.
        """
        size = self.settings.batch_size
        whole = len(samples) // size * size
        reordered = [np.empty(0, np.int64)]
        for begin in range(0, whole, self.settings.bucket_batches * size):
            end = min(begin + self.settings.bucket_batches * size, whole)
            lengths = self._text_bytes(samples[begin:end])
            batches = begin + np.argsort(lengths, kind="stable").reshape(-1, size)
            reordered += [*self._random(Purpose.BUCKETS, epoch, begin).permutation(batches)]
        return np.concatenate([*reordered, np.arange(whole, len(samples))])

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, *purpose))
