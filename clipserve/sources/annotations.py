"""JSON files of captions as COCO, Karpathy's splits and BLIP publish them -> records.

    COCO        {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption"}]}
    Karpathy    {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
    a list      [{"image", "caption"}, ...]

Such a file has to be held in memory whole. Pictures lie beside it, or in `image_folder`; for COCO's
own, `image_column="coco_url"` fetches them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipserve.errors import DataError
from clipserve.sources.records import BadRecord, Record, SourceOptions
from clipserve.sources.rows import Row
from clipserve.sources.tables import read_objects

_MAX_BYTES = 2 * 2**30


def read_annotations(path: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Raises DataError when the file is none of these."""
    content = _load(path)
    if isinstance(content, list):
        rows = _list_rows(path, content)
    elif _is_karpathy(content):
        rows = _karpathy_rows(path, content["images"])
    elif isinstance(content, dict) and _are_lists(content, "images", "annotations"):
        rows = _coco_rows(path, content["images"], content["annotations"])
    else:
        raise DataError(
            f"{path} is neither COCO (images, annotations), nor Karpathy (images with sentences),"
            ' nor a list of {"image", "caption"}'
        )
    if not isinstance(content, list) and options.caption_template is None:
        options = replace(options, caption_column=options.caption_column or "captions")
    yield from read_objects(path, rows, options)


def _load(path: Path) -> Any:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise DataError(f"{path} has {size} bytes, at most {_MAX_BYTES}; make it .jsonl instead")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _is_karpathy(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and _are_lists(content, "images")
        and any(isinstance(entry, dict) and "sentences" in entry for entry in content["images"])
    )


def _are_lists(content: dict[str, Any], *names: str) -> bool:
    return all(isinstance(content.get(name), list) for name in names)


def _list_rows(path: Path, entries: list[Any]) -> Iterator[Row | BadRecord]:
    for number, entry in enumerate(entries):
        yield _row(path, number, "entry", entry)


def _karpathy_rows(path: Path, images: list[Any]) -> Iterator[Row | BadRecord]:
    for number, entry in enumerate(images):
        row = _row(path, number, "image", entry)
        if isinstance(row, Row):
            fields = {k: v for k, v in row.fields.items() if k not in ("sentences", "sentids")}
            sentences = row.fields.get("sentences")
            given = sentences if isinstance(sentences, list) else []
            captions = [sentence.get("raw") for sentence in given if isinstance(sentence, dict)]
            name, folder = fields.get("filename"), fields.get("filepath")
            if isinstance(name, str) and isinstance(folder, str):
                name = f"{folder}/{name}"
            row = replace(row, fields={"image": name} | fields | {"captions": captions})
        yield row


def _coco_rows(path: Path, images: list[Any], annotations: list[Any]) -> Iterator[Row | BadRecord]:
    captions: dict[str, list[Any]] = defaultdict(list)
    places: dict[str, int] = {}
    for number, annotation in enumerate(annotations):
        is_whole = isinstance(annotation, dict) and "image_id" in annotation
        if not is_whole or not isinstance(annotation.get("caption"), str):
            reason = "it has no image_id or no caption"
            yield BadRecord(_key(path, number), _origin(path, number), "bad_row", reason)
            continue
        image_id = str(annotation["image_id"])
        captions[image_id].append(annotation["caption"])
        places.setdefault(image_id, number)
    for number, entry in enumerate(images):
        row = _row(path, number, "image", entry)
        if isinstance(row, Row):
            row = replace(
                row, fields=row.fields | {"captions": captions.pop(str(row.fields.get("id")), [])}
            )
        yield row
    for image_id in captions:
        number = places[image_id]
        reason = f"it names image {image_id[:80]!r}, which is not there or there twice"
        yield BadRecord(_key(path, number), _origin(path, number), "missing_image", reason)


def _row(path: Path, number: int, what: str, entry: Any) -> Row | BadRecord:
    origin = f"{path.name} {what} {number}"
    if not isinstance(entry, dict):
        return BadRecord(_key(path, number), origin, "bad_row", "not a JSON object")
    return Row(_key(path, number), origin, entry)


def _key(path: Path, number: int) -> str:
    return f"{path.stem}/{number:09d}"


def _origin(path: Path, number: int) -> str:
    return f"{path.name} annotation {number}"
