"""A folder of pictures -> records: captions beside them, or a folder for each class.

    shoes/1.jpg, shoes/1.txt     one caption a line
    shoes/1.jpg, shoes/1.json    "caption" or "captions", and any metadata
    red_shoe/1.jpg               no side file anywhere: the caption is "red shoe"

Links to folders are followed, but no folder is read twice. Names that begin with a dot are passed
over: systems leave thumbnails and notes under such names.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipserve.errors import DataError, SampleError
from clipserve.shards import is_utf8
from clipserve.shards.manifest import MAX_TEXT_BYTES
from clipserve.sources.captions import CaptionRule, split_names
from clipserve.sources.records import IMAGE_SUFFIXES, BadRecord, Record, SourceOptions, to_text
from clipserve.sources.rows import is_in_split, to_metadata


@dataclass(frozen=True)
class _Listing:
    """The names in one folder."""

    folder: Path
    files: list[str]
    again: list[str]
    """links to folders that were read before"""


def read_folder(root: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Every picture below `root`. Raises DataError when there is none."""
    found = False
    is_by_class = _is_by_class(root)
    for listing in _walk(root):
        for name in listing.again:
            shown = _show((listing.folder / name).relative_to(root))
            reason = "it leads to a folder that was read already"
            yield BadRecord(shown, shown, "linked_folder", reason)
        if is_by_class:
            records = _read_class(root, listing, options)
        else:
            records = _read_captioned(root, listing, options)
        for record in records:
            found = True
            if record is not None:
                yield record
    if not found:
        raise DataError(f"folder {root} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")


def _is_by_class(root: Path) -> bool:
    """Whether pictures lie in subfolders, and none has a side file."""
    has_classes = False
    for listing in _walk(root):
        stems = {Path(name).stem for name in _pictures(listing)}
        if any(
            name.endswith((".txt", ".json")) and Path(name).stem in stems for name in listing.files
        ):
            return False
        has_classes = has_classes or (bool(stems) and listing.folder != root)
    return has_classes


def _read_class(
    root: Path, listing: _Listing, options: SourceOptions
) -> Iterator[Record | BadRecord | None]:
    label = listing.folder.name
    for name in _pictures(listing):
        relative = (listing.folder / name).relative_to(root)
        key = _show(relative)
        if listing.folder == root:
            reason = "no side file has its caption, and it lies in no class's folder"
            yield BadRecord(key, key, "missing_caption", reason)
        elif not is_utf8(str(relative)):
            yield BadRecord(key, key, "bad_key", "its name is not UTF-8")
        else:
            fields = {"caption": label.replace("_", " "), "label": label}
            yield _record(key, key, listing.folder / name, fields, options)


def _read_captioned(
    root: Path, listing: _Listing, options: SourceOptions
) -> Iterator[Record | BadRecord | None]:
    stems: set[str] = set()
    for name in _pictures(listing):
        path = listing.folder / name
        relative = path.relative_to(root)
        key, origin = _show(relative.with_suffix("")), _show(relative)
        if not is_utf8(str(relative)):
            yield BadRecord(key, origin, "bad_key", "its name is not UTF-8")
        elif path.stem in stems:
            yield BadRecord(key, origin, "repeated_key", "another picture has the same side file")
        else:
            stems.add(path.stem)
            try:
                yield _record(key, origin, path, _side_fields(path), options)
            except SampleError as error:
                yield BadRecord(key, origin, error.kind, str(error))


def _record(
    key: str, origin: str, image: Path, fields: dict[str, Any], options: SourceOptions
) -> Record | BadRecord | None:
    """None: of another split."""
    if not is_in_split(fields, options.splits):
        return None
    rule = CaptionRule.for_fields(fields, options)
    try:
        captions = rule.captions(fields)
        numbers = split_names(options.number_columns, fields)
        metadata = to_metadata(fields, ["caption", *rule.columns], numbers)
        return Record(key, origin, image, captions, metadata)
    except SampleError as error:
        return BadRecord(key, origin, error.kind, str(error))


def _side_fields(image: Path) -> dict[str, Any]:
    """What .json and .txt beside a picture say; the caption in .txt counts more."""
    text, side = _read_small(image.with_suffix(".txt")), _read_small(image.with_suffix(".json"))
    if text is None and side is None:
        raise SampleError(f"no {image.stem}.txt or .json beside it", "missing_caption")
    fields: dict[str, Any] = {}
    if side is not None:
        try:
            fields = json.loads(side)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{image.stem}.json is not JSON: {error}", "bad_json") from None
        if not isinstance(fields, dict):
            raise SampleError(f"{image.stem}.json is not a JSON object", "bad_json")
    if text is not None:
        try:
            fields["caption"] = text.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise SampleError(f"{image.stem}.txt is not UTF-8", "bad_caption") from None
    return fields


def _read_small(path: Path) -> bytes | None:
    """None when there is no such file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SampleError(f"{path.name} is not a regular file", "missing_caption")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SampleError(f"{path.name}: {error.strerror}", "missing_caption") from None
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError(f"{path.name} is over {MAX_TEXT_BYTES} bytes", "long_text")
    return data


def _pictures(listing: _Listing) -> Iterator[str]:
    return (name for name in listing.files if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _walk(root: Path) -> Iterator[_Listing]:
    """A folder, then its subfolders by name; real ones before links."""
    waiting = [root]
    seen = {_identity(root)}
    while waiting:
        folder = waiting.pop()
        with os.scandir(folder) as entries:
            shown = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        files = [entry.name for entry in shown if not _is_folder(entry)]
        folders = sorted((e for e in shown if _is_folder(e)), key=lambda e: e.is_symlink())
        below: list[str] = []
        again: list[str] = []
        for entry in folders:
            identity = _identity(Path(entry.path))
            (again if identity in seen else below).append(entry.name)
            seen.add(identity)
        yield _Listing(folder, files, again)
        waiting += [folder / name for name in reversed(below)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False  # a link to itself


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _show(path: Path) -> str:
    return to_text(path.as_posix())
