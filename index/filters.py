r"""The filter language: JSON -> Filter, validated. Start at `parse`.

    {"color": "red"}                                     short for {"color": {"eq": "red"}}
    {"color": {"ne": "red"}, "price": {"gte": 2, "lt": 10}}        all of these hold
    {"and": [F, ...]}    {"or": [F, ...]}    {"not": F}            {} holds for every item
    {"size.width": {"exists": true}}                     into objects; {"tags": {"in": ["a", "b"]}}

A dot in a name leads into an object. A backslash takes the next character as it is: `a\.b` (in JSON
"a\\.b") is the key "a.b", `\and` the key "and", `\\` a backslash.

What holds, for the value that an item's metadata has under the name:

- `eq`, `in`: it equals the value, or one of them. Numbers equal numbers by value (1 is 1.0),
  strings strings, true and false themselves and never a number, null null. A missing value equals
  nothing.
- `gt`, `gte`, `lt`, `lte`: numbers with numbers, strings with strings by code point; for anything
  else, and for a missing value, they do not hold.
- `exists`: there is a value, null too.
- A list has the values of its elements: each of the above but `exists` holds if it does for one of
  them. Lists and objects inside a list, and objects, equal nothing and are not reached into.
- `ne` is the plain negation of `eq`, `not` of a filter: {"color": {"ne": "red"}} holds for an item
  without a color, and for a list of colors if none is red.

What comes out of a CSV is text, and {"price": {"lt": 50}} would hold for none of it, in silence. So
a condition all of whose values are numbers, on a field that has a text in some item of the
collection and a number in none, is a FilterError when it is applied (`Columns.mask`).

Numbers are compared exactly: integers of 64 bits, and floats; larger integers as the nearest float.
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from clipserve.errors import FilterError

MAX_DEPTH = 16
"""of `and`, `or` and `not` inside each other"""
MAX_CONDITIONS = 256
"""in one filter, those in the lists of `and` and `or` counted as well"""
MAX_VALUES = 10_000
"""in all `in` lists of a filter"""
MAX_TEXT_BYTES = 4096
"""of a name or a string"""

Scalar = str | int | float | bool | None
Path = tuple[str, ...]
"""the keys that lead to a value in an item's metadata"""

_ORDERED = ("gt", "gte", "lt", "lte")
_OPERATORS = ("eq", "ne", "in", *_ORDERED, "exists")
_SHOWN = 40  # characters of a name or value that an error repeats


class Filter:
    """A validated filter: `Condition`, `And`, `Or` or `Not`. Never changed once it is made.

    str() is its JSON in one canonical form: what differs in order and repetition alone is equal,
    has one hash, and may share a cache's entry. (1 and true are told apart, as Python does not.)
    """

    def __str__(self) -> str:
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def conditions(self) -> "Iterator[Condition]":
        """All that it is made of."""
        raise NotImplementedError

    def fields(self) -> frozenset[Path]:
        """Where in the metadata it looks."""
        return frozenset(condition.path for condition in self.conditions())

    @functools.cached_property
    def _key(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Condition(Filter):
    """One operator on the value at one path."""

    path: Path
    operator: str
    """in, gt, gte, lt, lte or exists; the others are written with these"""
    values: tuple[Scalar, ...]
    """of `in` any number, distinct; of `exists` none; else one, a string or a number"""

    def conditions(self) -> "Iterator[Condition]":
        yield self

    @functools.cached_property
    def is_numeric(self) -> bool:
        """Whether it holds for numbers alone."""
        numbers = (isinstance(v, int | float) and not isinstance(v, bool) for v in self.values)
        return bool(self.values) and all(numbers)

    def refuse_for_text(self) -> NoReturn:
        """FilterError for a field that holds texts and no number."""
        name, what_to_do = _to_name(self.path), "put numbers in"
        if len(self.path) == 1:
            what_to_do = f"embed again with --overwrite --number-columns {_name(self.path[0])}"
        raise FilterError(
            f"filter compares {_shown(name)} with the number {_shown(self.values[0])}, but no item"
            f" has a number there, and some have text; {what_to_do}, or compare with a text, in"
            " quotes"
        )

    @functools.cached_property
    def _key(self) -> str:
        content: dict[str, object] = {"in": self.values}
        if self.operator == "exists":
            content = {"exists": True}
        elif self.operator != "in":
            content = {self.operator: self.values[0]}
        elif len(self.values) == 1:
            content = {"eq": self.values[0]}
        return _to_json({_to_name(self.path): content})


@dataclass(frozen=True, eq=False)
class _Several(Filter):
    parts: tuple[Filter, ...]

    def conditions(self) -> "Iterator[Condition]":
        for part in self.parts:
            yield from part.conditions()

    @functools.cached_property
    def _key(self) -> str:
        return f'{{"{type(self).__name__.lower()}":[{",".join(map(str, self.parts))}]}}'


class And(_Several):
    """All of the parts hold; without parts it always does."""


class Or(_Several):
    """One of the parts holds; without parts it never does."""


@dataclass(frozen=True, eq=False)
class Not(Filter):
    """The part does not hold."""

    part: Filter

    def conditions(self) -> "Iterator[Condition]":
        return self.part.conditions()

    @functools.cached_property
    def _key(self) -> str:
        return f'{{"not":{self.part}}}'


def parse(value: object) -> Filter:
    """The filter that a decoded JSON value describes; FilterError says what is wrong where."""
    return _Parser().filter(value, "filter", 0)


def parse_text(text: str) -> Filter:
    """The filter that JSON text describes; a name given twice in an object is refused too."""
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise FilterError(
            f"filter {_shown(text)} is not JSON: {error}; write for example"
            ' {"color": "red", "price": {"lt": 10}}'
        ) from None
    return parse(value)


class _Parser:
    """Counts what one filter holds while it is read. `where` is the place that an error names."""

    def __init__(self) -> None:
        self._num_conditions = 0
        self._num_values = 0

    def filter(self, value: object, where: str, depth: int) -> Filter:
        if not isinstance(value, dict):
            _refuse(where, value, 'it must be an object such as {"color": "red"}')
        if depth > MAX_DEPTH:
            _refuse(where, value, f"and, or and not may be nested {MAX_DEPTH} deep")
        parts: list[Filter] = []
        for name, content in value.items():
            place = f"{where}.{_name(name)}"
            if name in ("and", "or"):
                parts.append(self._several(name, content, place, depth + 1))
            elif name == "not":
                parts.append(_negate(self.filter(content, place, depth + 1)))
            else:
                parts += self._conditions(_to_path(name, where), content, place)
        return _combine(And, parts)

    def _several(self, name: str, content: object, where: str, depth: int) -> Filter:
        if not isinstance(content, list | tuple):
            _refuse(where, content, "it must be a list of filters")
        parts = []
        for i, part in enumerate(content):
            self._count(where)
            parts.append(self.filter(part, f"{where}[{i}]", depth))
        return _combine(And if name == "and" else Or, parts)

    def _conditions(self, path: Path, content: object, where: str) -> list[Filter]:
        if not isinstance(content, dict):
            content = {"eq": content}
        elif not content:
            _refuse(where, content, f"it must have an operator: {', '.join(_OPERATORS)}")
        return [self._condition(path, name, value, where) for name, value in content.items()]

    def _condition(self, path: Path, operator: str, value: object, where: str) -> Filter:
        self._count(where)
        place = f"{where}.{_name(operator)}"
        if operator in ("eq", "ne"):
            equal = Condition(path, "in", (_scalar(value, place),))
            return _negate(equal) if operator == "ne" else equal
        if operator == "in":
            return Condition(path, "in", self._list(value, place))
        if operator in _ORDERED:
            return Condition(path, operator, (_ordered(value, place),))
        if operator == "exists":
            if not isinstance(value, bool):
                _refuse(place, value, "it must be true or false")
            exists = Condition(path, "exists", ())
            return exists if value else _negate(exists)
        raise FilterError(
            f"{where}: {_shown(operator)} is not an operator; use {', '.join(_OPERATORS)}, and"
            ' reach into an object with a dot: {"size.width": {"gt": 10}}'
        )

    def _list(self, value: object, where: str) -> tuple[Scalar, ...]:
        """Distinct, in the order of their JSON."""
        if not isinstance(value, list | tuple):
            _refuse(where, value, "it must be a list of strings, numbers, true, false or null")
        self._num_values += len(value)
        if self._num_values > MAX_VALUES:
            _refuse(
                where, value, f"a filter may list {MAX_VALUES} values in all; ask several times"
            )
        scalars = [_scalar(each, f"{where}[{i}]") for i, each in enumerate(value)]
        distinct = {_to_json(scalar): scalar for scalar in scalars}
        return tuple(scalar for _, scalar in sorted(distinct.items()))

    def _count(self, where: str) -> None:
        self._num_conditions += 1
        if self._num_conditions > MAX_CONDITIONS:
            raise FilterError(
                f"{where}: a filter may hold {MAX_CONDITIONS} conditions; write alternatives of one"
                " value with in, or ask several times"
            )


def _scalar(value: object, where: str) -> Scalar:
    """In the form that stands for all that equal it: 1 for 1.0."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | int | float):
        return _ordered(value, where)
    _refuse(where, value, "it must be a string, a number, true, false or null; for several use in")


def _ordered(value: object, where: str) -> str | int | float:
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(where, value, "it must be a string or a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(where, value, "a number must be finite")
    if isinstance(value, float) and not value.is_integer():
        return value
    return int(value) if fits_int64(int(value)) else number


def fits_int64(value: int) -> bool:
    """Whether it is compared as an integer, and not as the nearest float."""
    return -(2**63) <= value < 2**63


def _text(value: str, where: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        _refuse(where, value, "it must be Unicode text")
    if size > MAX_TEXT_BYTES:
        _refuse(where, value, f"it has {size} bytes, {MAX_TEXT_BYTES} are allowed")
    return value


def _to_path(name: object, where: str) -> Path:
    """The keys of a dotted name."""
    where = f"a name in {where}"
    if not isinstance(name, str):
        _refuse(where, name, "it must be a string")
    parts = [""]
    characters = iter(_text(name, where))
    for character in characters:
        if character == ".":
            parts.append("")
            continue
        if character == "\\":
            character = next(characters, "")
            if not character:
                _refuse(where, name, "a single backslash cannot be the end of it")
        parts[-1] += character
    if "" in parts:
        _refuse(
            where, name, r"it must be keys with dots between; write \. and \\ for . and \ in one"
        )
    return tuple(parts)


def _to_name(path: Path) -> str:
    name = ".".join(part.replace("\\", "\\\\").replace(".", "\\.") for part in path)
    return f"\\{name}" if name in ("and", "or", "not") else name


def _combine(kind: type[_Several], parts: Sequence[Filter]) -> Filter:
    """Nested ones of the same kind taken in, equal ones once, in the order of their keys."""
    distinct: dict[str, Filter] = {}
    for part in parts:
        for each in part.parts if isinstance(part, _Several) and type(part) is kind else (part,):
            distinct[str(each)] = each
    ordered = tuple(part for _, part in sorted(distinct.items()))
    return ordered[0] if len(ordered) == 1 else kind(ordered)


def _negate(part: Filter) -> Filter:
    return part.part if isinstance(part, Not) else Not(part)


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_shown(name)} is given twice in one object")
        found[name] = value
    return found


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _refuse(where: str, value: object, allowed: str) -> NoReturn:
    raise FilterError(f"{where} is {_shown(value)}; {allowed}")


def _shown(value: object) -> str:
    """A value on one line, cut short; of a large one no more is made than is shown."""
    if isinstance(value, dict | list | tuple) and len(value) > 0:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "an integer of more than 256 bits"
    if value is None or isinstance(value, bool):
        return _to_json(value)
    return _cut(repr(value[: _SHOWN + 1] if isinstance(value, str) else value))


def _name(value: object) -> str:
    """A name as a part of a place, on one line."""
    return _cut(repr(str(value))[1:-1])


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
