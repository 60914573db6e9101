"""The filter language of index/filters.py once more, in the plainest way: one row at a time."""

import math
from collections.abc import Iterator
from typing import Any

PATHS = {"a": ["a"], "b": ["b"], "n.x": ["n", "x"], r"a\.b": ["a.b"], r"\and": ["and"]}


def comparable(value: Any) -> tuple[str, Any]:
    if isinstance(value, bool) or value is None:
        return "flag", str(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        try:
            return "number", float(value)
        except OverflowError:
            return "number", math.inf if value > 0 else -math.inf
    if isinstance(value, int | float):
        return "number", value
    return ("text", value) if isinstance(value, str) else ("other", id(value))


def compares(operator: str, stored: Any, value: Any) -> bool:
    if operator == "in":
        return any(comparable(stored) == comparable(each) for each in value)
    (kind, one), (other_kind, other) = comparable(stored), comparable(value)
    if kind != other_kind or kind not in ("number", "text"):
        return False
    order = (one > other) - (one < other)
    return {"gt": order > 0, "gte": order >= 0, "lt": order < 0, "lte": order <= 0}[operator]


def condition_holds(operator: str, value: Any, stored: Any) -> bool:
    if operator == "ne":
        return not condition_holds("in", [value], stored)
    if operator == "eq":
        return condition_holds("in", [value], stored)
    if operator == "exists":
        return value is (stored is not ...)
    elements = stored if isinstance(stored, list) else [stored]
    return stored is not ... and any(compares(operator, each, value) for each in elements)


def reach(metadata: Any, name: str) -> Any:
    """What is there under a name; ... if nothing is."""
    for key in PATHS.get(name, [name]):
        metadata = metadata.get(key, ...) if isinstance(metadata, dict) else ...
    return metadata


def expected(filter: Any, metadata: Any) -> bool:
    """Whether a filter as JSON holds for metadata; dotted and escaped names are those of PATHS."""
    for name, content in filter.items():
        if name == "and":
            holds = all(expected(part, metadata) for part in content)
        elif name == "or":
            holds = any(expected(part, metadata) for part in content)
        elif name == "not":
            holds = not expected(content, metadata)
        else:
            stored = reach(metadata, name)
            operators = content if isinstance(content, dict) else {"eq": content}
            holds = all(condition_holds(o, value, stored) for o, value in operators.items())
        if not holds:
            return False
    return True


def conditions(filter: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, operator and value of each."""
    for name, content in filter.items():
        if name in ("and", "or", "not"):
            for part in [content] if name == "not" else content:
                yield from conditions(part)
        else:
            operators = content if isinstance(content, dict) else {"eq": content}
            yield from ((name, operator, value) for operator, value in operators.items())


def is_refused(filter: Any, rows: list[Any]) -> bool:
    """Whether a condition has numbers alone, for a field with texts and not one number."""
    for name, operator, value in conditions(filter):
        wanted = value if operator == "in" else [value]
        if operator == "exists" or {comparable(each)[0] for each in wanted} != {"number"}:
            continue
        stored = [reach(metadata, name) for metadata in rows]
        elements = [e for s in stored for e in (s if isinstance(s, list) else [s])]
        kinds = {comparable(each)[0] for each in elements}
        if "text" in kinds and "number" not in kinds:
            return True
    return False
