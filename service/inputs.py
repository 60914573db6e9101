"""What clients call a picture, a text or a vector -> checked values.

A picture is base64 or a data URI in JSON, bytes in a form or as a body. Never a path. A URL is a
`Link`, which nobody reads but `fetched`, and that only where the settings allow it. Start at
`parse_input`.
"""

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipserve.errors import ClipserveError
from clipserve.prompts import load_templates, template_sets
from service.errors import InvalidBody, RequestError

MAX_TEXT_CHARS = 10_000
"""unless the settings say otherwise"""
MAX_PROMPT_CHARS = 4_000_000
"""of all labels in all templates of one classifier, filled in"""

_FETCHES = 4
"""at once for one request, which leaves connections to others"""
_FETCHED = ("http://", "https://")
_URL_SCHEMES = (*_FETCHED, "ftp://", "file://", "s3://", "gs://")


@dataclass(frozen=True)
class Picture:
    """Bytes of an encoded picture, or their base64, not yet decoded."""

    data: bytes | str

    def read(self) -> bytes:
        """The encoded picture; slow for a large one, so called in the pool."""
        return self.data if isinstance(self.data, bytes) else _decode_base64(self.data)


@dataclass(frozen=True)
class Link(Picture):
    """A picture's URL in the place of its bytes; reading it is refused, `fetched` replaces it."""

    param: str

    @property
    def url(self) -> str:
        assert isinstance(self.data, str)
        return self.data

    def read(self) -> bytes:
        raise _url_refused(self.param)


@dataclass(frozen=True)
class Unfetched(Picture):
    """A picture that could not be had; reading it says why."""

    error: Exception

    def read(self) -> bytes:
        raise self.error


@dataclass(frozen=True)
class Text:
    text: str


Input = Picture | Text


class Fetcher(Protocol):
    """What gets the bytes behind a URL, under all the limits there are for that."""

    async def get(self, url: str, param: str) -> bytes: ...


async def fetched(inputs: Sequence[Input], fetcher: Fetcher | None) -> list[Input]:
    """The inputs with pictures in the place of links; one that fails raises when it is read.

    Without a fetcher links stay what they are.
    """
    if fetcher is None or not any(isinstance(item, Link) for item in inputs):
        return list(inputs)
    turns = asyncio.Semaphore(_FETCHES)
    fetches = [asyncio.ensure_future(_fetch(item, fetcher, turns)) for item in inputs]
    try:
        return await asyncio.gather(*fetches)
    finally:  # where one raised, nobody waits for the others
        for fetch in fetches:
            fetch.cancel()


async def _fetch(item: Input, fetcher: Fetcher, turns: asyncio.Semaphore) -> Input:
    if not isinstance(item, Link):
        return item
    try:
        async with turns:
            return Picture(await fetcher.get(item.url, item.param))
    except ClipserveError as error:
        return Unfetched(b"", error)


def parse_input(
    value: Any, param: str, *, images: bool = False, max_chars: int = MAX_TEXT_CHARS
) -> Input:
    """A string, {"text": ...} or {"image": ...}; with `images` a string is a picture."""
    if isinstance(value, dict):
        known = [key for key in ("text", "image") if key in value]
        if len(known) != 1 or len(value) != 1:
            raise RequestError(f'{param} must be {{"text": ...}} or {{"image": ...}}', param=param)
        is_image = known[0] == "image"
        return parse_input_of(value[known[0]], f"{param}.{known[0]}", is_image, max_chars)
    return parse_input_of(value, param, images, max_chars)


def parse_input_of(
    value: Any, param: str, is_image: bool, max_chars: int = MAX_TEXT_CHARS
) -> Input:
    """A picture or a text from a string."""
    if is_image and not isinstance(value, str):
        raise RequestError(
            f"{param} is an image, which must be a string: base64, a data URI or a URL", param=param
        )
    if isinstance(value, int | list):
        raise RequestError(
            f"{param} holds token ids, which are another model's; send strings"
            " (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            param=param,
            code="token_ids",
        )
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a string", param=param)
    return parse_picture(value, param) if is_image else parse_text(value, param, max_chars)


def parse_text(text: str, param: str, max_chars: int = MAX_TEXT_CHARS) -> Text:
    """A text of at most so many characters, which is known before any of them is tokenised."""
    check_length(text, param, max_chars)
    if not text.strip():
        raise RequestError(f"{param} is empty", param=param, code="empty_text")
    if text[:11].lower() == "data:image/":
        raise RequestError(
            f'{param} is a data URI in the place of a text; send {{"image": ...}} or "modality":'
            ' "image"',
            param=param,
        )
    return Text(text)


def check_length(text: str, param: str, max_chars: int) -> None:
    """InvalidBody for a text of more characters."""
    if len(text) > max_chars:
        raise InvalidBody(
            f"{param} has {len(text)} characters; at most {max_chars} are read",
            param=param,
            code="text_too_long",
        )


def parse_picture(text: str, param: str) -> Picture:
    """From base64 or a data URI, which is decoded later, or a URL, which `fetched` may follow."""
    start = text[:16].lstrip().lower()
    if start.startswith(_FETCHED):
        return Link(text.strip(), param)
    if start.startswith(_URL_SCHEMES):
        raise _url_refused(param)
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


def parse_templates(
    value: str | Sequence[str], max_chars: int = MAX_TEXT_CHARS
) -> str | tuple[str, ...]:
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
        check_length(template, f"templates[{index}]", max_chars)
        if "{}" not in template and "{c}" not in template:
            raise RequestError(
                f"templates[{index}] has no {{}} for the label", param=f"templates[{index}]"
            )
    if not value:
        raise RequestError("templates is empty; leave it out or give one", param="templates")
    return tuple(value)


def check_prompts(labels: Sequence[str], templates: str | Sequence[str]) -> None:
    """RequestError if labels in templates, filled in, would be more text than one request may."""
    sets = load_templates(templates) if isinstance(templates, str) else templates
    label_chars = sum(map(len, labels))
    places = sum(template.count("{}") + template.count("{c}") for template in sets)
    count = len(labels) * sum(map(len, sets)) + places * label_chars
    if count > MAX_PROMPT_CHARS:
        raise RequestError(
            f"the labels in their templates have {count} characters; at most {MAX_PROMPT_CHARS}"
            " are allowed in one request",
            param="labels",
            code="text_too_long",
        )


def parse_labels(
    labels: Sequence[str], limit: int, max_chars: int = MAX_TEXT_CHARS
) -> tuple[str, ...]:
    """Stripped, none empty, at least one and at most `limit`."""
    if not labels:
        raise RequestError("labels is empty; give at least one", param="labels")
    if len(labels) > limit:
        raise RequestError(f"{len(labels)} labels; at most {limit} are allowed", param="labels")
    for index, label in enumerate(labels):
        check_length(label, f"labels[{index}]", max_chars)
    stripped = tuple(label.strip() for label in labels)
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


def _url_refused(param: str) -> RequestError:
    return RequestError(
        f"{param} is a URL, and this service fetches none; send the picture itself as base64, a"
        " data URI, or a file in a form",
        param=param,
        code="url_not_allowed",
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
