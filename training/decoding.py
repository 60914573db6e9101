"""The hot path of training: the bytes of a picture -> a random crop at the network's size.

`decode_crop` gives what `TrainTransform.resize(decode_image(data), random)`, the exact path, gives:
the same crop from the same random numbers, and an ImageError for the same files. Only the pixels
of JPEGs differ by a little, and come two to four times as fast: libjpeg-turbo decodes a large one
at 1/2, 1/4 or 1/8 of its size, never below twice that of the result, and torch resizes with vector
instructions (clipserve/decoding.py, which inference shares). All else, and every file that is in
any way odd, takes the exact path.

The tolerance, in 8-bit levels, held by tests: of photos the mean difference is at most 1, 99.9 % of
the pixels are within 5 and all within 24; of hard black and white patterns finer than the pixels of
the result the mean is at most 4 and all are within 48. Ways compared: benchmarks/decoding.py.

Legend: H height, W width.
"""

import numpy as np

from clipserve.decoding import decode_jpeg, plain_orientation, turn_upright, usable_reduction
from clipserve.images import DEFAULT_LIMITS, ImageLimits, decode_image, read_header
from clipserve.transforms import TrainTransform, resample


def decode_crop(
    data: bytes,
    transform: TrainTransform,
    random: np.random.Generator,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """(3, H, W) uint8: a random crop of the upright picture. Raises ImageError."""
    header = read_header(data, limits)
    orientation = plain_orientation(header)
    if not transform.crops or not orientation:
        return transform.resize(decode_image(data, limits), random)
    size = header.size if orientation < 5 else header.size[::-1]
    crop = transform.draw_crop(size, random)
    reduction = transform.reduction(crop.width, crop.height)
    reduction = usable_reduction(reduction, header.size, orientation)
    pixels = decode_jpeg(data, header.size, reduction)
    if pixels is None:
        return transform.resize_crop(decode_image(data, limits), crop)
    left, top, width, height = (side // reduction for side in crop)
    part = turn_upright(pixels, orientation)[top : top + height, left : left + width]
    to_size = transform.inference.size[::-1]
    resized = resample(part, to_size, transform.inference.interpolation, (width, height))
    return np.ascontiguousarray(resized.transpose(2, 0, 1))  # (3, H, W)
