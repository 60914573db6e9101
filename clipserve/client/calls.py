"""What all calls of `AsyncClient` are made of: a transport, batches, and items as JSON."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import httpx
import numpy as np

from clipserve.client.batches import Batches
from clipserve.client.pictures import encode_picture
from clipserve.client.transport import Transport
from clipserve.errors import RequestRefused, TextTruncated

Item = Mapping[str, Any]
"""id, and image (as `embed_images` takes it), text or vector; caption, metadata"""

Truncated = set[int]
"""takes the places of items whose text did not fit into the model's context and was cut"""

_CUT_TOLD = 5
_REQUEST_BYTES = 16 * 2**20
_JOB_LINES = 1000


class Answer(NamedTuple):
    """What the service says of one item."""

    value: Any
    is_cut: bool
    """whether its text did not fit into the model's context"""


class Calls:
    """The connections to one service, and how items are sent over them."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        concurrency: int = 4,
        batch_size: int = 64,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._transport = Transport(
            url, api_key=api_key, timeout_s=timeout_s, retries=retries, transport=transport
        )
        self._call = self._transport.call
        self._batches = Batches(batch_size, _REQUEST_BYTES, concurrency)
        self._one_by_one = Batches(_JOB_LINES, _REQUEST_BYTES, 1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    async def _list(self, place: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = (await self._call("GET", place))["data"]
        return data

    async def _read(
        self, method: str, place: str, body: Any = None, *, idempotent: bool = True
    ) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(method, place, body, idempotent=idempotent)
        return answer


def given(**values: Any) -> dict[str, Any]:
    """What the caller gave; the rest is the service's default."""
    return {name: value for name, value in values.items() if value is not None}


def encode_item(item: Item) -> dict[str, Any]:
    """An item or a query, with the parts it may have, as JSON."""
    encoded = dict(item)
    if encoded.get("image") is not None:
        encoded["image"] = encode_picture(encoded["image"])
    if isinstance(encoded.get("vector"), np.ndarray):
        encoded["vector"] = encoded["vector"].tolist()
    if encoded.get("queries") is not None:
        encoded["queries"] = [encode_item(part) for part in encoded["queries"]]
    return encoded


def encode_query(query: str | Item) -> dict[str, Any]:
    """The same, where a text may be given alone."""
    return {"text": query} if isinstance(query, str) else encode_item(query)


def cut_places(answers: Sequence[Answer | None]) -> list[int]:
    """The items whose text was cut."""
    return [place for place, one in enumerate(answers) if one is not None and one.is_cut]


def tell_cut(cut: Sequence[int | str], truncated: Truncated | None = None) -> None:
    """Of an item its place: into the set there is for that, or in a warning.

    Anything else that was cut is given by its name. For methods that the user calls: the warning is
    of the line that does.
    """
    if truncated is not None:
        truncated.update(one for one in cut if isinstance(one, int))
    elif cut:
        names = [one if isinstance(one, str) else f"item {one}" for one in cut[:_CUT_TOLD]]
        if more := len(cut) - len(names):
            names.append(f"{more} more")
        listed = ", ".join(names)
        warnings.warn(
            f"cut to the model's context, the rest of the text is lost: {listed}",
            TextTruncated,
            stacklevel=3,
        )


def error_of(answer: Mapping[str, Any]) -> RequestRefused | None:
    """The error in the place of an item's answer, if there is one."""
    if "error" not in answer:
        return None
    fields = answer["error"]
    return RequestRefused(fields["message"], code=fields["code"], param=fields["param"])
