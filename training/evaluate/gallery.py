"""The captioned pictures of shards as vectors, for every task to share. See `embed_shards`."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from clipserve.decoding import decode
from clipserve.embed import embed_pixels, embed_texts
from clipserve.errors import DataError, ImageError, SampleError
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.sources import clean_captions
from training.distributed import ALONE, World

logger = logging.getLogger(__name__)

_TEXT_BATCH = 256


class Gallery(NamedTuple):
    """A set of captioned pictures as vectors."""

    images: np.ndarray
    """(N, E) unit vectors"""
    texts: np.ndarray
    """(M, E) unit vectors"""
    captions: list[str]
    """M texts"""
    text_of: np.ndarray
    """(M,) the row in `images` of the picture that a text describes"""


def embed_shards(
    model: Model, shards: ShardSet, batch_size: int = 128, world: World = ALONE
) -> Gallery:
    """All pictures and captions, each rank's part of them gathered; DataError if there are none.

    A picture that does not decode is left out with a warning. Batches hold the same samples
    however many ranks there are, so that the vectors do not depend on it.
    """
    vectors, own_captions = [_no_rows(model)], []
    rows = _own_rows(len(shards), batch_size, world)
    for start in range(rows.start, rows.stop, batch_size):
        part = range(start, min(start + batch_size, rows.stop))
        batch = list(read_pixels(model, shards, part))
        own_captions += [captions for _, captions in batch]
        if batch:
            vectors.append(embed_pixels(model, [pixels for pixels, _ in batch]))
    captions_of = [captions for part in world.collect(own_captions) for captions in part]
    captions = [caption for captions in captions_of for caption in captions]
    if not captions:
        raise DataError(f"{shards.location} holds no captioned pictures to evaluate on")
    own = _own_rows(len(captions), _TEXT_BATCH, world)
    texts = embed_texts(model, captions[own.start : own.stop], _TEXT_BATCH)
    return Gallery(
        _gather(np.concatenate(vectors), world),
        _gather(texts, world),
        captions,
        np.repeat(np.arange(len(captions_of)), [len(captions) for captions in captions_of]),
    )


def _own_rows(count: int, batch_size: int, world: World) -> range:
    """This rank's part, in whole batches."""
    batches = -(-count // batch_size)
    own = range(batches)[world.stripe(batches)]
    return range(own.start * batch_size, min(own.stop * batch_size, count))


def _no_rows(model: Model) -> np.ndarray:
    return np.empty((0, model.embed_dim), np.float32)


def _gather(rows: np.ndarray, world: World) -> np.ndarray:
    counts = world.exchange(len(rows))[:, 0].tolist()
    return world.gather(torch.from_numpy(rows), counts).numpy()


def read_pixels(
    model: Model, shards: ShardSet, rows: range | None = None
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Each good picture, (3, H, W) uint8 at the model's size, and its captions; all, or of rows."""
    for i in range(len(shards)) if rows is None else rows:
        try:
            sample = shards.read(i)
            picture = decode(sample.image, model.transform)
        except (ImageError, SampleError) as error:
            logger.warning("left out of the evaluation: %s: %s", ":".join(shards.key(i)), error)
            continue
        yield model.transform.resize(picture), list(clean_captions(sample.captions))
