"""Shards -> samples -> batches, in an order that is a pure function of (seed, epoch, manifest).

Batch b of an epoch is a fixed slice of the epoch's order, and a sample's augmentation is keyed by
(seed, epoch, sample): so any number of worker processes gives the same batches, and continuing at a
position needs no replay. Start at `Stream`.

Legend: B batch, H height, W width, T text tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipserve.errors import ClipserveError, DataError, ImageError
from clipserve.images import ImageLimits, TrainTransform, decode_image
from clipserve.shards import BadSample, ShardSet
from clipserve.sources import clean_captions
from clipserve.text import Tokenizer


@dataclass(frozen=True)
class Batch:
    """`pixels` (B, 3, H, W) uint8 and `ids` (B, T) int64, cut to the longest caption."""

    pixels: Tensor
    ids: Tensor
    samples: list[int]
    num_truncated: int
    bad: list[BadSample] = field(default_factory=list)
    error: Exception | None = None
    """what stopped a worker; raised where the batch is taken"""

    def pin_memory(self) -> "Batch":
        pixels, ids = self.pixels.pin_memory(), self.ids.pin_memory()
        return replace(self, pixels=pixels, ids=ids)


@dataclass(frozen=True)
class Draw:
    """Sample `sample` as seen in epoch `epoch`: together with the seed, all its randomness."""

    epoch: int
    sample: int


class Stream:
    """Training batches of a set of shards, from any position on, for ever.

    An epoch has len(shards) // batch_size batches; which samples are left over differs from epoch
    to epoch. Texts are cut to the batch's longest, rounded up to a multiple of `text_multiple`, or
    fill the context if that is 0. DataError when there are fewer samples than a batch needs.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: TrainTransform,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        text_multiple: int,
    ) -> None:
        if len(shards) < batch_size:
            raise DataError(
                f"{shards.folder} holds {len(shards)} samples, fewer than data.batch_size"
                f" {batch_size}; use {max(len(shards), 2)} or less"
            )
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self._samples = _Samples(shards, transform, seed)
        self._collate = _Collate(tokenizer, text_multiple)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.shards) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, in their order: a permutation drawn from (seed, epoch)."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))

    def batches(self, start: int, stop: int, workers: int, pin: bool = False) -> Iterator[Batch]:
        """Batches number `start` to `stop` (exclusive), counted over all epochs."""
        loader = DataLoader(
            self._samples,
            batch_sampler=_Batches(self, start, stop),
            num_workers=workers,
            collate_fn=self._collate,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
            # Its own: else starting the workers would draw from the generator that dropout uses,
            # and a resumed run, which starts them again, would differ from an uninterrupted one.
            generator=torch.Generator(),
        )
        for batch in loader:
            if batch.error is not None:
                raise batch.error
            yield batch


class _Batches(Sampler[list[Draw]]):
    def __init__(self, stream: Stream, start: int, stop: int) -> None:
        self._stream, self._start, self._stop = stream, start, stop

    def __iter__(self) -> Iterator[list[Draw]]:
        size, per_epoch = self._stream.batch_size, self._stream.batches_per_epoch
        order, of_epoch = np.empty(0), -1
        for number in range(self._start, self._stop):
            epoch, b = divmod(number, per_epoch)
            if epoch != of_epoch:
                order, of_epoch = self._stream.order(epoch), epoch
            yield [Draw(epoch, int(i)) for i in order[b * size : (b + 1) * size]]


@dataclass(frozen=True)
class _Decoded:
    sample: int
    pixels: np.ndarray
    caption: str


class _Samples(Dataset[_Decoded | BadSample | Exception]):
    def __init__(self, shards: ShardSet, transform: TrainTransform, seed: int) -> None:
        self._shards, self._transform, self._seed = shards, transform, seed
        self._limits = ImageLimits()

    def __getitem__(self, draw: Draw) -> _Decoded | BadSample | Exception:
        try:
            sample = self._shards.read(draw.sample)
        except (ClipserveError, OSError) as error:
            return error  # raised from here, it would arrive with the worker's whole traceback
        random = np.random.default_rng((self._seed, draw.epoch, draw.sample))
        captions = clean_captions(sample.captions)
        if not captions:
            return BadSample(sample.shard, sample.key, "empty_caption", "the caption is empty")
        caption = captions[int(random.integers(len(captions)))]
        try:
            picture = decode_image(sample.image, self._limits)
        except ImageError as error:
            return BadSample(sample.shard, sample.key, "bad_image", str(error))
        return _Decoded(draw.sample, self._transform.resize(picture, random), caption)


class _Collate:
    def __init__(self, tokenizer: Tokenizer, text_multiple: int) -> None:
        self._tokenizer, self._text_multiple = tokenizer, text_multiple

    def __call__(self, items: list[_Decoded | BadSample | Exception]) -> Batch:
        good = [item for item in items if isinstance(item, _Decoded)]
        bad = [item for item in items if isinstance(item, BadSample)]
        tokens = self._tokenizer([item.caption for item in good])
        ids = tokens.ids
        if self._text_multiple:
            ids = tokens.cut(self._text_multiple).contiguous()
        pixels = np.stack([item.pixels for item in good]) if good else np.empty((0, 3, 0, 0))
        return Batch(
            torch.from_numpy(pixels),
            ids,
            [item.sample for item in good],
            sum(tokens.truncated),
            bad,
            next((item for item in items if isinstance(item, Exception)), None),
        )
