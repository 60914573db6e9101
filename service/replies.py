"""Answers as bytes, written once: no response model walks over a million floats again."""

import asyncio
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RequestError
from service.notes import notes
from service.registry import ServedModel

OCTETS = "application/octet-stream"
NPY = "application/x-npy"
MAX_ANSWER_BYTES = 64 * 2**20
"""of what makes an answer large: labels, captions, metadata, small pictures"""

HIT_VALUES = 8
"""a hit or an item takes as long to write as so many numbers, beside its captions and metadata"""
_IN_MEMORY = 4
"""times the bytes on disk, until the answer is written: of metadata 1 as text, 4 as a few numbers,
7 as a long list of them; of a picture 4, with its base64 twice"""
_HIT_BYTES = 700
"""of a hit and its line in an answer, beside captions and metadata (measured, Python 3.11)"""
_VALUE_BYTES = 16
_SMALL = 4096
"""numbers or objects that are written in less time than a pool takes to wake"""


class Room:
    """What still fits into one answer; `param` is what asks for less. It counts as in flight."""

    def __init__(self, param: str) -> None:
        self._param = param
        self.size = 0
        """bytes that were taken"""

    @property
    def values(self) -> int:
        """What was taken, for `written`: so many numbers take as long to write."""
        return values_of(self.size)

    def take(self, size: int) -> None:
        """RequestError if so many bytes more, which nobody has read yet, are too many; Overloaded
        if all requests together hold too many."""
        self.size += size
        if self.size > MAX_ANSWER_BYTES:
            raise RequestError(
                f"the answer would have {self.size} bytes of captions, metadata and pictures or"
                f" more; at most {MAX_ANSWER_BYTES} are allowed: ask for less at once, by"
                f" {self._param}",
                param=self._param,
                code="answer_too_large",
            )
        self.hold(_IN_MEMORY * size)

    def take_hits(self, count: int) -> None:
        """Overloaded if so many hits or items, beside their bytes, are too many."""
        self.hold(_HIT_BYTES * count)

    def hold(self, size: int) -> None:
        """Overloaded if so many bytes more, beside the answer, are too many."""
        notes().expect(size)


def reply(
    content: Mapping[str, Any],
    model: ServedModel | None = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A JSON answer; with `model` it names the model and its fingerprint, in body and headers."""
    named = dict(content)
    all_headers = dict(headers or {})
    if model is not None:
        named |= {"model": model.name, "fingerprint": model.fingerprint}
        all_headers |= model_headers(model)
    return Response(to_json(named), status, all_headers, media_type="application/json")


def values_of(num_bytes: int) -> int:
    """So many numbers take about as long to write as captions and metadata of these bytes."""
    return num_bytes // _VALUE_BYTES


async def written(pool: Executor, size: int, write: Callable[[], Response]) -> Response:
    """What `write` makes of about `size` values; in the pool when that would hold up the loop."""
    if size <= _SMALL:
        return write()
    return await asyncio.get_running_loop().run_in_executor(pool, write)


def reply_rows(
    rows: np.ndarray, media_type: str, model: ServedModel, headers: Mapping[str, str]
) -> Response:
    """Vectors (N, E) as little-endian float32, row after row, or as a .npy file of them."""
    matrix = np.ascontiguousarray(rows, dtype="<f4")
    body = matrix.tobytes()
    if media_type == NPY:
        file = io.BytesIO()
        np.save(file, matrix, allow_pickle=False)
        body = file.getvalue()
    shape = {"X-Clipserve-Shape": ",".join(map(str, matrix.shape))}
    all_headers = {**model_headers(model), **shape, **headers}
    return Response(body, 200, all_headers, media_type=media_type)


def wanted_type(request: Request, known: Sequence[str]) -> str | None:
    """The first type of the Accept header, if it is one of `known`."""
    first = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip().lower()
    return first if first in known else None


def model_headers(model: ServedModel) -> dict[str, str]:
    """Which model answered."""
    return {
        "X-Clipserve-Model": quote(model.name),
        "X-Clipserve-Fingerprint": model.fingerprint,
    }


def image_url(request: Request, collection: str, id: str, generation: int) -> str:
    """Where an item's picture is. With the collection's generation it may be cached for ever."""
    prefix = request.scope.get("root_path", "")
    place = f"{prefix}/v1/collections/{quote(collection, safe='')}/items/{quote(id, safe='')}"
    return f"{place}/image?v={generation}"


def to_json(value: Any) -> bytes:
    """Numpy arrays as lists; whole numbers over 64 bits, which metadata may hold, as they are."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        return json.dumps(value, default=_from_numpy).encode()


def _from_numpy(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON")
