"""What a collection holds: items, unit vectors, records of bulk work; and what it refuses.

Legend: N items, E embedding.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipserve.errors import IndexStoreError, ItemTooLarge

LENGTH_TOLERANCE = {"float32": 2e-6, "float16": 6e-4}
"""how far from 1 a stored vector's length may be"""

MAX_ITEM_BYTES = 2**20
"""of caption, source and metadata together"""

_MAX_ID_BYTES = 512
_NOT_NEW_IDS = (".", "..")
"""which clients of HTTP take out of a path: `items/..` would be the collection itself"""
_MAX_DEPTH = 64  # far below where the readers of JSON give up
_UNIT_TOLERANCE = 1e-3
_ROUNDING = 1e-6  # of float32: a vector this close to unit length is stored as it is given


@dataclass(frozen=True)
class Item:
    """What is known of one picture, beside its vectors."""

    id: str
    caption: str = ""
    source: str = ""
    """where it came from, for people"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """anything JSON can hold, at most 64 objects and lists inside each other; 1 MiB, with the
    texts above"""


@dataclass(frozen=True)
class Unit:
    """A piece of bulk work that is done: its commit record, stored together with its items."""

    name: str
    digest: str
    """of everything its result depends on"""
    count: int
    bad: int


def check_item(item: Item) -> tuple[str, str, str, str]:
    """The columns of an item; IndexStoreError says what makes it impossible to store."""
    check_id(item.id)
    if item.id in _NOT_NEW_IDS:
        raise IndexStoreError(f"id {item.id!r} is not allowed; no URL could name its item")
    for value in (item.caption, item.source):
        if not _is_text(value):
            raise IndexStoreError(f"item {item.id!r}: caption and source must be Unicode text")
    if not isinstance(item.metadata, dict):
        raise IndexStoreError(f"item {item.id!r}: metadata must be a JSON object")
    try:
        metadata = json.dumps(item.metadata, allow_nan=False, ensure_ascii=False)
        metadata.encode()
        is_deep = metadata.count("{") + metadata.count("[") > _MAX_DEPTH  # or may be
        is_deep = is_deep and _is_deeper(item.metadata, _MAX_DEPTH)
    except RecursionError:
        is_deep = True
    except (TypeError, ValueError) as error:
        raise IndexStoreError(f"item {item.id!r}: metadata is not JSON: {error}") from None
    if is_deep:
        raise IndexStoreError(
            f"item {item.id!r}: metadata is nested more than {_MAX_DEPTH} deep; make it flatter"
        )
    size = sum(len(text.encode()) for text in (item.caption, item.source, metadata))
    if size > MAX_ITEM_BYTES:
        raise ItemTooLarge(
            f"item {item.id!r}: caption, source and metadata have {size} bytes; at most"
            f" {MAX_ITEM_BYTES} are stored"
        )
    return item.id, item.caption, item.source, metadata


def stored_item(id: str, caption: str, source: str, metadata: str) -> Item:
    """An item from its columns; IndexStoreError if they are not as `check_item` made them."""
    try:
        return Item(id, caption, source, json.loads(metadata))
    except (ValueError, RecursionError) as error:
        raise IndexStoreError(
            f"item {id!r}: its stored metadata cannot be read: {error}; put the item again"
        ) from None


def check_id(id: str) -> None:
    """IndexStoreError unless it is text of 1 to 512 bytes."""
    if not _is_text(id) or not 1 <= len(id.encode()) <= _MAX_ID_BYTES:
        raise IndexStoreError(
            f"id {id[:40]!r} is not allowed; an id is text of 1 to {_MAX_ID_BYTES} bytes"
        )


def check_vectors(
    items: Sequence[Item], vectors: np.ndarray, embed_dim: int, dtype: np.dtype[Any], what: str
) -> np.ndarray:
    """The vectors (N, E) as they are stored; IndexStoreError names the item of a bad one.

    Of unit length in float64, then rounded, which moves an element by at most 2^-11 of it for
    float16. What has been rounded so already stays as it is, to the last bit.
    """
    matrix = np.asarray(vectors, dtype=np.float64)
    if matrix.shape != (len(items), embed_dim):
        raise IndexStoreError(
            f"{what} vectors of shape {matrix.shape} for {len(items)} items; this collection needs"
            f" ({len(items)}, {embed_dim})"
        )
    with np.errstate(over="ignore"):  # infinite then, and refused
        norms = np.linalg.norm(matrix, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))  # NaN is bad as well
    if len(bad):
        raise IndexStoreError(
            f"{what} vector of item {items[bad[0]].id!r} has length {norms[bad[0]]:.6g}; it must be"
            " finite and of length 1: divide it by its length"
        )
    is_unit = np.abs(norms - 1) <= _ROUNDING
    if dtype.itemsize == 2:
        is_unit = np.abs(norms - 1) <= LENGTH_TOLERANCE["float16"]
        is_unit &= (matrix == matrix.astype(dtype)).all(axis=1)
    norms[is_unit] = 1
    return np.asarray(matrix / norms[:, None], dtype=dtype)


def check_distinct(items: Sequence[Item]) -> None:
    """IndexStoreError if an id is there twice."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise IndexStoreError(f"id {item.id!r} is given twice in one write; keep one of them")
        seen.add(item.id)


def _is_deeper(value: object, depth: int) -> bool:
    """Whether more than `depth` objects and lists are inside each other."""
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    else:
        return False
    return not depth or any(_is_deeper(one, depth - 1) for one in inner)


def _is_text(value: str) -> bool:
    """A str that UTF-8 can hold: no halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
