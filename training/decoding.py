"""The hot path of training: the bytes of a picture -> a random crop at the network's size.

`decode_crop` gives what `TrainTransform.resize(decode_image(data), random)`, the exact path, gives:
the same crop from the same random numbers, and an ImageError for the same files. Only the pixels
of JPEGs differ by a little, and come two to four times as fast: libjpeg-turbo decodes a large one
at 1/2, 1/4 or 1/8 of its size, never below twice that of the result, and torch resizes with vector
instructions. All else, and every file that is in any way odd, takes the exact path.

The tolerance, in 8-bit levels, held by tests: of photos the mean difference is at most 1, 99.9 % of
the pixels are within 5 and all within 24; of hard black and white patterns finer than the pixels of
the result the mean is at most 4 and all are within 48. Ways compared: benchmarks/decoding.py.

Legend: H height, W width.
"""

import numpy as np
import simplejpeg
import torch
from torch.nn import functional as F

from clipserve.images import (
    DEFAULT_LIMITS,
    Crop,
    ImageLimits,
    TrainTransform,
    decode_image,
    read_header,
    read_orientation,
)


def decode_crop(
    data: bytes,
    transform: TrainTransform,
    random: np.random.Generator,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """(3, H, W) uint8: a random crop of the upright picture. Raises ImageError."""
    header = read_header(data, limits)
    # Else CMYK, or several pictures in one file.
    if not transform.crops or header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return transform.resize(decode_image(data, limits), random)
    orientation = read_orientation(header)
    size = header.size if orientation < 5 else header.size[::-1]
    crop = transform.draw_crop(size, random)
    reduction = _usable_reduction(transform, crop, header.size, orientation)
    pixels = _decode_reduced(data, header.size, reduction)
    if pixels is None:
        return transform.resize_crop(decode_image(data, limits), crop)
    left, top, width, height = (side // reduction for side in crop)
    part = _turn_upright(pixels, orientation)[top : top + height, left : left + width]
    return _resize(part, transform)


def _usable_reduction(
    transform: TrainTransform, crop: Crop, size: tuple[int, int], orientation: int
) -> int:
    """The reduction on whose grid the crop lies."""
    reduction = transform.reduction(crop.width, crop.height)
    # A turned picture counts from its other edge, where the grid may end within a cell.
    if orientation != 1 and any(side % reduction for side in size):
        return 1
    return reduction


def _decode_reduced(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """(H, W, 3) uint8, at 1/`reduction`; None where libjpeg-turbo has as much as a warning."""
    width, height = (-(-side // reduction) for side in size)
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view on (H, W, 3), turned as EXIF's orientation says (5 to 8 swap H and W)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _resize(pixels: np.ndarray, transform: TrainTransform) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H, W) at the result's size, as Pillow would to within one level."""
    # Channels last, as torch sees it: the layout its vector instructions are written for.
    batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    resized = F.interpolate(
        batch, transform.inference.size, mode=transform.inference.interpolation, antialias=True
    )
    return resized[0].contiguous().numpy()
