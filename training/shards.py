"""Records -> WebDataset shards and a manifest. Start at `pack`.

Every picture is decoded once, so that what is packed will decode in training; a bad one is listed
with its place and reason and left out. A pack that was cut short goes on where it stopped when the
same command is given again, and what it leaves is what it would have left without the cut.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain as concatenate
from pathlib import Path
from typing import Any

from clipserve.errors import DataError
from clipserve.files import sync
from clipserve.shards import UNFINISHED, write_manifest
from clipserve.shards.scan import scan
from clipserve.sources import BadRecord, Record, SourceOptions, count_records, read_source
from clipserve.storage import is_remote
from training.pack_samples import (
    BY_IMAGE,
    FATAL_ERRNO,
    Item,
    PackOptions,
    Sample,
    folder_of,
    to_samples,
)
from training.pack_state import (
    BAD_FILE,
    BadList,
    PackState,
    chain,
    claim,
    differing,
    load_state,
)
from training.shard_writer import Position, ShardWriter

__all__ = ["BAD_FILE", "PackOptions", "PackReport", "pack"]

Progress = Callable[[int, int | None], None]

_DEFAULT_OPTIONS = PackOptions()


@dataclass(frozen=True)
class PackReport:
    """What became of the source."""

    packed: dict[str, int]
    """samples written, by folder relative to OUT ("" without a split)"""
    bad_by_kind: dict[str, int]
    first_bad: list[BadRecord]
    """the first few; all are in OUT/bad_samples.jsonl"""

    @property
    def num_good(self) -> int:
        return sum(self.packed.values())

    @property
    def num_bad(self) -> int:
        return sum(self.bad_by_kind.values())

    @property
    def bad_fraction(self) -> float:
        total = self.num_good + self.num_bad
        return self.num_bad / total if total else 0.0


def pack(
    source: str | Path,
    out: Path,
    options: PackOptions = _DEFAULT_OPTIONS,
    progress: Progress | None = None,
) -> PackReport:
    """Write `source` as shards into `out`: new, empty, or left by the same pack cut short.

    Raises DataError. `progress(done, total)` is called with the number of records dealt with; the
    total is None where it takes long to tell. The bad ones are also in OUT/bad_samples.jsonl.
    """
    identity = _identify(source, options)
    _check_is_free(out)
    records = read_source(source, _source_options(options))
    first = next(records, None)  # what is wrong with the source is told before a folder is made
    if first is None:
        raise DataError(f"{source} has no usable sample: it is empty")
    total = count_records(source, options.source) if progress else None
    try:
        with claim(out):
            state = _begin(out, identity, options)
            numbered = _number(concatenate([first], records), source, state)
            return _Packing(out, state, options).run(source, numbered, progress, total)
    except OSError as error:
        if error.errno not in FATAL_ERRNO:
            raise
        raise DataError(
            f"{out}: {error.strerror}; make room and give the same command again: it goes on"
            " where it stopped"
        ) from None


class _Packing:
    """One run of `pack`, from the state of the last on."""

    def __init__(self, out: Path, state: PackState, options: PackOptions) -> None:
        self._out, self._state, self._options = out, state, options
        for name in {"", *options.folders}:
            for leftover in (out / name).glob("*.tmp"):
                leftover.unlink()
        state.save(out)
        self._bad = BadList(out, state.records, state.first_needed)
        self._writers = {
            name: ShardWriter(
                out / name,
                state.positions[name],
                options.samples_per_shard,
                options.bytes_per_shard,
            )
            for name in options.folders
        }
        for name in options.folders:
            if name:  # opening the folder alone is refused as well
                (out / name / UNFINISHED).touch()

    def run(
        self,
        source: str | Path,
        items: Iterator[Item],
        progress: Progress | None,
        total: int | None,
    ) -> PackReport:
        last = None
        try:
            todo = to_samples(self._skip_done(items), self._options)
            with contextlib.closing(todo):
                for last, result in todo:
                    self._take(last, result)
                    if progress:
                        progress(last.number, total)
            self._finish(last)
        finally:
            for writer in self._writers.values():
                writer.abandon()
            self._bad.close()
        return self._report(source)

    def _skip_done(self, items: Iterator[Item]) -> Iterator[Item]:
        """Leave out what finished shards and the list of bad records deal with already."""
        for item in items:
            if item.number > self._state.records or not self._is_done(item):
                yield item

    def _is_done(self, item: Item) -> bool:
        if item.number in self._bad.listed or isinstance(item.record, BadRecord):
            return True
        if item.number <= self._state.first_needed:
            return True
        if self._options.split_by == BY_IMAGE:
            return False  # its folder is not known before the picture is read
        folder = folder_of(item.record, b"", self._options)
        return item.number <= self._state.positions[folder].records

    def _take(self, item: Item, result: Sample | BadRecord) -> None:
        if isinstance(result, BadRecord):
            self._bad.add(item.number, result)
            return
        writer = self._writers[result.folder]
        if item.number > writer.position.records and writer.write(result.members):
            writer.finish_shard()
            self._save(item)

    def _save(self, item: Item) -> None:
        """Everything up to this record is on disk, or in the unfinished shard of another writer."""
        self._bad.sync()
        for writer in self._writers.values():
            if writer.is_between_shards:
                writer.move_to(item.number)
        positions = {name: writer.position for name, writer in self._writers.items()}
        is_ahead = item.number > self._state.records
        self._state = PackState(
            self._state.identity,
            positions,
            item.number if is_ahead else self._state.records,
            item.digest.hex() if is_ahead else self._state.digest,
        )
        self._state.save(self._out)

    def _finish(self, last: Item | None) -> None:
        for writer in self._writers.values():
            writer.finish_shard()
        if last is not None:
            self._save(last)

    def _report(self, source: str | Path) -> PackReport:
        packed = {name: writer.position.samples for name, writer in self._writers.items()}
        report = PackReport(packed, dict(self._bad.by_kind), self._bad.first)
        if not report.num_good:
            kinds = ", ".join(f"{count} {kind}" for kind, count in report.bad_by_kind.items())
            first = report.first_bad[0]
            raise DataError(
                f"{source} has no usable sample: {kinds}; the first: {first.origin}:"
                f" {first.reason}; all: {self._out / BAD_FILE}"
            )
        for name in self._options.folders:
            folder = self._out / name
            shards = [f"{number:06d}.tar" for number in range(self._writers[name].position.shards)]
            write_manifest(folder, *scan(folder, shards))
        for name in sorted(self._options.folders, reverse=True):
            (self._out / name / UNFINISHED).unlink(missing_ok=True)
        (self._out / UNFINISHED).unlink(missing_ok=True)
        sync(self._out)
        return report


def _identify(source: str | Path, options: PackOptions) -> dict[str, Any]:
    """What must be the same for a pack to go on; in terms of JSON."""
    path = Path(source)
    is_here = not is_remote(str(source)) and path.exists()
    found: dict[str, Any] = {"source": str(path.resolve() if is_here else source)}
    if is_here and path.is_file():
        found |= {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    named = asdict(options)
    del named["fetch"]  # patience does not change what a picture holds
    return found | {"options": json.loads(json.dumps(named, default=str))}


def _source_options(options: PackOptions) -> SourceOptions:
    column = options.split_column
    return replace(options.source, required_columns=(column,)) if column else options.source


def _check_is_free(out: Path) -> None:
    if not out.exists() or (out.is_dir() and (out / UNFINISHED).is_file()):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise DataError(f"{out} is not an empty folder; pack into a new one, or remove it first")


def _begin(out: Path, identity: dict[str, Any], options: PackOptions) -> PackState:
    """The state that an earlier run left, or a new one."""
    state = load_state(out)
    if state is None or not state.has_shards:
        for name in filter(None, state.positions if state else ()):
            shutil.rmtree(out / name, ignore_errors=True)  # this run may have no such folder
        return PackState(identity, {name: Position() for name in options.folders})
    if state.identity != identity:
        names = ", ".join(differing(state.identity, identity))
        raise DataError(
            f"{out} holds a half-made pack of {state.identity.get('source')} that differs in"
            f" {names}; give the command of that pack again, or remove {out}"
        )
    return state


def _number(
    records: Iterator[Record | BadRecord], source: str | Path, state: PackState
) -> Iterator[Item]:
    digest, number = b"", 0
    for number, record in enumerate(records, start=1):
        digest = chain(digest, record)
        if number == state.records and digest.hex() != state.digest:
            break
        yield Item(number, digest, record)
    else:
        if number >= state.records:
            return
    raise DataError(
        f"{source} has changed since the pack was begun; remove the folder and pack anew"
    )
