"""Texts that stand for numbers -> numbers, for the columns that the options name.

A CSV has texts alone, and a filter on metadata never takes a text for a number.
"""

import contextlib
import math
from decimal import Decimal
from typing import Any

from clipserve.errors import SampleError
from clipserve.sources.records import to_text

_SHOWN = 40  # characters of a text that a reason repeats


def to_number(column: str, value: Any) -> Any:
    """An int where the text is one, else a float; None where it is empty, or NaN for that.

    Numbers stay as they are, and a list has those of its elements, less the empty ones. Raises
    SampleError for anything else, and for what is not finite.
    """
    if not isinstance(value, list | tuple):
        return None if _is_empty(value) else _to_finite(column, value)
    return [_to_finite(column, part) for part in value if not _is_empty(part)]


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)  # as pandas writes an empty cell
    return value is None or (isinstance(value, str) and not value.strip())


def _to_finite(column: str, value: Any) -> int | float:
    number = _parse(str(value)) if isinstance(value, str | Decimal) else value
    if isinstance(number, int | float) and not isinstance(number, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(number):
                return number
    raise SampleError(f"column {column!r} holds {_show(value)}, no finite number", "bad_number")


def _parse(text: str) -> int | float | None:
    if not text.isascii() or "_" in text:  # of which Python takes more than people mean
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(to_text(value[:_SHOWN]))
    return f"a {type(value).__name__}" if isinstance(value, dict | list | tuple) else repr(value)
