"""What clients call a picture, a text or a vector -> checked values.

A picture is base64 or a data URI in JSON, bytes in a form. Never a path, and never a URL: nothing
is fetched. Start at `parse_input`.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipserve.prompts import template_sets
from service.errors import RequestError

_URL_SCHEMES = ("http://", "https://", "ftp://", "file://", "s3://", "gs://")


@dataclass(frozen=True)
class Picture:
    """Bytes of an encoded picture, or their base64, not yet decoded."""

    data: bytes | str

    def read(self) -> bytes:
        """The encoded picture; slow for a large one, so called in the pool."""
        return self.data if isinstance(self.data, bytes) else _decode_base64(self.data)


@dataclass(frozen=True)
class Text:
    text: str


Input = Picture | Text


def parse_input(value: Any, param: str, *, images: bool = False) -> Input:
    """A string, {"text": ...} or {"image": ...}; with `images` a string is a picture."""
    if isinstance(value, dict):
        known = [key for key in ("text", "image") if key in value]
        if len(known) != 1 or len(value) != 1:
            raise RequestError(f'{param} must be {{"text": ...}} or {{"image": ...}}', param=param)
        return parse_input_of(value[known[0]], f"{param}.{known[0]}", known[0] == "image")
    return parse_input_of(value, param, images)


def parse_input_of(value: Any, param: str, is_image: bool) -> Input:
    """A picture or a text from a string."""
    if isinstance(value, int | list):
        raise RequestError(
            f"{param} holds token ids, which are another model's; send strings"
            " (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            param=param,
            code="token_ids",
        )
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    return parse_picture(value, param) if is_image else parse_text(value, param)


def parse_text(text: str, param: str) -> Text:
    if not text.strip():
        raise RequestError(f"{param} is empty", param=param, code="empty_text")
    if text[:11].lower() == "data:image/":
        raise RequestError(
            f'{param} is a data URI in the place of a text; send {{"image": ...}} or "modality":'
            ' "image"',
            param=param,
        )
    return Text(text)


def parse_picture(text: str, param: str) -> Picture:
    """From base64 or a data URI, which is decoded later."""
    start = text[:16].lstrip().lower()
    if start.startswith(_URL_SCHEMES):
        raise RequestError(
            f"{param} is a URL, and this service fetches none; send the picture itself as base64,"
            " a data URI, or a file in a form",
            param=param,
            code="url_not_allowed",
        )
    if not text:
        raise RequestError(f"{param} is empty", param=param, code="invalid_image")
    return Picture(text)


def parse_vector(values: Sequence[float], embed_dim: int, param: str) -> np.ndarray:
    """(E,) float32 of unit length, from finite numbers that are not all zero."""
    if len(values) != embed_dim:
        raise RequestError(
            f"{param} has {len(values)} numbers; the collection's model makes {embed_dim}",
            param=param,
            code="wrong_dimension",
        )
    vector = np.asarray(values, dtype=np.float64)
    largest = float(np.abs(vector).max(initial=0.0))
    if not np.isfinite(largest) or largest == 0.0:
        raise RequestError(
            f"{param} must hold finite numbers, not all zero", param=param, code="invalid_vector"
        )
    vector = vector / largest  # so that squares neither overflow nor vanish
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def parse_templates(value: str | Sequence[str]) -> str | tuple[str, ...]:
    """The name of a set, or templates that each hold {}. Never a file."""
    if isinstance(value, str):
        if value in template_sets():
            return value
        if "{}" not in value and "{c}" not in value:
            names = ", ".join(template_sets())
            raise RequestError(
                f"unknown template set; use {names}, or a list of templates that hold {{}}",
                param="templates",
                code="unknown_templates",
            )
        value = [value]
    for index, template in enumerate(value):
        if "{}" not in template and "{c}" not in template:
            raise RequestError(
                f"templates[{index}] has no {{}} for the label", param=f"templates[{index}]"
            )
    if not value:
        raise RequestError("templates is empty; leave it out or give one", param="templates")
    return tuple(value)


def parse_labels(labels: Sequence[str], limit: int) -> tuple[str, ...]:
    """Stripped, none empty, at least one and at most `limit`."""
    stripped = tuple(label.strip() for label in labels)
    if not stripped:
        raise RequestError("labels is empty; give at least one", param="labels")
    if len(stripped) > limit:
        raise RequestError(f"{len(stripped)} labels; at most {limit} are allowed", param="labels")
    if "" in stripped:
        index = stripped.index("")
        raise RequestError(f"labels[{index}] is empty", param=f"labels[{index}]")
    return stripped


def check_count(count: int, limit: int, param: str) -> None:
    """At least one item and at most `limit`."""
    if not count:
        raise RequestError(f"{param} is empty; send at least one", param=param)
    if count > limit:
        raise RequestError(
            f"{param} has {count} items; at most {limit} fit in one request",
            param=param,
            code="too_many_items",
        )


def _decode_base64(text: str) -> bytes:
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError(
                "a data URI must be data:image/...;base64,...", code="invalid_base64"
            )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "not valid base64; send the picture as base64 or a data URI", code="invalid_base64"
        ) from None
