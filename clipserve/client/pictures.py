"""Pictures on their way out: paths, bytes and PIL images -> base64, unread and unchanged."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Union

from clipserve.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

Picture = Union[str, Path, bytes, "Image.Image"]
"""a path, the bytes of a file, or a PIL image"""


def encode_picture(source: Picture) -> str:
    """Base64 of the file; a PIL image becomes a PNG. Raises ImageError, naming a path."""
    return base64.b64encode(_read(source)).decode("ascii")


def _read(source: Picture) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{source}: {error.strerror or 'cannot be read'}") from None
    buffer = io.BytesIO()
    try:
        source.save(buffer, format="PNG", compress_level=1)
    except OSError as error:
        raise ImageError(f"a PIL image of mode {source.mode} cannot be sent: {error}") from None
    return buffer.getvalue()
