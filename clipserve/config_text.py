"""The settings as text: a configuration as TOML, every field explained, a mistake as one line.

Knows nothing of a particular setting: `root` is the outermost table's class.
"""

import difflib
import json
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails


def to_toml(values: dict[str, Any]) -> str:
    """Nested plain values as TOML: all of it that a configuration needs."""
    return "\n".join(_toml_lines(values, prefix="")) + "\n"


def describe(root: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every setting below `root` as (dotted name, default, meaning), in the order of the file."""
    rows = []
    for name, field in root.model_fields.items():
        sections, is_list = _sections_in(field.annotation)
        if field.description:
            default = "required" if field.is_required() else str(field.default)
            rows.append((prefix + name, default, field.description))
        for section in sections:
            kinds = _kinds_of(section)
            inner = f"{prefix}{name}{'[]' if is_list else ''}."
            rows += describe(section, f"{inner}{'/'.join(kinds)}." if kinds else inner)
    return rows


def explain(item: ErrorDetails, root: type[BaseModel]) -> str:
    """What is wrong with one setting, with the nearest known name."""
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in item["loc"]]
        return f"unknown setting {location!r}; {nearest(name, _known_names(root, parents))}"
    if item["type"] == "union_tag_invalid":
        name, known = str(item["ctx"]["tag"]), item["ctx"]["expected_tags"].replace("'", "")
        return f"unknown objective {name!r}; {nearest(name, known.split(', '))}"
    if item["type"] == "union_tag_not_found":
        return f'{location} has no name; give name = "contrastive" or another objective'
    if item["type"] == "missing":
        return f"{location} is required"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if item["type"] == "value_error":
        return message
    return f"{location} = {item['input']!r}: {message}"


def nearest(name: str, known: list[str]) -> str:
    """A question about the most likely meaning, or all that is known."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"


def _sections_in(annotation: Any) -> tuple[list[type[BaseModel]], bool]:
    """The tables that a field may hold, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], False
    inner = [_sections_in(arg) for arg in get_args(annotation)]
    found = [section for sections, _ in inner for section in sections]
    is_list = get_origin(annotation) is tuple or any(within for _, within in inner)
    return found, bool(found) and is_list


def _kinds_of(section: type[BaseModel]) -> tuple[str, ...]:
    """The names by which one of several kinds of tables is chosen; () where there is one kind."""
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field and field.is_required() else ()


def _known_names(root: type[BaseModel], parents: list[str]) -> list[str]:
    kinds: list[type[BaseModel]] = [root]
    for part in parents:
        named = [kind for kind in kinds if part in _kinds_of(kind)]
        inner = [
            s
            for k in kinds
            if part in k.model_fields
            for s in _sections_in(k.model_fields[part].annotation)[0]
        ]
        kinds = named or inner or kinds
    return list(kinds[0].model_fields)


def _toml_lines(table: dict[str, Any], prefix: str) -> list[str]:
    """Plain values first, then sub-tables."""
    lines = []
    for key, value in table.items():
        if not isinstance(value, dict) and not _is_table_list(value):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        name = f"{prefix}{_toml_key(key)}"
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *_toml_lines(value, f"{name}.")]
        elif _is_table_list(value):
            for item in value:
                lines += ["", f"[[{name}]]", *_toml_lines(item, f"{name}.")]
    return lines


def _is_table_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _toml_value(key)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    assert isinstance(value, str)
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
