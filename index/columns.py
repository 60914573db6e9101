"""The metadata columns of a collection in memory. Start at `Columns.mask`.

A row never changes and row numbers only grow, so what was read of a row stays true: a column is
read once, extended by the rows that came later, and asked by row number. Rows lie in segments that
are never changed; `values.py` has what a segment holds of one field.

Legend: N rows asked for, R rows of a segment.
"""

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import orjson

from clipserve.errors import IndexStoreError
from index.collection import BLOCK_ROWS, Item
from index.filters import And, Condition, Filter, Not, Or, Path
from index.values import MISSING, Values

SEGMENT_ROWS = 8 * BLOCK_ROWS
"""rows that are compared at a time: the arrays that a comparison makes stay in a core's cache"""
MAX_FIELDS = 16
"""columns that are kept, the latest used; more only for a filter that needs more"""

_DECODED_ROWS = (
    128  # few enough objects at a time not to wake Python's collector: 1.7 times as fast
)


class MetadataSource(Protocol):
    """What is used of a `Collection`."""

    def count(self) -> int: ...

    def metadata_blocks(self, after: int = 0) -> Iterator[tuple[np.ndarray, list[str]]]: ...

    def items_of(self, rowids: np.ndarray) -> dict[int, Item]: ...


class Columns:
    """The metadata of one collection as columns. Many threads may ask for masks.

    Memory, in bytes: 8 for each row, and for each row in each of at most MAX_FIELDS columns 1, with
    another 8 if it is a number (24 for integers beyond 2^53) or 1 to 4 if it is a string, beside 8
    and its UTF-8 for every string that is distinct in a segment. A value in a list takes 4 more.
    """

    def __init__(self, collection: MetadataSource) -> None:
        self._collection = collection
        self._table = _Table(frozenset(), ())
        self._loading = threading.Lock()
        self._recent: dict[Path, None] = {}
        """the columns in use, the latest used last"""
        self._counting = threading.Lock()

    def mask(self, filter: Filter, rowids: np.ndarray) -> np.ndarray:
        """Which rows (N,) the filter holds for: bool (N,).

        rowids, ascending, are those of the caller's snapshot of the collection; a row that is not
        there matches nothing. The first use of a field reads the metadata of all rows, 3 to 4 s of
        one core for a million; other threads that need to read meanwhile wait for it.
        IndexStoreError if it fails; the columns stay as they were. FilterError if the filter
        compares with numbers where these rows have texts, and no row of the snapshot a number.
        """
        fields = filter.fields()
        if not fields:
            return _Segment(rowids, {}).holds(filter)
        if not len(rowids):
            return np.zeros(0, dtype=bool)
        table = self._table_with(fields, int(rowids[-1]))
        mask, is_known = table.holds(filter, rowids)
        if is_known.all():
            self._refuse_text(filter, table, rowids)
        else:
            self._fill(mask, filter, rowids, np.flatnonzero(~is_known))
        return mask

    def _refuse_text(self, filter: Filter, table: "_Table", rowids: np.ndarray) -> None:
        """FilterError if it compares texts with a number, and no row, dead or alive, has one."""
        for condition in filter.conditions():
            if condition.is_numeric and table.has_only_text(condition.path, rowids):
                # The rows asked for may be the older ones; a later one may have a number.
                table = self._table_with(filter.fields(), table.last + 1)
                if table.has_only_text(condition.path, rowids):
                    condition.refuse_for_text()

    def _table_with(self, fields: frozenset[Path], last: int) -> "_Table":
        """With those columns, of the rows up to `last`."""
        kept = self._touch(fields)
        table = self._table
        if table.fields >= fields and table.last >= last:
            return table
        with self._loading:
            table = self._table
            if not table.fields >= fields:
                table = _Table(kept, tuple(self._read(kept)))
            elif table.last < last:
                table = self._extend(table, last)
            self._table = table
        return table

    def _touch(self, fields: frozenset[Path]) -> frozenset[Path]:
        """Note that they are used; returns them with the others that are worth keeping."""
        with self._counting:
            for path in sorted(fields):
                self._recent.pop(path, None)
                self._recent[path] = None
            for path in list(self._recent)[: -max(MAX_FIELDS, len(fields))]:
                del self._recent[path]
            return frozenset(self._recent)

    def _extend(self, table: "_Table", last: int) -> "_Table":
        """With the rows that came since; anew if most of it is dead.

        Segments at its end that are no longer than what comes are read again with it. So they stay
        few, and a row is read about as often as the logarithm of a segment's length.
        """
        if table.count() > 2 * self._collection.count() + SEGMENT_ROWS:
            return _Table(table.fields, tuple(self._read(table.fields)))
        segments = list(table.segments)
        coming = last - table.last
        while segments and len(segments[-1]) <= min(coming, SEGMENT_ROWS - 1):
            coming += len(segments.pop())
        segments += self._read(table.fields, after=segments[-1].last if segments else 0)
        return _Table(table.fields, tuple(segments))

    def _read(self, fields: Iterable[Path], after: int = 0) -> "Iterator[_Segment]":
        rowids: list[np.ndarray] = []
        values: dict[Path, list[object]] = {path: [] for path in fields}
        for numbers, texts in self._collection.metadata_blocks(after):
            for start in range(0, len(texts), _DECODED_ROWS):
                rows = slice(start, start + _DECODED_ROWS)
                metadata = _decode(numbers[rows], texts[rows])
                for path, column in values.items():
                    column += _reach(metadata, path)
            rowids.append(numbers)
            if sum(map(len, rowids)) >= SEGMENT_ROWS:
                yield _Segment.of(np.concatenate(rowids), values)
                rowids, values = [], {path: [] for path in values}
        if rowids:
            yield _Segment.of(np.concatenate(rowids), values)

    def _fill(
        self, mask: np.ndarray, filter: Filter, rowids: np.ndarray, places: np.ndarray
    ) -> None:
        """Set the mask where the columns, read later than the caller's snapshot, have no row."""
        for start in range(0, len(places), BLOCK_ROWS):
            items = self._collection.items_of(rowids[places[start : start + BLOCK_ROWS]])
            found = np.array(sorted(items), dtype=np.int64)
            metadata = [items[rowid].metadata for rowid in found.tolist()]
            values = {path: _reach(metadata, path) for path in filter.fields()}
            mask[np.searchsorted(rowids, found)] = _Segment.of(found, values).holds(filter)


@dataclass(frozen=True)
class _Table:
    """Some columns of the rows that were there when it was made; never changed."""

    fields: frozenset[Path]
    segments: "tuple[_Segment, ...]"

    @property
    def last(self) -> int:
        return self.segments[-1].last if self.segments else 0

    def count(self) -> int:
        return sum(map(len, self.segments))

    def holds(self, filter: Filter, rowids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mask (N,), and for which of the rows (N,) it is known."""
        mask, is_known = np.zeros((2, len(rowids)), dtype=bool)
        for segment in self.segments:
            start = np.searchsorted(rowids, segment.rowids[0])
            rows = slice(start, np.searchsorted(rowids, segment.last, "right"))
            wanted = rowids[rows]
            if not len(wanted):
                continue
            holds = segment.holds(filter)
            if np.array_equal(wanted, segment.rowids):
                mask[rows], is_known[rows] = holds, True
                continue
            places = _places(segment.rowids, wanted)
            is_known[rows] = segment.rowids[places] == wanted
            mask[rows] = holds[places] & is_known[rows]
        return mask, is_known

    def has_only_text(self, path: Path, rowids: np.ndarray) -> bool:
        """Whether one of those rows (N,) has a text there, and no row of the table a number."""
        columns = [segment.columns[path] for segment in self.segments]
        if any(values.numbers for values in columns):
            return False
        any_text = Condition(path, "gte", ("",))
        return any(v.strings for v in columns) and bool(self.holds(any_text, rowids)[0].any())


@dataclass(frozen=True)
class _Segment:
    """Columns of consecutive rows; never changed."""

    rowids: np.ndarray
    """(R,) ascending"""
    columns: dict[Path, Values]

    @classmethod
    def of(cls, rowids: np.ndarray, values: dict[Path, list[object]]) -> Self:
        return cls(rowids, {path: Values.of(column) for path, column in values.items()})

    def __len__(self) -> int:
        return len(self.rowids)

    @property
    def last(self) -> int:
        return int(self.rowids[-1])

    def holds(self, filter: Filter) -> np.ndarray:
        """For which rows: bool (R,), the caller's own."""
        if isinstance(filter, Condition):
            return self.columns[filter.path].holds(filter)
        if isinstance(filter, Not):
            return ~self.holds(filter.part)
        assert isinstance(filter, And | Or)
        is_and = isinstance(filter, And)
        mask = np.full(len(self), is_and)
        for part in filter.parts:
            (np.logical_and if is_and else np.logical_or)(mask, self.holds(part), out=mask)
        return mask


def _places(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """np.searchsorted, by a table where that is faster: many values, and few gaps between.

    The values, ascending, are not below the first nor above the last.
    """
    span = int(ascending[-1] - ascending[0]) + 1
    if span > 4 * len(ascending) or len(values) * 16 < len(ascending):
        return np.asarray(np.searchsorted(ascending, values))
    place = np.zeros(span + 1, dtype=np.int32)
    place[ascending - ascending[0] + 1] = 1
    return np.asarray(np.cumsum(place, dtype=np.int32)[values - ascending[0]])


def _decode(rowids: np.ndarray, texts: list[str]) -> list[Any]:
    try:
        return [orjson.loads(text) for text in texts]
    except orjson.JSONDecodeError:
        pass  # it takes no integers beyond float64, and no very deep nesting
    decoded = []
    for rowid, text in zip(rowids.tolist(), texts, strict=True):
        try:
            decoded.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise IndexStoreError(
                f"the metadata of row {rowid} cannot be read: {error}; put its item in again"
            ) from None
    return decoded


def _reach(values: list[Any], path: Path) -> list[object]:
    """What lies at the path in each; a dot leads into objects alone."""
    for key in path:
        values = [v.get(key, MISSING) if type(v) is dict else MISSING for v in values]
    return values
