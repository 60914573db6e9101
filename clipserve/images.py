"""Untrusted bytes -> checked RGB picture -> tensor; train and inference transforms side by side.

Start at `decode_image`. Everything that can be refused is refused from the header, before a pixel
is decoded. The inference transform gives the same pixels as open_clip's (bit for bit, held by a
test); the train transform differs from it by a random crop alone.

Legend: B batch, H height, W width.
"""

import errno
import io
import math
import stat
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from clipserve.errors import ConfigError, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened; Pillow's other, less tested decoders are never reached."""

ImageSource = str | Path | bytes | Image.Image
"""What public functions accept as a picture: a path, the bytes of a file, or a PIL image."""

_THUMBNAIL_SIDE = 256

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
    if isinstance(source, bytes):
        return decode_image(source, limits)
    if isinstance(source, Image.Image):
        _check_size(source.size, limits)
        try:
            return to_rgb(_turn_upright(source))
        except _DECODER_ERRORS:
            raise ImageError("damaged or truncated picture") from None
    try:
        data = read_limited(Path(source), limits.max_bytes)
    except OSError as error:
        raise ImageError(f"{source}: {error.strerror or 'cannot be read'}") from None
    try:
        return decode_image(data, limits)
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
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
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
    values = np.asarray(picture, dtype=np.float32)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and values.max(initial=0) <= 65535):
        low, high = 0.0, 65535.0
    else:
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray(np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8))


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


@dataclass(frozen=True)
class ImageTransform:
    """The inference transform: resize, crop, normalise. Travels in every model directory.

    The fields are open_clip's `preprocess_cfg`, and so are the pixels that come out.
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
            return cls(**known)
        except TypeError as error:
            raise ConfigError(f"preprocess_cfg: {error}") from None

    def to_open_clip(self) -> dict[str, Any]:
        """As a `preprocess_cfg` table of open_clip."""
        table = asdict(self) | {"mode": "RGB"}
        height, width = self.size
        table["size"] = height if height == width else [height, width]
        return table

    def __call__(self, picture: Image.Image) -> Tensor:
        """(3, H, W) float32, normalised, from an RGB picture."""
        return self.normalize(torch.from_numpy(self.resize(picture))[None])[0]

    def resize(self, picture: Image.Image) -> np.ndarray:
        """(3, H, W) uint8 from an RGB picture."""
        height, width = self.size
        filter = self._filter
        if self.resize_mode == "squash":
            return _to_array(picture.resize((width, height), filter))
        if self.resize_mode == "longest":
            ratio = max(picture.height / height, picture.width / width)
            size = (max(1, round(picture.width / ratio)), max(1, round(picture.height / ratio)))
            return _to_array(
                _pad_and_crop(picture.resize(size, filter), self.size, self.fill_color)
            )
        if height == width:  # as torchvision's Resize(int): the longer side is cut to an integer
            short, long = sorted(picture.size)
            scaled = (height, int(height * long / short))
            size = scaled if picture.width <= picture.height else scaled[::-1]
        else:
            ratio = min(picture.height / height, picture.width / width)
            size = (round(picture.width / ratio), round(picture.height / ratio))
        if size != picture.size:
            picture = picture.resize(size, filter)
        return _to_array(_pad_and_crop(picture, self.size, 0))

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> float32: to [0, 1], minus mean, over std."""
        mean = pixels.new_tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = pixels.new_tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        # In place: four times less memory to touch, which is what this costs.
        return pixels.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]


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
        return _to_array(part.resize(self.inference.size[::-1], self.inference._filter))

    def draw_crop(self, size: tuple[int, int], random: np.random.Generator) -> Crop:
        """A crop of a picture of this width and height, on its grid."""
        left, top, width, height = self._draw_free_crop(size, random)
        grid = self.reduction(width, height)
        return Crop(*(side // grid * grid for side in (left, top, width, height)))

    def reduction(self, width: int, height: int) -> int:
        """The largest of 8, 4, 2, 1 that leaves a crop at least twice the result's size."""
        to_height, to_width = self.inference.size
        for reduction in (8, 4, 2):
            if width >= 2 * to_width * reduction and height >= 2 * to_height * reduction:
                return reduction
        return 1

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


def _to_array(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)  # (H, W, 3)
    return np.ascontiguousarray(array.transpose(2, 0, 1))  # (3, H, W)


def _pad_and_crop(picture: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    """Cut the centre out, after padding a side that is too short; rounding as in open_clip."""
    height, width = size
    pad_x, pad_y = max(width - picture.width, 0), max(height - picture.height, 0)
    if pad_x or pad_y:
        padded = Image.new("RGB", (picture.width + pad_x, picture.height + pad_y), (fill,) * 3)
        padded.paste(picture, (pad_x // 2, pad_y // 2))
        picture = padded
    left = int(round((picture.width - width) / 2.0))
    top = int(round((picture.height - height) / 2.0))
    return picture.crop((left, top, left + width, top + height))
