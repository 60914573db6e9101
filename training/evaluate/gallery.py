"""The captioned pictures of shards as vectors, for every task to share. See `embed_shards`."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clipserve.decoding import decode
from clipserve.embed import batched, embed_pixels, embed_texts
from clipserve.errors import DataError, ImageError, SampleError
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.sources import clean_captions

logger = logging.getLogger(__name__)


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


def embed_shards(model: Model, shards: ShardSet, batch_size: int = 128) -> Gallery:
    """All pictures and captions; DataError if there are none.

    A picture that does not decode is left out with a warning.
    """
    images, captions, text_of = [], [], []
    row = 0
    for batch in batched(read_pixels(model, shards), batch_size):
        images.append(embed_pixels(model, [pixels for pixels, _ in batch]))
        for _, texts in batch:
            captions += texts
            text_of += [row] * len(texts)
            row += 1
    if not captions:
        raise DataError(f"{shards.location} holds no captioned pictures to evaluate on")
    return Gallery(
        np.concatenate(images), embed_texts(model, captions), captions, np.array(text_of)
    )


def read_pixels(model: Model, shards: ShardSet) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Each good picture, (3, H, W) uint8 at the model's size, and its captions."""
    for i in range(len(shards)):
        try:
            sample = shards.read(i)
            picture = decode(sample.image, model.transform)
        except (ImageError, SampleError) as error:
            logger.warning("left out of the evaluation: %s: %s", ":".join(shards.key(i)), error)
            continue
        yield model.transform.resize(picture), list(clean_captions(sample.captions))
