"""How a row's captions are made: from columns, or by a template such as "{title}, {colour}"."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any, Self

from clipserve.errors import ConfigError, DataError, SampleError
from clipserve.shards import is_utf8
from clipserve.sources.records import SourceOptions, clean_captions, to_text

CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "name")
_MAX_SHOWN = 30
_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def choose(
    where: str, columns: Sequence[str], wanted: str | None, known: tuple[str, ...], what: str
) -> str:
    """The column of that name, or else the first well-known one. Raises DataError."""
    name = wanted if wanted is not None else _first_known(columns, known)
    if name is None:
        raise DataError(
            f"{where} has no {what} column I know ({', '.join(known)}); it has:"
            f" {show_columns(columns)}; name it with --{what}-column"
        )
    found = sum(column == name for column in columns)
    if found == 0:
        near = get_close_matches(name, map(str, columns), 1)
        hint = f"; did you mean {to_text(near[0])!r}?" if near else ""
        raise DataError(f"{where} has no column {name!r}; it has: {show_columns(columns)}{hint}")
    if found > 1:
        raise DataError(f"{where} has {found} columns named {name!r}; rename all but one")
    return name


def split_names(text: str | None, columns: Iterable[str]) -> tuple[str, ...]:
    """Names of columns that are written with commas between."""
    if text is None:
        return ()
    if text in columns:  # its own name may hold a comma
        return (text,)
    return tuple(name.strip() for name in text.split(",") if name.strip())


def show_columns(columns: Iterable[str]) -> str:
    """Names for a message, not all of thousands."""
    shown = [to_text(str(column)) for column in islice(columns, _MAX_SHOWN + 1)]
    more = ", ..." if len(shown) > _MAX_SHOWN else ""
    return ", ".join(shown[:_MAX_SHOWN]) + more or "none"


class Template:
    """A text with column names in braces; `{{` and `}}` are braces themselves."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._pieces: list[tuple[str, str | None]] = []
        position = 0
        for match in _PIECES.finditer(text):
            literal, name = text[position : match.start()], match[1]
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif name is None or not name.strip():
                raise ConfigError(
                    f'caption template {text!r}: a brace without a column name; write "{{title}}",'
                    ' and "{{" or "}}" for a brace itself'
                )
            self._pieces.append((literal, name))
            position = match.end()
        self._pieces.append((text[position:], None))
        if not self.columns:
            raise ConfigError(f'caption template {text!r} names no column; write "{{title}}"')

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for _, name in self._pieces if name is not None)

    def fill(self, fields: Mapping[str, Any]) -> str:
        """Raises SampleError when one of the columns is empty."""
        return "".join(
            literal + (_words(fields, name) if name is not None else "")
            for literal, name in self._pieces
        )


@dataclass(frozen=True)
class CaptionRule:
    """Makes the captions of one row after another."""

    columns: tuple[str, ...]
    """hold captions, and so are no metadata"""
    template: Template | None = None

    @classmethod
    def for_table(cls, where: str, columns: Sequence[str], options: SourceOptions) -> Self:
        """Raises DataError, naming the columns there are, when one is missing."""
        if options.caption_template is not None:
            template = Template(options.caption_template)
            for name in template.columns:
                choose(where, columns, name, (), "caption")
            return cls((), template)
        names = split_names(options.caption_column, columns) or (None,)
        return cls(tuple(choose(where, columns, n, CAPTION_COLUMNS, "caption") for n in names))

    @classmethod
    def for_fields(cls, fields: Mapping[str, Any], options: SourceOptions) -> Self:
        """For samples whose fields differ from one to the next: what is missing is just empty."""
        if options.caption_template is not None:
            return cls((), Template(options.caption_template))
        names = split_names(options.caption_column, fields)
        known = _first_known(tuple(fields), CAPTION_COLUMNS)
        return cls(names or ((known,) if known else ()))

    def captions(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """At least one. Raises SampleError."""
        if self.template is not None:
            given = [self.template.fill(fields)]
        else:
            given = [text for name in self.columns for text in _texts(fields.get(name))]
        if not all(is_utf8(text) for text in given):
            raise SampleError(f"{self._where} is not UTF-8", "bad_caption")
        if any("\0" in text for text in given):
            raise SampleError(f"{self._where} holds a NUL byte", "bad_caption")
        captions = tuple(dict.fromkeys(clean_captions(given)))
        if not captions:
            raise SampleError(f"{self._where} is empty or no text", "empty_caption")
        return captions

    @property
    def _where(self) -> str:
        if self.template is not None:
            return "the caption made by the template"
        if not self.columns:
            return "the caption"
        return f"column {' and '.join(map(repr, self.columns))}"


def _first_known(columns: Sequence[str], known: tuple[str, ...]) -> str | None:
    by_lower = {str(column).lower().strip(): str(column) for column in reversed(columns)}
    return next((by_lower[name] for name in known if name in by_lower), None)


def _texts(value: Any) -> list[str]:
    given = value if isinstance(value, list | tuple) else [value]
    return [text for text in given if isinstance(text, str)]


def _words(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, list | tuple):
        value = ", ".join(str(part) for part in value if part not in (None, ""))
    if isinstance(value, str | int | float) and (text := str(value).strip()):
        return text
    raise SampleError(
        f"column {name!r} of the caption template is empty; there is: {show_columns(fields)}",
        "empty_field",
    )
