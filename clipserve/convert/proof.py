"""Whether what was exported is our model: the cosines of pictures and texts, in float32.

The pictures and texts are made here, so that a model can be held against its copy without data.
Networks without training give all pictures nearly the same vector, of which a cosine says nothing;
so differences are held against the spread of the vectors, too. What is prepared otherwise there by
design is held against the picture that theirs must see (`prove_others`).

Legend: N pictures or texts, E embedding.
"""

import io
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from clipserve.errors import CheckpointError
from clipserve.model import Model

T = TypeVar("T")
Embed = Callable[[list[bytes]], np.ndarray]
"""Files of pictures -> (N, E), of any length"""

LEAST_COSINE = 0.99999
_MOST_DRIFT = 0.05
"""of the spread; a picture cut one pixel beside is past it"""
_NOISE = 1e-5
"""what float32 leaves of a unit vector"""
TEXTS = [
    "a photo of a cat",
    "Two dogs, 3 birds & a fish's pond!",
    "red leather shoes (size 42), worn once",
    "na\u00efve cafe\u0301, \u00fcber alles",
    "\u6771\u4eac\uff0c in the rain",
    "the dog\u2019s \u201cball\u201d &amp; \ufb01ne toys",
    "x",
    "",
    "a long caption about many things, " * 30,
]


class Proof(NamedTuple):
    """The least cosines between ours and theirs."""

    images: float
    texts: float

    def __str__(self) -> str:
        return f"least cosine: pictures {self.images:.7f}, texts {self.texts:.7f}"


class Other(NamedTuple):
    """A picture that is prepared otherwise there."""

    what: str
    data: bytes
    seen: Image.Image
    """what ours must be given for their vector"""


def prove(model: Model, images: Embed, texts: Callable[[list[str]], np.ndarray]) -> Proof:
    """Embed pictures and texts here and there, one alone and many together.

    Raises CheckpointError if a cosine is below LEAST_COSINE, or a difference large for these
    vectors.
    """
    pictures = probe_pictures(model.transform.size[1])
    with torch.inference_mode():
        own_texts = model.encode_text(model.tokenizer(TEXTS).ids).numpy()
        return Proof(
            _compare("pictures", model.embed_images(pictures), _one_and_many(images, pictures)),
            _compare("texts", own_texts, _one_and_many(texts, TEXTS)),
        )


def prove_others(model: Model, images: Embed, others: list[Other]) -> list[str]:
    """A line for each with the cosine to ours. CheckpointError unless theirs sees what is said."""
    notes = []
    with torch.inference_mode():
        for what, data, seen in others:
            theirs = images([data])
            _compare(what, model.embed_images([seen]), theirs)
            notes.append(f"{what}; cosine {least_cosine(model.embed_images([data]), theirs):.5f}")
    return notes


def _one_and_many(embed: Callable[[list[T]], np.ndarray], inputs: list[T]) -> np.ndarray:
    return np.concatenate([embed(inputs[:1]), embed(inputs[1:])])


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The least cosine of two (N, E). CheckpointError if they are not the same."""
    if ours.shape != theirs.shape:
        raise CheckpointError(f"what was written gives {what} {theirs.shape}, not {ours.shape}")
    cosine, a = least_cosine(ours, theirs), _units(ours)
    drift = float(np.linalg.norm(a - _units(theirs), axis=1).max())
    spread = float(np.linalg.norm(a - a.mean(axis=0), axis=1).mean())
    allowed = _NOISE + _MOST_DRIFT * spread if len(a) > 1 else np.inf
    if not (cosine >= LEAST_COSINE and drift <= allowed):  # so that a NaN is neither
        raise CheckpointError(
            f"what was written does not embed as this model does, and is removed: {what}, least"
            f" cosine {cosine:.7f}, where {LEAST_COSINE} is wanted; difference {drift:.2g}, where"
            f" the vectors spread by {spread:.2g}. The model is as it was: export it --to another"
            " form"
        )
    return cosine


def _units(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Over the rows of two (N, E)."""
    return float((_units(ours) * _units(theirs)).sum(axis=1).min())


def probe_pictures(side: int) -> list[bytes]:
    """PNGs and JPEGs, larger and smaller than the network's input, upright and lying; the shorter
    side made `side`, a surplus of 0, 1 or 2 more than a multiple of 4 is cut off."""
    sizes = [(side, side), (2 * side, side), (side, 3 * side), (side // 2, side // 2)]
    sizes += [(side + 1, side), (side, side + 2), (side + 4, side), (3 * side // 2, 3 * side // 2)]
    sizes += [(2 * side + 2, 2 * side), (3 * side, 3 * side + 6)]
    return [draw(size, seed, "JPEG" if seed % 2 else "PNG") for seed, size in enumerate(sizes)]


def large_jpeg(side: int) -> Other:
    """Which ours decodes at a fraction of its size, others whole."""
    width = max(1024, 4 * side)
    data = draw((width, width), 0, "JPEG")
    what = f"JPEGs as large as {width}x{width}: ours are decoded at a fraction of their size"
    return Other(what, data, Image.open(io.BytesIO(data)))


def shifted_picture(side: int) -> Other:
    """Whose surplus of three pixels transformers cuts otherwise: 1 before the middle, not 2."""
    data = draw((side + 3, side), 0, "PNG")
    what = "pictures of which 3, 7, 11, ... pixels are cut off: theirs are cut one pixel beside"
    return Other(what, data, Image.open(io.BytesIO(data)).crop((1, 0, 1 + side, side)))


def draw(size: tuple[int, int], seed: int, form: str) -> bytes:
    """The file of a picture, coarse with some grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels += random.integers(-20, 21, (*pixels.shape[:2], 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, form, quality=95)
    return buffer.getvalue()
