"""Answers as bytes, written once: no response model walks over a million floats again."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.registry import ServedModel


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
        all_headers["X-Clipserve-Model"] = quote(model.name)
        all_headers["X-Clipserve-Fingerprint"] = model.fingerprint
    return Response(to_json(named), status, all_headers, media_type="application/json")


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
