"""Shards -> samples -> batches, in the order that `training.order` gives. Start at `Stream`.

Worker processes decode; the order is drawn in the training process alone and handed to them, and a
sample's augmentation is keyed by (seed, view, sample). So any number of workers gives the same
batches, and continuing at a position needs no replay.

Legend: B batch, H height, W width, T text tokens.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pickle import UnpicklingError
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipserve.errors import ClipserveError, DataError, ImageError, SampleError
from clipserve.images import ImageLimits, TrainTransform, decode_image
from clipserve.shards import BadSample, Sample
from clipserve.sources import clean_captions
from clipserve.text import Tokenizer
from training.augment import ViewTransform
from training.decoding import decode_crop
from training.distributed import ALONE, World
from training.mixture import Mixture
from training.order import Draw, OrderSettings, Position, Purpose, SampleOrder
from training.signals import begin_worker, without_interruption, worker_context

_SHARDS_AHEAD = 4
_BATCHES_AHEAD = 256
_UNUSED_BATCHES = 16
_BATCHES_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch: `pixels` (B, 3, H, W) uint8, `ids` (B, T) int64.

    T is the length of the longest caption here. What failed is in `bad` and not in the tensors.
    """

    pixels: Tensor
    ids: Tensor
    samples: list[int]
    num_truncated: int
    groups: Tensor
    """(B, 3) int64: equal numbers in a column are the same picture, caption or label"""
    captions: list[str] = field(default_factory=list)
    views: Tensor | None = None
    """(2, B, 3, H, W) uint8, where an objective wants augmented views"""
    bad: list[BadSample] = field(default_factory=list)
    error: Exception | None = None
    """what stopped a worker; raised where the batch is taken"""

    def pin_memory(self) -> "Batch":
        """The same in memory from which a GPU copies by itself."""
        return self._apply(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def _apply(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        views = None if self.views is None else move(self.views)
        return replace(
            self,
            pixels=move(self.pixels),
            ids=move(self.ids),
            groups=move(self.groups),
            views=views,
        )


@dataclass(frozen=True)
class SampleSettings:
    """How a sample becomes pixels and a caption."""

    transform: TrainTransform
    caption_fields: Mapping[str, float] | None = None
    """JSON fields to draw the caption from, with their weights; None: the captions as packed"""
    exact_decoding: bool = False
    """Pillow's full decoding, as open_clip does it, in place of `decode_crop`"""
    views: ViewTransform | None = None
    """what makes two augmented views of each picture"""
    label_field: str | None = None
    """JSON field with the class of a picture"""
    picture_field: str | None = None
    """JSON field that names a picture; None: its bytes do"""
    finds_groups: bool = True
    """False where no objective asks what is the same: pictures and labels are then all different"""


class Stream:
    """Training batches of a mixture of shards, from any position on, for ever.

    Texts are cut to the batch's longest, rounded up to a multiple of `text_multiple`, or fill the
    context if that is 0. DataError when there are fewer samples than a batch needs.
    """

    def __init__(
        self,
        data: Mixture,
        samples: SampleSettings,
        tokenizer: Tokenizer,
        order: OrderSettings,
        *,
        text_multiple: int = 1,
        world: World = ALONE,
    ) -> None:
        self.data, self.world = data, world
        self.order = SampleOrder(data.datasets, order, data.text_bytes)
        if not self.order.batches_per_epoch:
            size = self.order.epoch_size
            raise DataError(
                f"{data.name} holds {size} samples an epoch, fewer than data.batch_size"
                f" {order.batch_size}; use {max(size, 2)} or less, or data.last_batch = keep or pad"
            )
        self._samples = _Samples(data, samples, order.seed)
        self._collate = _Collate(tokenizer, text_multiple, samples.transform.inference.size)

    def batches(
        self, start: Position, count: int, workers: int, pin: bool = False
    ) -> Generator[Batch]:
        """`count` batches from `start` on; the worker processes live as long as the iterator.

        Raises DataError when a shard cannot be read at all or a worker is killed.
        """
        loader = DataLoader(
            self._samples,
            batch_sampler=_Batches(self, start, count),
            num_workers=workers,
            collate_fn=self._collate,
            prefetch_factor=_BATCHES_AHEAD_PER_WORKER if workers else None,
            pin_memory=pin,
            worker_init_fn=begin_worker,
            multiprocessing_context=worker_context() if workers else None,
            # Its own: else starting the workers would draw from the generator that dropout uses.
            generator=torch.Generator(),
        )
        with contextlib.closing(without_interruption(loader)) as iterator:
            while (batch := _next(iterator)) is not None:
                if batch.error is not None:
                    raise batch.error
                yield batch


def captions_in(sample: Sample, name: str) -> tuple[str, ...]:
    """The texts in a JSON field of a sample; of `caption`, its captions as packed."""
    if name == "caption":
        return clean_captions(sample.captions)
    value = sample.metadata.get(name)
    texts = value if isinstance(value, list) else [value]
    return clean_captions(text for text in texts if isinstance(text, str))


def _next(batches: Iterator[Batch]) -> Batch | None:
    """The next batch, None at the end; DataError if the worker that made it has died."""
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, ConnectionError, UnpicklingError) as error:
        # What a batch half handed over fails with depends on the moment of death.
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            "a data worker was killed, perhaps for want of memory; lower data.workers or"
            " data.batch_size"
        ) from error


class _Batches(Sampler[list[Draw]]):
    """This rank's stripe of each global batch; remote shards are fetched ahead of their use."""

    def __init__(self, stream: Stream, start: Position, count: int) -> None:
        self._stream, self._start, self._count = stream, start, count

    def __iter__(self) -> Iterator[list[Draw]]:
        stream = self._stream
        whole = islice(stream.order.batches(self._start), self._count)
        own = (batch[stream.world.stripe(len(batch))] for batch in whole)
        return _fetching_ahead(stream.data, own) if stream.data.is_remote else own


def _fetching_ahead(data: Mixture, batches: Iterator[list[Draw]]) -> Iterator[list[Draw]]:
    """The same batches, looked at ahead, so that shards are on their way before their first use.

    A shard that cannot be fetched is no error here: the worker that needs it will say so.
    """
    ahead: deque[list[Draw]] = deque()
    last_use: dict[int, int] = {}
    with contextlib.closing(_Fetcher(data)) as fetcher:
        for number, batch in enumerate(batches):
            shards = data.shards_of(np.array([draw.sample for draw in batch]))
            for shard in np.unique(shards).tolist():
                if number - last_use.get(shard, -_UNUSED_BATCHES) >= _UNUSED_BATCHES:
                    fetcher.ask(shard)  # again, too: the cache may have dropped it
                last_use[shard] = number
            ahead.append(batch)
            while ahead and (len(ahead) >= _BATCHES_AHEAD or fetcher.is_busy):
                yield ahead.popleft()
        yield from ahead


class _Fetcher:
    """A few threads that fetch shards. They are daemons: a process that ends waits for none."""

    def __init__(self, data: Mixture) -> None:
        self._data = data
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._unfinished: set[int] = set()
        for _ in range(_SHARDS_AHEAD):
            Thread(target=self._work, name="fetch", daemon=True).start()

    @property
    def is_busy(self) -> bool:
        """Whether enough shards are on their way."""
        return len(self._unfinished) >= _SHARDS_AHEAD

    def ask(self, shard: int) -> None:
        self._unfinished.add(shard)
        self._asked.put(shard)

    def close(self) -> None:
        """Fetch no more."""
        for _ in range(_SHARDS_AHEAD):
            self._asked.put(None)

    def _work(self) -> None:
        while (shard := self._asked.get()) is not None:
            with contextlib.suppress(DataError, OSError):
                self._data.fetch(shard)
            self._unfinished.discard(shard)


@dataclass(frozen=True)
class _Decoded:
    sample: int
    pixels: np.ndarray
    caption: str
    groups: tuple[int, int, int]
    views: np.ndarray | None


class _Samples(Dataset[_Decoded | BadSample | Exception]):
    def __init__(self, data: Mixture, settings: SampleSettings, seed: int) -> None:
        self._data, self._settings, self._seed = data, settings, seed
        self._limits = ImageLimits()

    def __getitem__(self, draw: Draw) -> _Decoded | BadSample | Exception:
        try:
            sample = self._data.read(draw.sample)
        except SampleError as error:
            return self._bad(draw, error.kind, str(error))
        except (ClipserveError, OSError) as error:
            return error  # raised from here, it would arrive with the worker's whole traceback
        random = np.random.default_rng((self._seed, Purpose.VIEW, draw.view, draw.sample))
        fields = self._settings.caption_fields
        caption = _draw_caption(sample, fields, random)
        if not caption:
            what = f"no text in any of {', '.join(fields)}" if fields else "the caption is empty"
            return self._bad(draw, "empty_caption", what)
        try:
            pixels = self._decode(sample.image, random)
            views = self._draw_views(sample.image, random)
        except ImageError as error:
            return self._bad(draw, "bad_image", str(error))
        return _Decoded(draw.sample, pixels, caption, self._groups(draw, sample, caption), views)

    def _bad(self, draw: Draw, kind: str, reason: str) -> BadSample:
        return BadSample(*self._data.key(draw.sample), kind, reason)

    def _groups(self, draw: Draw, sample: Sample, caption: str) -> tuple[int, int, int]:
        """Numbers of the picture, the caption and the label; without a label one of its own."""
        settings, fields, alone = self._settings, sample.metadata, -1 - draw.sample
        words = _number(" ".join(caption.casefold().split()).encode())
        if not settings.finds_groups:
            return alone, words, alone
        picture = fields.get(settings.picture_field) if settings.picture_field else None
        label = fields.get(settings.label_field) if settings.label_field else None
        return (
            _number(sample.image if picture is None else repr(picture).encode()),
            words,
            alone if label is None else _number(repr(label).encode()),
        )

    def _draw_views(self, image: bytes, random: np.random.Generator) -> np.ndarray | None:
        transform = self._settings.views
        if transform is None:
            return None
        return np.stack([transform(image, random, self._limits) for _ in range(2)])

    def _decode(self, image: bytes, random: np.random.Generator) -> np.ndarray:
        transform = self._settings.transform
        if self._settings.exact_decoding:
            return transform.resize(decode_image(image, self._limits), random)
        return decode_crop(image, transform, random, self._limits)


def _number(content: bytes) -> int:
    """0 .. 2**63 - 1, the same for the same content."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 1


def _draw_caption(
    sample: Sample, fields: Mapping[str, float] | None, random: np.random.Generator
) -> str:
    """One of the sample's captions, or "" if it has none; of a field with several, any."""
    captions = sample.captions
    if fields is not None:
        found = {name: captions_in(sample, name) for name in fields}
        present = [name for name, texts in found.items() if texts]
        if not present:
            return ""
        weights = np.array([fields[name] for name in present])
        captions = found[present[int(random.choice(len(present), p=weights / weights.sum()))]]
    captions = clean_captions(captions)
    return captions[int(random.integers(len(captions)))] if captions else ""


class _Collate:
    def __init__(self, tokenizer: Tokenizer, text_multiple: int, size: tuple[int, int]) -> None:
        self._tokenizer, self._text_multiple = tokenizer, text_multiple
        self._empty = np.empty((0, 3, *size), np.uint8)

    def __call__(self, items: list[_Decoded | BadSample | Exception]) -> Batch:
        good = [item for item in items if isinstance(item, _Decoded)]
        tokens = self._tokenizer([item.caption for item in good])
        ids = tokens.ids
        if self._text_multiple:
            ids = tokens.cut(self._text_multiple).contiguous()
        pixels = np.stack([item.pixels for item in good]) if good else self._empty
        return Batch(
            torch.from_numpy(pixels),
            ids,
            [item.sample for item in good],
            sum(tokens.truncated),
            torch.tensor([item.groups for item in good], dtype=torch.int64).view(-1, 3),
            [item.caption for item in good],
            _stack_views(good),
            [item for item in items if isinstance(item, BadSample)],
            next((item for item in items if isinstance(item, Exception)), None),
        )


def _stack_views(items: list[_Decoded]) -> Tensor | None:
    views = [item.views for item in items if item.views is not None]
    return torch.from_numpy(np.stack(views, axis=1)) if views else None  # (2, B, 3, H, W)
