"""Image-text retrieval on shards: captions search the pictures, pictures the captions."""

import logging
from collections.abc import Iterator

import numpy as np

from clipserve.embed import batched, embed_pixels, embed_texts
from clipserve.errors import DataError, ImageError, SampleError
from clipserve.images import decode_image
from clipserve.metrics import retrieval
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.sources import clean_captions

logger = logging.getLogger(__name__)


def embed_shards(
    model: Model, shards: ShardSet, batch_size: int = 128
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Unit vectors of all pictures (N, E) and captions (M, E), the captions, and their rows in N.

    A picture that does not decode is left out with a warning; DataError if none is left.
    """
    images, captions, text_of = [], [], []
    row = 0
    for batch in batched(_pixels(model, shards), batch_size):
        images.append(embed_pixels(model, [pixels for pixels, _ in batch]))
        for _, texts in batch:
            captions += texts
            text_of += [row] * len(texts)
            row += 1
    if not captions:
        raise DataError(f"{shards.location} holds no captioned pictures to evaluate on")
    return np.concatenate(images), embed_texts(model, captions), captions, np.array(text_of)


def evaluate_retrieval(model: Model, shards: ShardSet, prefix: str = "") -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways over the whole set; keys as in `clipserve.metrics`."""
    images, texts, _, text_of = embed_shards(model, shards)
    return retrieval(images, texts, text_of, prefix)


def _pixels(model: Model, shards: ShardSet) -> Iterator[tuple[np.ndarray, list[str]]]:
    for i in range(len(shards)):
        try:
            sample = shards.read(i)
            picture = decode_image(sample.image)
        except (ImageError, SampleError) as error:
            logger.warning("left out of the evaluation: %s: %s", ":".join(shards.key(i)), error)
            continue
        yield model.transform.resize(picture), list(clean_captions(sample.captions))
