"""Untrusted bytes -> a checked, upright RGB picture, and from it a thumbnail.

Start at `decode_image`. Everything that can be refused is refused from the header, before a pixel
is decoded. What a network is fed comes from decoding.py, faster.
"""

import errno
import io
import re
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image

from clipserve.errors import ImageError
from clipserve.transforms import THUMBNAIL_SIDE
from clipserve.transforms import Crop as Crop
from clipserve.transforms import ImageTransform as ImageTransform
from clipserve.transforms import TrainTransform as TrainTransform

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened; Pillow's other, less tested decoders are never reached."""

ImageSource = str | Path | bytes | Image.Image
"""What public functions accept as a picture: a path, the bytes of a file, or a PIL image."""

# What makes a picture upright, by the EXIF orientation of its file; 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise on damaged files, found by fuzzing; memory and interrupts pass.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost. Checked from the file's size and header, before decoding."""

    max_bytes: int = 50 * 2**20
    max_pixels: int = 64_000_000
    max_aspect: float = 100.0
    """longer side over shorter side; resizing the shorter side blows the longer one up"""


DEFAULT_LIMITS = ImageLimits()

_MAX_SCANS = 100
_SCANS_OF_LARGEST = 24
"""a decoder goes over the whole JPEG for each scan, which may have a few bytes; usual are 10, 18 of
CMYK"""
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""of what has a length, and of the end; within a scan only such a marker ends it"""
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_ROWS_AT_ONCE = 256


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB picture from the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file.

    Transparency is laid over white, EXIF orientation applied, CMYK, palette and 16-bit converted;
    of an animation the first frame counts. Raises ImageError, whose message holds neither the data
    nor an address.
    """
    picture = _decode(data, limits)
    try:
        return to_rgb(_turn_upright(picture))
    except _DECODER_ERRORS:
        raise ImageError(f"damaged {picture.format} picture") from None


def open_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """`decode_image` for a path, bytes, or a PIL image. Raises ImageError, naming a path."""
    if not isinstance(source, Image.Image):
        return decode_file(source, lambda data: decode_image(data, limits), limits)
    _check_size(source.size, limits)
    try:
        return to_rgb(_turn_upright(source))
    except _DECODER_ERRORS:
        raise ImageError("damaged or truncated picture") from None


def decode_file(source: str | Path | bytes, decode: Callable[[bytes], T], limits: ImageLimits) -> T:
    """`decode` of the bytes, or of the file's at that path. Raises ImageError, naming a path."""
    if isinstance(source, bytes):
        return decode(source)
    try:
        data = read_limited(Path(source), limits.max_bytes)
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror or 'cannot be read'}") from None
    try:
        return decode(data)
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from None


def check_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    """Decode fully and forget the pixels; returns the format, one of FORMATS. Raises ImageError."""
    return _decode(data, limits).format or ""


def to_png(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The picture as an RGB PNG, for readers that know fewer formats. Raises ImageError."""
    buffer = io.BytesIO()
    decode_image(data, limits).save(buffer, format="PNG")
    return buffer.getvalue()


def make_thumbnail(picture: Image.Image) -> bytes:
    """A JPEG of at most 256x256 pixels, from an RGB picture, which stays as it is."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def read_limited(path: Path, max_bytes: int) -> bytes:
    """A regular file's bytes, but never more than one past `max_bytes`. Raises OSError.

    A pipe or a device, which could block or never end, is refused.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, transparency over white, more than 8 bits a channel scaled down."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        return _scale_to_8_bits(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        if picture.mode != "RGBA" or "transparency" in picture.info:
            picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")


def read_header(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture with its size checked, before any pixel is decoded. Raises ImageError."""
    if len(data) > limits.max_bytes:
        raise ImageError(f"picture has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    if not data:
        raise ImageError("picture is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:  # Pillow's own limit, which ours usually undercuts
        raise ImageError(
            f"picture of over {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels;"
            f" at most {limits.max_pixels} pixels are allowed"
        ) from None
    except _DECODER_ERRORS:
        raise ImageError(f"not a picture in a supported format ({', '.join(FORMATS)})") from None
    _check_size(picture.size, limits)
    if picture.format in ("JPEG", "MPO"):
        _check_scans(data, picture.size, limits)
    return picture


def read_orientation(picture: Image.Image) -> int:
    """How the camera was held, 1 (upright) to 8, as EXIF counts. Raises ImageError."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        raise ImageError("picture with damaged EXIF data") from None
    return orientation if orientation in _TURNS else 1


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    picture = read_header(data, limits)
    try:
        picture.load()
    except _DECODER_ERRORS:
        raise ImageError(f"damaged or truncated {picture.format} picture") from None
    return picture


def _turn_upright(picture: Image.Image) -> Image.Image:
    picture.load()  # some formats hold their EXIF data behind the pixels
    turn = _TURNS.get(read_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _scale_to_8_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey is 0..65535; of float and 32-bit pictures the own range is taken."""
    values = np.asarray(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and values.max(initial=0) <= 65535):
        low, high = np.float32(0), np.float32(65535)
    else:
        low, high = np.float32(np.nanmin(values)), np.float32(np.nanmax(values))
    scaled = np.zeros(values.shape, np.uint8)
    if high > low:
        for i in range(0, len(values), _ROWS_AT_ONCE):  # whole, it would take 20 bytes a pixel
            rows = (values[i : i + _ROWS_AT_ONCE].astype(np.float32) - low) * (255 / (high - low))
            scaled[i : i + _ROWS_AT_ONCE] = np.nan_to_num(rows).clip(0, 255).round()
    return Image.fromarray(scaled)


def _check_scans(data: bytes, size: tuple[int, int], limits: ImageLimits) -> None:
    allowed = min(_MAX_SCANS, _SCANS_OF_LARGEST * limits.max_pixels // (size[0] * size[1]))
    if data.count(_SCAN) <= allowed:  # anywhere, so there are no more
        return
    scans = _count_scans(data)
    if scans > allowed:
        raise ImageError(
            f"JPEG of {size[0]}x{size[1]} pixels in {scans} scans; at most {allowed} are allowed"
            " at this size"
        )


def _count_scans(data: bytes) -> int:
    """Of the first picture of a file, as a decoder walks it: other files, films for one, may lie
    within its segments or behind its end."""
    scans, place = 0, 2
    while (found := _MARKER.search(data, place)) is not None and found[0] != _END:
        scans += found[0] == _SCAN
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        place = found.end() + max(2, length)
    return scans


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"picture of {width}x{height} pixels has no content")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"picture of {width}x{height} pixels; at most {limits.max_pixels} pixels are allowed"
        )
    if max(size) / min(size) > limits.max_aspect:
        raise ImageError(
            f"picture of {width}x{height} pixels; the longer side may be at most"
            f" {limits.max_aspect:g} times the shorter"
        )
