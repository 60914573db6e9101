"""The values of one metadata field in typed arrays, compared without a loop in Python.

Numbers are float64, strings codes into their sorted distinct values; a list has the values of
its elements, and a row matches if one of its values does. Start at `Values.holds`; what a condition
means is written in `filters.py`.

Legend: R rows, M values (R, unless lists are among them), D distinct strings.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from index.filters import Condition, Scalar, fits_int64

MISSING = object()
"""stands for the value of a row that has none"""

_ABSENT, _OTHER, _NULL, _FALSE, _TRUE, _NUMBER, _STRING, _LIST = range(8)
_KINDS: dict[type, int] = {
    object: _ABSENT,
    dict: _OTHER,
    type(None): _NULL,
    bool: _FALSE,
    int: _NUMBER,
    float: _NUMBER,
    str: _STRING,
    list: _LIST,
}
_EXACT = 2.0**53  # from here on a float64 may stand for several integers
_FEW = 8  # values that are compared one after the other


@dataclass(frozen=True)
class Values:
    """The values of one field in some rows; never changed."""

    kinds: np.ndarray
    """(M,) uint8"""
    rows: np.ndarray | None
    """(M,) int32: the row that each value belongs to; None if each row has one"""
    num_rows: int
    numbers: "_Numbers | None"
    strings: "_Strings | None"

    @classmethod
    def of(cls, values: list[object]) -> Self:
        num_rows, rows = len(values), None
        kinds = _kinds(values)
        if (kinds == _LIST).any():
            rows, values = _flatten(values)
            kinds = _kinds(values)
        flags = np.flatnonzero(kinds == _FALSE)
        kinds[flags] = [_TRUE if values[i] else _FALSE for i in flags.tolist()]
        return cls(kinds, rows, num_rows, _Numbers.of(kinds, values), _Strings.of(kinds, values))

    def holds(self, condition: Condition) -> np.ndarray:
        """For which rows: bool (R,)."""
        if condition.operator == "exists":
            return ~self._of_rows(self.kinds == _ABSENT)
        matches = np.zeros(len(self.kinds), dtype=bool)
        for kind, values in _by_kind(condition.values).items():
            if kind not in (_NUMBER, _STRING):
                matches |= self.kinds == kind
            elif kind == _NUMBER and self.numbers:
                matches |= self.numbers.holds(condition.operator, values)
            elif kind == _STRING and self.strings:
                matches |= self.strings.holds(condition.operator, values)
        return self._of_rows(matches)

    def _of_rows(self, matches: np.ndarray) -> np.ndarray:
        """Rows (R,) of which any value (M,) matches."""
        if self.rows is None:
            return matches
        mask = np.zeros(self.num_rows, dtype=bool)
        mask[self.rows[matches]] = True
        return mask


@dataclass(frozen=True)
class _Numbers:
    """The numbers among a column's values."""

    floats: np.ndarray
    """(M,) float64, NaN where there is none; exact but for the integers below"""
    places: np.ndarray
    """of the integers of 64 bits that are too large to be exact in float64"""
    integers: np.ndarray
    """int64, at those places"""

    @classmethod
    def of(cls, kinds: np.ndarray, values: list[Any]) -> Self | None:
        at, numbers = _pick(kinds, values, _NUMBER)
        if not numbers:
            return None
        floats = np.full(len(values), np.nan)
        try:
            floats[at] = np.array(numbers, dtype=np.float64)
        except OverflowError:
            floats[at] = [_to_float(number) for number in numbers]
        floats += 0.0  # makes -0.0 a 0.0: Arrow tells them apart
        large = np.flatnonzero(np.abs(floats) >= _EXACT).tolist()
        large = [i for i in large if isinstance(values[i], int) and fits_int64(values[i])]
        integers = np.array([values[i] for i in large], dtype=np.int64)
        return cls(floats, np.array(large, dtype=np.int64), integers)

    def holds(self, operator: str, values: Sequence[Any]) -> np.ndarray:
        if operator == "in":
            matches = _equals_one(self.floats, [float(v) for v in values if float(v) == v])
        else:
            matches = _compare(operator, self.floats, _float_bound(operator, values[0]))
        if len(self.places):
            matches[self.places] = self._large_hold(operator, values)
        return matches

    def _large_hold(self, operator: str, values: Sequence[Any]) -> np.ndarray:
        if operator == "in":
            integers = [value for value in values if isinstance(value, int)]
            return _is_in(pa.array(self.integers), pa.array(integers, pa.int64()))
        return _compare(operator, self.integers, _integer_bound(operator, values[0]))


@dataclass(frozen=True)
class _Strings:
    """The strings among a column's values."""

    codes: np.ndarray
    """(M,) of the smallest signed integers that D fits; -1 where there is no string"""
    distinct: pa.LargeStringArray
    """(D,) what the codes stand for, in the order of code points"""

    @classmethod
    def of(cls, kinds: np.ndarray, values: list[Any]) -> Self | None:
        at, strings = _pick(kinds, values, _STRING)
        if not strings:
            return None
        found = pa.array(strings, pa.large_string()).dictionary_encode()
        order = pc.sort_indices(found.dictionary).to_numpy()  # by UTF-8, which is by code point
        rank = np.empty(len(order), dtype=np.min_scalar_type(-len(order)))
        rank[order] = np.arange(len(order))
        codes = np.full(len(values), -1, dtype=rank.dtype)
        codes[at] = rank[found.indices.to_numpy()]
        return cls(codes, found.dictionary.take(pa.array(order)))

    def holds(self, operator: str, values: Sequence[Any]) -> np.ndarray:
        if operator == "in":
            return self._is_one_of(values)
        first, after = self._find(values[0])
        if operator in ("gt", "gte"):
            return np.asarray(self.codes >= (after if operator == "gt" else first))
        return (self.codes < (first if operator == "lt" else after)) & (self.codes >= 0)

    def _is_one_of(self, values: Sequence[str]) -> np.ndarray:
        if len(values) == 1:
            first, after = self._find(values[0])
            return self.codes == first if first < after else np.zeros(len(self.codes), dtype=bool)
        is_wanted = np.zeros(len(self.distinct) + 1, dtype=bool)  # the last one is for code -1
        if len(values) > _FEW:
            is_wanted[:-1] = _is_in(self.distinct, pa.array(values, pa.large_string()))
        else:
            for first, after in map(self._find, values):
                is_wanted[first:after] = True
        return np.asarray(is_wanted[self.codes])

    def _find(self, string: str) -> tuple[int, int]:
        """The code of the first string that is not less, and of the first that is greater."""
        codes = range(len(self.distinct))
        first = bisect.bisect_left(codes, string, key=lambda code: self.distinct[code].as_py())
        is_there = first < len(codes) and self.distinct[first].as_py() == string
        return first, first + is_there


def _kinds(values: list[object]) -> np.ndarray:
    """(M,) uint8; true is still _FALSE."""
    return np.fromiter(map(_KINDS.__getitem__, map(type, values)), np.uint8, len(values))


def _flatten(values: list[object]) -> tuple[np.ndarray, list[object]]:
    """The row (M,) of each value, and the values, with lists replaced by their elements."""
    lists = [value if isinstance(value, list) else (value,) for value in values]
    rows = np.repeat(np.arange(len(values), dtype=np.int32), [len(each) for each in lists])
    return rows, list(chain.from_iterable(lists))


def _pick(kinds: np.ndarray, values: list[Any], kind: int) -> tuple[np.ndarray, list[Any]]:
    """Where values of that kind are, and those."""
    places = np.flatnonzero(kinds == kind)
    if len(places) == len(values):
        return places, values
    return places, [values[i] for i in places.tolist()]


def _by_kind(values: Iterable[Scalar]) -> dict[int, list[Scalar]]:
    found: dict[int, list[Scalar]] = {}
    for value in values:
        found.setdefault(_TRUE if value is True else _KINDS[type(value)], []).append(value)
    return found


def _to_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _equals_one(floats: np.ndarray, values: list[float]) -> np.ndarray:
    if len(values) > _FEW:
        return _is_in(pa.array(floats), pa.array(values))
    matches = np.zeros(len(floats), dtype=bool)
    for value in values:
        matches |= floats == value
    return matches


def _is_in(values: pa.Array, wanted: pa.Array) -> np.ndarray:
    """For which of the values: bool. Faster than numpy's by hashing."""
    return np.asarray(pc.is_in(values, value_set=wanted).to_numpy(zero_copy_only=False))


def _compare(operator: str, numbers: np.ndarray, bound: int | float) -> np.ndarray:
    return np.asarray(numbers >= bound if operator in ("gt", "gte") else numbers <= bound)


def _float_bound(operator: str, value: int | float) -> float:
    """The least float64 that gt or gte holds for, or the greatest that lt or lte holds for."""
    near = float(value)
    below = near if near <= value else math.nextafter(near, -math.inf)
    above = near if near >= value else math.nextafter(near, math.inf)
    if operator in ("gte", "lte"):
        return above if operator == "gte" else below
    return math.nextafter(below, math.inf) if operator == "gt" else math.nextafter(above, -math.inf)


def _integer_bound(operator: str, value: int | float) -> int:
    """The least integer that gt or gte holds for, or the greatest that lt or lte holds for."""
    if operator in ("gte", "lte"):
        return math.ceil(value) if operator == "gte" else math.floor(value)
    return math.floor(value) + 1 if operator == "gt" else math.ceil(value) - 1
