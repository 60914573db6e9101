"""Whether what was exported is our model: the cosines of pictures and texts, in float32.

The pictures and texts are made here, so that a model can be held against its copy without data.

Legend: N pictures or texts, E embedding.
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from clipserve.errors import CheckpointError
from clipserve.model import Model

LEAST_COSINE = 0.99999
TEXTS = [
    "a photo of a cat",
    "Two dogs, 3 birds & a fish's pond!",
    "red leather shoes (size 42), worn once",
    "na\u00efve caf\u00e9, \u00fcber alles",
    "\u6771\u4eac in the rain",
    "x",
    "a long caption about many things, " * 30,
]


class Proof(NamedTuple):
    """The least cosines between ours and theirs."""

    images: float
    texts: float

    def __str__(self) -> str:
        return f"least cosine: pictures {self.images:.7f}, texts {self.texts:.7f}"


def prove(
    model: Model,
    images: Callable[[list[bytes]], np.ndarray],
    texts: Callable[[list[str]], np.ndarray],
) -> Proof:
    """Embed pictures and texts here and there; both callables give (N, E), of any length.

    Raises CheckpointError if a cosine is below LEAST_COSINE.
    """
    pictures = probe_pictures(model.transform.size[1])
    with torch.inference_mode():
        own_texts = model.encode_text(model.tokenizer(TEXTS).ids).numpy()
        proof = Proof(
            least_cosine(model.embed_images(pictures), images(pictures)),
            least_cosine(own_texts, texts(TEXTS)),
        )
    if not min(proof) >= LEAST_COSINE:
        raise CheckpointError(
            f"what was written does not embed as this model does, and is removed: {proof}, where"
            f" {LEAST_COSINE} is wanted"
        )
    return proof


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over the rows of two (N, E)."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).min())


def probe_pictures(side: int) -> list[bytes]:
    """PNGs and JPEGs, larger and smaller than the network's input, upright and lying."""
    sizes = [(side, side), (2 * side, side), (side, 3 * side), (side // 2, side // 2)]
    sizes += [(side + 4, side), (3 * side // 2, 3 * side // 2)]
    return [_draw(size, seed, "JPEG" if seed % 2 else "PNG") for seed, size in enumerate(sizes)]


def shifted_picture(side: int) -> bytes:
    """One whose surplus of three pixels transformers cuts otherwise: 1 before the middle, not 2."""
    return _draw((side + 3, side), 0, "PNG")


def _draw(size: tuple[int, int], seed: int, form: str) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=95)
    return buffer.getvalue()
