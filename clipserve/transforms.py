"""Upright RGB pictures -> the network's input; train and inference transforms side by side.

The inference transform gives open_clip's pixels, bit for bit (held by a test), but for a picture
that was decoded at a fraction of its size (decoding.py). The train transform differs from it by a
random crop alone.

Legend: B batch, H height, W width.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipserve.errors import ConfigError

THUMBNAIL_SIDE = 256
"""most pixels of a thumbnail's longer side; a picture decoded for a network serves for it too"""


_CHOICES = {
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}


class Decoded(NamedTuple):
    """An upright RGB picture, maybe decoded at a fraction of its size."""

    picture: Image.Image
    """each side is the whole one over `reduction`, rounded up"""
    size: tuple[int, int]
    """width, height of the whole picture"""
    reduction: int = 1


@dataclass(frozen=True)
class ImageTransform:
    """The inference transform: resize, crop, normalise. Travels in every model directory.

    The fields are open_clip's `preprocess_cfg`.
    """

    size: tuple[int, int] = (224, 224)
    """height, width of the network's input"""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0
    """grey level of the border when `longest` leaves one"""

    @classmethod
    def from_open_clip(cls, config: dict[str, Any]) -> Self:
        """From a `preprocess_cfg`; keys this version does not know are an error."""
        known = dict(config)
        if known.pop("mode", "RGB") != "RGB":
            raise ConfigError(f"image mode {config['mode']!r} is not supported; only RGB is")
        size = known.pop("size", 224)
        known["size"] = (size, size) if isinstance(size, int) else tuple(size)
        known["mean"] = tuple(known.get("mean", cls.mean))
        known["std"] = tuple(known.get("std", cls.std))
        if known.get("interpolation") == "random":  # open_clip: bicubic at inference
            known["interpolation"] = "bicubic"
        try:
            transform = cls(**known)
        except TypeError as error:
            raise ConfigError(f"preprocess_cfg: {error}") from None
        transform._check()
        return transform

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"preprocess_cfg.{name} = {getattr(self, name)!r}; known: {', '.join(choices)}"
                )
        for name, kind, count in (
            ("size", int, 2),
            ("mean", int | float, 3),
            ("std", int | float, 3),
        ):
            values = getattr(self, name)
            if len(values) != count or not all(isinstance(value, kind) for value in values):
                raise ConfigError(f"preprocess_cfg.{name} = {values!r}; {count} numbers are wanted")

    def to_open_clip(self) -> dict[str, Any]:
        """As a `preprocess_cfg` table of open_clip."""
        table = asdict(self) | {"mode": "RGB"}
        height, width = self.size
        table["size"] = height if height == width else [height, width]
        return table

    def __call__(self, picture: Image.Image) -> Tensor:
        """(3, H, W) float32, normalised, from an RGB picture."""
        return self.normalize(torch.from_numpy(self.resize(picture))[None])[0]

    def resize(self, picture: Image.Image | Decoded) -> np.ndarray:
        """(3, H, W) uint8 from an upright RGB picture."""
        decoded = picture if isinstance(picture, Decoded) else Decoded(picture, picture.size)
        size = self._resized_size(decoded.size)
        resized = _resize(decoded, size, self.interpolation)
        fill = self.fill_color if self.resize_mode == "longest" else 0
        return _channels_first(_pad_and_crop(resized, self.size, fill))

    def reduction(self, size: tuple[int, int]) -> int:
        """How many times smaller a JPEG of this width and height may be decoded: 8, 4, 2 or 1.

        It is still at least twice the result, and on its longer side twice a thumbnail.
        """
        for_network = _largest_reduction(size, self._resized_size(size))
        return min(for_network, _largest_reduction((max(size),), (THUMBNAIL_SIDE,)))

    def _resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height before the borders are cut or added, as open_clip rounds them."""
        (width, height), (to_height, to_width) = size, self.size
        if self.resize_mode == "squash":
            return to_width, to_height
        if self.resize_mode == "longest":
            ratio = max(height / to_height, width / to_width)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if to_height == to_width:  # as torchvision's Resize(int): the longer side is cut
            longer = int(to_height * max(size) / min(size))
            return (to_width, longer) if width <= height else (longer, to_height)
        ratio = min(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32: to [0, 1], minus mean, over std."""
        mean = pixels.new_tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = pixels.new_tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        # In place: four times less memory to touch, which is what this costs.
        return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


class Crop(NamedTuple):
    """A rectangle of an upright picture, in its pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class TrainTransform:
    """A random crop, resized to the network's input (torchvision's RandomResizedCrop).

    With scale (1, 1) it is the inference transform, exactly. Of a large picture the crop lies on
    a grid of 2, 4 or 8 pixels, half a pixel of the result at most, so that a JPEG decoded at a
    fraction of its size can be cut at the same place (training/decoding.py).
    """

    inference: ImageTransform
    scale: tuple[float, float]
    ratio: tuple[float, float]

    @property
    def crops(self) -> bool:
        """False if every picture passes through the inference transform instead."""
        return self.scale != (1.0, 1.0)

    def resize(self, picture: Image.Image, random: np.random.Generator) -> np.ndarray:
        """(3, H, W) uint8; the crop depends on the picture's size and on `random` alone."""
        if not self.crops:
            return self.inference.resize(picture)
        return self.resize_crop(picture, self.draw_crop(picture.size, random))

    def resize_crop(self, picture: Image.Image, crop: Crop) -> np.ndarray:
        """(3, H, W) uint8 of this part of an RGB picture."""
        left, top, width, height = crop
        part = picture.crop((left, top, left + width, top + height))
        filter = _filter(self.inference.interpolation)
        return _channels_first(np.asarray(part.resize(self.inference.size[::-1], filter)))

    def draw_crop(self, size: tuple[int, int], random: np.random.Generator) -> Crop:
        """A crop of a picture of this width and height, on its grid."""
        left, top, width, height = self._draw_free_crop(size, random)
        grid = self.reduction(width, height)
        return Crop(*(side // grid * grid for side in (left, top, width, height)))

    def reduction(self, width: int, height: int) -> int:
        """The largest of 8, 4, 2, 1 that leaves a crop at least twice the result's size."""
        return _largest_reduction((width, height), self.inference.size[::-1])

    def _draw_free_crop(
        self, size: tuple[int, int], random: np.random.Generator
    ) -> tuple[int, int, int, int]:
        full_width, full_height = size
        low, high = self.scale
        log_low, log_high = (math.log(bound) for bound in self.ratio)
        draw = random.random  # ten times as quick as uniform() and integers()
        for _ in range(10):
            area = full_width * full_height * (low + (high - low) * draw())
            ratio = math.exp(log_low + (log_high - log_low) * draw())
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= full_width and 0 < height <= full_height:
                left = int((full_width - width + 1) * draw())
                top = int((full_height - height + 1) * draw())
                return left, top, width, height
        # No such box fits, as in a thin picture: the largest centred one of an allowed ratio.
        ratio = min(max(full_width / full_height, self.ratio[0]), self.ratio[1])
        width = min(full_width, round(full_height * ratio))
        height = min(full_height, round(full_width / ratio))
        return (full_width - width) // 2, (full_height - height) // 2, width, height


def resample(
    pixels: np.ndarray, size: tuple[int, int], mode: str, extent: tuple[float, float]
) -> np.ndarray:
    """(H, W, 3) uint8 -> of this width and height, by torch's vector instructions, five times as
    fast as Pillow and antialiased alike.

    Only `extent` of the pixels counts, from the left and the top: a reduced picture's last column
    may be there in part. To half the size or less, drawings differ from Pillow's by 2 levels of 255
    at most, photos by 1 in 1 % of the values. On x86 it takes no other thread than the caller's.
    """
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    # A hair more than the quotient, for torch rounds the size of the result down.
    width, height = (math.nextafter(to / of, math.inf) for to, of in zip(size, extent, strict=True))
    resized = F.interpolate(batch, scale_factor=(height, width), mode=mode, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()  # (H, W, 3)


def _resize(decoded: Decoded, size: tuple[int, int], mode: str) -> np.ndarray:
    """(H, W, 3) of this width and height. The whole picture, for Pillow, asked for a part by `box`,
    may take its two passes in another order, which changes values by up to 20 levels."""
    picture, (width, height), reduction = decoded
    if reduction > 1:
        return resample(np.array(picture), size, mode, (width / reduction, height / reduction))
    return np.asarray(picture.resize(size, _filter(mode)) if size != picture.size else picture)


def _largest_reduction(size: tuple[int, ...], to: tuple[int, ...]) -> int:
    """The largest of 8, 4, 2, 1 that leaves each side at least twice that of the result."""
    for reduction in (8, 4, 2):
        if all(side >= 2 * to_side * reduction for side, to_side in zip(size, to, strict=True)):
            return reduction
    return 1


def _filter(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (3, H, W)


def _pad_and_crop(pixels: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """Cut the centre out, after padding a side that is too short; rounding as in open_clip."""
    missing = [max(to - side, 0) for to, side in zip(size, pixels.shape, strict=False)]
    if any(missing):
        borders = [(side // 2, side - side // 2) for side in missing]
        pixels = np.pad(pixels, [*borders, (0, 0)], constant_values=fill)
    top, left = (round((pixels.shape[axis] - size[axis]) / 2) for axis in (0, 1))
    return pixels[top : top + size[0], left : left + size[1]]
