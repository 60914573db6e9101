"""Many items as several requests: lazily read, a few at a time, answered in order.

A batch that the service finds too large is sent again in two halves, so no limit of the service has
to be known. Start at `run`.
"""

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from clipserve.errors import ClipserveError, ImageError, ItemRefused, RequestRefused, ServiceError

T = TypeVar("T")

Progress = Callable[[int, int | None], object]
"""called with how many items are done, and how many there are if that is known"""
Errors = dict[int, ClipserveError]
"""what went wrong, by an item's place among those given"""
Send = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]
"""sends encoded items; returns an answer or a ClipserveError for each"""

_NUMBER_BYTES = 24
_OF_ITEMS = re.compile(r"(input|images|texts|items|ids|batch|queries)(\[|$)")
_TOO_LARGE = ("body_too_large", "answer_too_large")
_TIMES_ITEMS = (None, "k", "k_test", "with_vectors")
"""fields of a search that cost something for each of its queries; None: the body has too much"""


class Batches:
    """How items are sent: so many in a request, so many bytes, so many requests at a time."""

    def __init__(self, batch_size: int, max_bytes: int, concurrency: int) -> None:
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._concurrency = concurrency

    async def run(
        self,
        items: Iterable[Any],
        encode: Callable[[Any], Any],
        send: Send,
        *,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> list[Any]:
        """The answers of all items, in order; None where `errors` took an item's error.

        Without `errors` the first error that is met is raised, and nothing more is sent.
        """
        total = len(items) if isinstance(items, Sequence) else None
        source = enumerate(_chunks(items, self._batch_size))
        answers: dict[int, list[Any]] = {}
        done = 0

        async def work() -> None:
            nonlocal done
            for number, batch in source:  # shared: each batch goes to one worker
                first = number * self._batch_size
                found = await self._answer(batch, encode, send)
                answers[number] = _sift(found, first, errors)
                done += len(batch)
                if progress is not None:
                    progress(done, total)

        await _together(work() for _ in range(self._concurrency))
        return [one for number in sorted(answers) for one in answers[number]]

    async def _answer(
        self, batch: Sequence[Any], encode: Callable[[Any], Any], send: Send
    ) -> list[Any]:
        """An answer or an error for each item; what could not be encoded is not sent."""
        found = await asyncio.to_thread(_encode_all, batch, encode)
        places = [place for place, one in enumerate(found) if not isinstance(one, ClipserveError)]
        for group in _below(places, [_size(found[place]) for place in places], self._max_bytes):
            answered = await _send_or_halve([found[place] for place in group], send)
            for place, answer in zip(group, answered, strict=True):
                found[place] = answer
        return found


async def _send_or_halve(items: Sequence[Any], send: Send) -> list[Any]:
    """Halve what is refused as a whole, until the item at fault is alone."""
    try:
        return list(await send(items))
    except RequestRefused as error:
        if not _is_of_items(error):
            raise
        if len(items) == 1:
            return [error]
        half = len(items) // 2
        return [
            *await _send_or_halve(items[:half], send),
            *await _send_or_halve(items[half:], send),
        ]


def _is_of_items(error: RequestRefused) -> bool:
    """Whether fewer items, or others, could be answered: `input[3]` is one, `labels[3]` is not."""
    if error.code == "too_many_items" and error.param in _TIMES_ITEMS:
        return True
    return error.code in _TOO_LARGE or bool(_OF_ITEMS.match(error.param or ""))


def _sift(found: list[Any], first: int, errors: Errors | None) -> list[Any]:
    """Answers, after errors were named and put where they are wanted."""
    for offset, one in enumerate(found):
        if not isinstance(one, ClipserveError):
            continue
        error = named(one, first + offset)
        if errors is None:
            raise error
        errors[first + offset] = error
        found[offset] = None
    return found


def named(error: ClipserveError, index: int) -> ClipserveError:
    """An error of one item, which says which one; the service counts within a request."""
    status = error.status if isinstance(error, ServiceError) else None
    code = error.code if isinstance(error, ServiceError) else "invalid_image"
    refused = ItemRefused(f"item {index}: {error}", status=status, code=code)
    refused.index = index
    return refused


def _encode_all(batch: Sequence[Any], encode: Callable[[Any], Any]) -> list[Any]:
    found: list[Any] = []
    for item in batch:
        try:
            found.append(encode(item))
        except ImageError as error:
            found.append(error)
    return found


def _size(encoded: Any) -> int:
    """About how many bytes it takes in a body: base64 is most of it."""
    if isinstance(encoded, str):
        return len(encoded) + _NUMBER_BYTES
    if isinstance(encoded, dict):
        return sum(map(_size, encoded.values()))
    return sum(map(_size, encoded)) if isinstance(encoded, list) else _NUMBER_BYTES


def _below(places: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Runs of places whose sizes together stay below the limit, at least one in each."""
    group: list[int] = []
    total = 0
    for place, size in zip(places, sizes, strict=True):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(place)
        total += size
    if group:
        yield group


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


async def _together(works: Iterable[Awaitable[None]]) -> None:
    """Until all are done; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
