"""Items as clients give them -> vectors and thumbnails -> a collection; for a request or a job.

Start at `prepare`. An item's picture, or the vector given in its place, is what the field `image`
is searched by; its text the field `text`. An item of text alone is found in both.

Legend: E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipserve.errors import ClipserveError, IndexStoreError, ItemTooLarge
from index.collection import Collection, Item, Unit, check_item
from index.items import MAX_ITEM_BYTES
from service.errors import BodyTooLarge, RequestError, at
from service.inputs import Input, check_count, fetched, parse_picture, parse_text, parse_vector
from service.registry import Registry, ServedCollection
from service.scheduler import Priority
from service.schemas import UpsertItem


@dataclass
class Prepared:
    """An item and its vectors (E,)."""

    item: Item
    vector: np.ndarray
    text_vector: np.ndarray | None
    thumbnail: bytes | None
    truncated: bool
    """whether its text was cut to the model's context"""


async def prepare(
    given: Sequence[UpsertItem],
    places: Sequence[str],
    served: ServedCollection,
    registry: Registry,
    *,
    priority: Priority = "interactive",
) -> list[Prepared | Exception]:
    """Each item, ready to be stored, or what is wrong with it; `places` are their names in errors.

    Raises Overloaded when the model's queue is full.
    """
    checked = [
        _check(one, place, served, registry) for one, place in zip(given, places, strict=True)
    ]
    wanted: list[tuple[int, str, Input]] = [
        (row, part, value)
        for row, parts in enumerate(checked)
        if not isinstance(parts, Exception)
        for part, value in parts.items()
        if not isinstance(value, np.ndarray)
    ]
    inputs = [value for _, _, value in wanted]
    if inputs:
        check_count(len(inputs), registry.settings.max_queue_items, "items")
    answer = await served.model.pipeline.embed(
        await fetched(inputs, registry.fetcher), thumbnails=True, priority=priority
    )
    found: list[dict[str, Any]] = [
        {} if isinstance(parts, Exception) else {**parts} for parts in checked
    ]
    for place, (row, part, _) in enumerate(wanted):
        found[row][part] = answer.vectors[place]
        if part == "text":
            found[row]["truncated"] = answer.truncated[place]
        else:
            found[row]["thumbnail"] = answer.thumbnails[place]
    return [
        parts if isinstance(parts, Exception) else _gather(one, place, values)
        for one, place, parts, values in zip(given, places, checked, found, strict=True)
    ]


def store(collection: Collection, prepared: Sequence[Prepared], unit: Unit | None = None) -> int:
    """All of it, with `unit`, or nothing; durable when it returns. Returns the generation."""
    bare = [one for one in prepared if one.text_vector is None]
    with_text = [one for one in prepared if one.text_vector is not None]
    if not prepared and unit is None:
        return collection.generation()
    with collection.together():
        for group in (bare, with_text):
            texts = [one.text_vector for one in group if one.text_vector is not None]
            if group:
                collection.upsert(
                    [one.item for one in group],
                    np.stack([one.vector for one in group]),
                    [one.thumbnail for one in group],
                    text_vectors=np.stack(texts) if texts else None,
                )
        collection.upsert([], None, unit=unit)
    return collection.generation()


def _check(
    one: UpsertItem, place: str, served: ServedCollection, registry: Registry
) -> dict[str, Input | np.ndarray] | Exception:
    """What its vectors come from, by `image` and `text`."""
    try:
        check_item(_item(one))
        return _parts(one, place, served, registry)
    except ItemTooLarge:
        return BodyTooLarge(
            f"{place} has over {MAX_ITEM_BYTES} bytes of caption and metadata; keep the rest"
            " elsewhere",
            param=place,
            code="item_too_large",
        )
    except IndexStoreError:
        return RequestError(
            f'{place} cannot be stored: an id is 1 to 512 bytes of text, not "." or "..", metadata'
            " is JSON without NaN, at most 64 objects and lists inside each other",
            param=place,
        )
    except ClipserveError as error:
        return error


def _parts(
    one: UpsertItem, place: str, served: ServedCollection, registry: Registry
) -> dict[str, Input | np.ndarray]:
    if one.image is not None and one.vector is not None:
        raise RequestError(f"{place} has an image and a vector; keep one of the two", param=place)
    parts: dict[str, Input | np.ndarray] = {}
    if one.vector is not None:
        embed_dim = served.collection.embed_dim
        parts["image"] = parse_vector(one.vector, embed_dim, f"{place}.vector")
    if one.image is not None:
        parts["image"] = parse_picture(one.image, f"{place}.image")
    if one.text is not None:
        limit = registry.settings.max_text_chars
        parts["text"] = parse_text(one.text, f"{place}.text", limit)
    if not parts:
        raise RequestError(
            f"{place} has nothing to make a vector from; give it an image, a text or a vector",
            param=place,
        )
    return parts


def _gather(one: UpsertItem, place: str, values: dict[str, Any]) -> Prepared | Exception:
    for part in ("image", "text"):
        if isinstance(values.get(part), Exception):
            return at(values[part], place)
    text = values.get("text")
    return Prepared(
        _item(one),
        values["image"] if "image" in values else values["text"],
        text,
        values.get("thumbnail"),
        values.get("truncated", False),
    )


def _item(one: UpsertItem) -> Item:
    return Item(one.id, one.caption, "rest", one.metadata)
