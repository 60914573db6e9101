"""What a source gives: records, bad records, and the options that say how to read them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Url:
    """A picture that is to be fetched: http or https."""

    address: str


@dataclass(frozen=True)
class Record:
    """One picture with its captions."""

    key: str
    """unique in its source"""
    origin: str
    """where it stands, for messages and provenance: "captions.csv row 17" """
    image: Path | bytes | Url
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """whatever else the source says of it, JSON-able"""


@dataclass(frozen=True)
class BadRecord:
    """A sample that cannot be used, and why. `kind` is countable, `reason` is for a person."""

    key: str
    origin: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SourceOptions:
    """Which parts of a source to use; None takes the first well-known name that is there."""

    image_column: str | None = None
    """holds a path, an http(s) URL, or the bytes of a file"""
    caption_column: str | None = None
    """one column, or several, comma separated: each gives captions"""
    id_column: str | None = None
    """its values become the keys; None numbers the rows: `captions/000000017`"""
    caption_template: str | None = None
    """makes the caption of columns: "{title}, {colour}"; a row with one of them empty is bad"""
    number_columns: str | None = None
    """one column, or several, comma separated, whose texts are made numbers: a CSV has no others"""
    group_by: str | None = None
    """joins neighbouring rows with the same value here into one record with all their captions"""
    split: str | None = None
    """only records whose field "split" has this value, or one of these, comma separated"""
    image_folder: Path | None = None
    """where relative picture paths begin; None: the folder of the table"""
    required_columns: tuple[str, ...] = ()
    """a table without one of these is refused, not read to its end for nothing"""

    @property
    def splits(self) -> tuple[str, ...]:
        """The wanted values of "split"; empty: all."""
        return tuple(name.strip() for name in (self.split or "").split(",") if name.strip())


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """White space folded, empty ones left out: one caption is one line."""
    return tuple(folded for text in texts if (folded := " ".join(text.split())))


def to_text(text: str) -> str:
    """The text with what is not UTF-8 in it written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def first_lines(bad: list[BadRecord], total: int | None = None, limit: int = 20) -> Iterator[str]:
    """The bad records for a person, the first `limit` of them; `total` if `bad` is not all."""
    for record in islice(bad, limit):
        yield f"{record.origin}: {record.kind}: {record.reason}"
    hidden = (len(bad) if total is None else total) - min(len(bad), limit)
    if hidden > 0:
        yield f"... and {hidden} more, not shown"
