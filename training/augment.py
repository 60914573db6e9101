"""Augmented views of a picture, for image self-supervision. Start at `ViewTransform`.

SimCLR's recipe (arXiv:2002.05709, appendix A) with SLIP's numbers (facebookresearch/SLIP 8ca728a,
main.py): crop, flip, colour jitter, grey, blur. Pillow does the work, in C, on what is loaded
anyway; its colours are torchvision's, bit for bit, and both are held together by a test.

Legend: H height, W width.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from clipserve.images import DEFAULT_LIMITS, ImageLimits, TrainTransform
from training.decoding import decode_crop

_BLUR_SIDE = 224
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class ViewTransform:
    """One random view of an encoded picture. With all probabilities 0 it is the crop alone.

    Everything is drawn from the generator given, so the same generator gives the same view.
    """

    crop: TrainTransform
    """SLIP crops 0.08 to 1 of the area"""
    flip: float = 0.5
    """probability of left and right changing places"""
    jitter: float = 0.8
    """probability of other colours"""
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """largest change of brightness, contrast and saturation, as factors 1 - s to 1 + s, and of hue,
    as part of the colour circle"""
    grey: float = 0.2
    """probability of no colours"""
    blur: float = 0.5
    """probability of a Gaussian blur"""
    sigma: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur in pixels of a 224-pixel picture; in proportion for others"""

    def __call__(
        self, data: bytes, random: np.random.Generator, limits: ImageLimits = DEFAULT_LIMITS
    ) -> np.ndarray:
        """(3, H, W) uint8 at the network's size. Raises ImageError."""
        pixels = decode_crop(data, self.crop, random, limits)
        picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        if random.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if random.random() < self.jitter:
            picture = jitter_colours(picture, self.strengths, random)
        if random.random() < self.grey:
            picture = picture.convert("L").convert("RGB")
        if random.random() < self.blur:
            sigma = random.uniform(*self.sigma) * min(picture.size) / _BLUR_SIDE
            picture = picture.filter(ImageFilter.GaussianBlur(sigma))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))  # (3, H, W)


def jitter_colours(
    picture: Image.Image,
    strengths: tuple[float, float, float, float],
    random: np.random.Generator,
) -> Image.Image:
    """Brightness, contrast, saturation and hue changed by random amounts, in a random order."""
    for kind in random.permutation(len(strengths)).tolist():
        strength = strengths[kind]
        if kind < len(_ENHANCERS):
            factor = random.uniform(max(0.0, 1 - strength), 1 + strength)
            picture = _ENHANCERS[kind](picture).enhance(factor)
        else:
            picture = turn_hue(picture, random.uniform(-strength, strength))
    return picture


def turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Move every colour by `turn`, -0.5 to 0.5, round the colour circle."""
    steps = int(turn * 255)
    if not steps:  # there and back would only round
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
