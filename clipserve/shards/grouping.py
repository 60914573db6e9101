"""The members of a shard -> its samples, and what is wrong with the others.

A sample is what WebDataset takes for one: the members whose names are equal up to the first dot.
Two things differ. Members of a sample need not be adjacent; and where the part behind the first dot
is no known extension but the part behind the last one is, as in `v1.0_img.jpg`, the last dot
counts.

Start at `read_part` and `group`. Damage never makes a sample poorer: one that may have lost a
member to it is named as bad instead.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from zlib import crc32

from clipserve.shards.manifest import MAX_IMAGE_BYTES, MAX_KEY_BYTES, MAX_TEXT_BYTES, BadSample
from clipserve.shards.tar import Damage, Member, Read

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_KINDS = {extension: "image" for extension in IMAGE_EXTENSIONS} | {"txt": "txt", "json": "json"}
_WORDS = {"image": "picture", "txt": "caption", "json": "JSON"}
_PIECE_BYTES = 2**20
_MIN_HOLE_BYTES = 16
# How a file of each format begins, and how it ends.
_ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82", b"GIF8": b";"}


@dataclass(frozen=True, slots=True)
class Content:
    """What reading a member's bytes told."""

    crc: int = 0
    image_hash: int = 0
    caption_bytes: int | None = None
    """of its longest caption, 0 if all are blank; None if it holds none"""
    problem: tuple[str, str] | None = None
    """kind and reason, if it cannot be used"""


@dataclass(frozen=True, slots=True)
class Part:
    """A member that belongs to a sample."""

    key: str
    stem: str
    """the name up to its first dot: the key, except where the last dot counts"""
    kind: str
    """image, txt or json"""
    extension: str
    offset: int
    size: int
    content: Content


@dataclass(slots=True)
class Row:
    """The parts of one sample."""

    key: str
    stem: str
    parts: dict[str, Part] = field(default_factory=dict)
    is_out_of_order: bool = False

    @property
    def missing(self) -> list[str]:
        """What a sample needs and this one lacks."""
        has_caption = "txt" in self.parts or (
            "json" in self.parts and self.parts["json"].content.caption_bytes is not None
        )
        return [k for k, has in (("image", "image" in self.parts), ("txt", has_caption)) if not has]

    @property
    def caption_bytes(self) -> int:
        """Of the longest caption: those in the JSON win."""
        counts = [self.parts[k].content.caption_bytes for k in ("json", "txt") if k in self.parts]
        return next((count for count in counts if count is not None), 0)


def read_part(member: Member, read: Read) -> Part | None:
    """Read a member and check it; None for one that is part of no sample."""
    place = _split_name(member.name)
    if place is None:
        return None
    key, stem, extension = place
    kind = _KINDS[extension]
    content = _read_image(member, read) if kind == "image" else _read_words(member, read, kind)
    return Part(key, stem, kind, extension, member.offset, member.size, content)


def group(
    shard: str, parts: Sequence[Part], damages: Sequence[tuple[int, Damage]]
) -> tuple[list[Row], list[BadSample]]:
    """Complete samples in their order, and the rest with the reason.

    A damage comes with the number of parts before it.
    """
    rows, repeated = _join_runs(_split_runs(parts))
    # Such as 000.seg.png beside 000.jpg: for other uses, and no half sample.
    extra = {
        key for key, row in rows.items() if row.missing and row.stem != key and row.stem in rows
    }
    beside = [_keys_beside(parts, at, extra) for at, _ in damages]
    lost = _find_lost(rows, extra, set().union(*beside))
    bad = [
        BadSample(shard, show(key), "repeated_key", "the key is used again; the first one counts")
        for key in repeated
    ]
    named: set[str] = set()
    for (_, damage), keys in zip(damages, beside, strict=True):
        if not keys & named:  # one sample hit twice is one bad sample
            bad += _name_damage(shard, damage, {k: lost[k] for k in sorted(keys) if k in lost})
        named |= keys & lost.keys()
    good = []
    for key, row in rows.items():
        if key in extra or key in lost:
            continue
        problem = _problem(row)
        if problem is None:
            good.append(row)
        else:
            bad.append(BadSample(shard, show(key)[:80], *problem))
    return good, bad


def show(key: str) -> str:
    """A key that can be printed, whatever its bytes."""
    return key.encode("utf-8", "backslashreplace").decode()


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: no byte that was not is hidden in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_captions(fields: dict[str, Any]) -> list[str] | None:
    """The "captions" of a sample's JSON, if that is a list of texts."""
    captions = fields.get("captions")
    if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
        return captions
    return None


def _split_name(name: str) -> tuple[str, str, str] | None:
    """Key, name up to the first dot, and extension of a member that may belong to a sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return None  # as in webdataset
    stem = folder + slash + stem
    if extension.lower() in _KINDS:
        return stem, stem, extension.lower()
    longest, _, last = name.rpartition(".")
    return (longest, stem, last.lower()) if last.lower() in _KINDS else None


def _read_image(member: Member, read: Read) -> Content:
    if member.size > MAX_IMAGE_BYTES:
        reason = f"its picture has {member.size} bytes; at most {MAX_IMAGE_BYTES} are allowed"
        return Content(problem=("long_image", reason))
    crc, digest, first, last = 0, blake2b(digest_size=8), b"", b""
    done = 0
    while done < member.size:
        piece = read(member.offset + done, min(_PIECE_BYTES, member.size - done))
        if not piece:
            return Content(problem=("cut", "the shard became shorter while it was read"))
        crc = crc32(piece, crc)
        digest.update(piece)
        first, last = first or piece[:_MIN_HOLE_BYTES], piece
        done += len(piece)
    image_hash = int.from_bytes(digest.digest(), "big")
    return Content(crc, image_hash, None, _check_ends(first, last))


def _check_ends(first: bytes, last: bytes) -> tuple[str, str] | None:
    """A hole of zeros over either end of a picture shows without decoding it."""
    if not last:
        return "bad_image", "its picture is empty (0 bytes)"
    if not first.strip(b"\0"):
        return "hole", "its picture begins with zeros"
    body = last.rstrip(b"\0")
    if len(last) - len(body) < _MIN_HOLE_BYTES:
        return None
    ending = next((end for magic, end in _ENDINGS.items() if first.startswith(magic)), b"")
    return None if body.endswith(ending) else ("hole", "its picture ends in zeros")


def _read_words(member: Member, read: Read, kind: str) -> Content:
    if member.size > MAX_TEXT_BYTES:
        reason = f"its {_WORDS[kind]} has {member.size} bytes; at most {MAX_TEXT_BYTES} are allowed"
        return Content(problem=("long_text", reason))
    data = read(member.offset, member.size)
    if len(data) < member.size:
        return Content(problem=("cut", "the shard became shorter while it was read"))
    count, problem = _check_text(data) if kind == "txt" else _check_json(data)
    return Content(crc32(data), 0, count, problem)


def _check_text(data: bytes) -> tuple[int, tuple[str, str] | None]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return 0, ("bad_caption", f"its caption is not UTF-8, at byte {error.start}")
    if "\0" in text:
        return 0, ("bad_caption", "its caption holds zero bytes")
    return (len(data) if text.strip() else 0), None


def _check_json(data: bytes) -> tuple[int | None, tuple[str, str] | None]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        return None, ("bad_json", f"its JSON cannot be read: {error}")
    if not isinstance(fields, dict):
        return None, ("bad_json", "its JSON is not an object")
    captions = parse_captions(fields)
    if captions is None:
        return None, None
    if not all(map(is_utf8, captions)):
        return 0, ("bad_caption", "a caption in its JSON cannot be written as UTF-8")
    return max((len(text.encode()) for text in captions if text.strip()), default=0), None


def _split_runs(parts: Iterable[Part]) -> Iterator[Row]:
    """Parts that stand together and have one key. A second picture of other format is extra."""
    stem: str | None = None
    together: dict[str, Row] = {}
    again: list[Row] = []
    for part in parts:
        if part.stem != stem:
            yield from (*together.values(), *again)
            stem, together, again = part.stem, {}, []
        row = together.setdefault(part.key, Row(part.key, part.stem))
        known = row.parts.setdefault(part.kind, part)
        if known is part or known.extension != part.extension:
            continue
        repeated = Row(part.key, part.stem, {part.kind: part})
        if row.missing:  # one member twice: a row of its own
            again.append(repeated)
        else:  # the sample again, right behind itself
            yield row
            together[part.key] = repeated
    yield from (*together.values(), *again)


def _join_runs(runs: Iterable[Row]) -> tuple[dict[str, Row], list[str]]:
    """One row for each key: its first complete run, or all of them joined; and keys used again."""
    by_key: dict[str, list[Row]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    rows, repeated = {}, []
    for key, found in by_key.items():
        rows[key] = base = next((run for run in found if not run.missing), found[0])
        is_repeated = False
        for run in found:
            if run is base:
                continue
            if run.parts.keys().isdisjoint(base.parts):
                base.parts |= run.parts
                base.is_out_of_order = True
            else:
                is_repeated = True
        if is_repeated:
            repeated.append(key)
    return rows, repeated


def _keys_beside(parts: Sequence[Part], at: int, extra: set[str]) -> set[str]:
    """The samples right before and behind a damage."""
    beside = parts[max(at - 1, 0) : at + 1]
    return {part.stem if part.key in extra else part.key for part in beside}


def _find_lost(rows: dict[str, Row], extra: set[str], touched: set[str]) -> dict[str, list[str]]:
    """What samples beside damage lack: what every sample needs, and what the shard's others have.

    Without the second, a sample whose JSON was lost would pass for one that never had any.
    """
    whole = [row for key, row in rows.items() if key not in touched and not row.missing]
    usual = set().union(*(row.parts for row in whole or rows.values()))
    lost = {}
    for key in touched - extra:
        has = rows[key].parts
        lacks = [kind for kind in _WORDS if kind in usual and kind not in has] or rows[key].missing
        if lacks:
            lost[key] = lacks
    return lost


def _name_damage(shard: str, damage: Damage, lost: dict[str, list[str]]) -> list[BadSample]:
    """By the samples that lost something to it, or else without a key."""
    if not lost:
        return [BadSample(shard, "", damage.kind, f"the shard {damage.reason}")]
    return [
        BadSample(
            shard,
            show(key),
            damage.kind,
            f"has no {' and '.join(_WORDS[kind] for kind in kinds)}: the shard {damage.reason}",
        )
        for key, kinds in lost.items()
    ]


def _problem(row: Row) -> tuple[str, str] | None:
    """Why a row is no sample: kind and reason."""
    if row.missing:
        return "half_sample", f"has no {' and '.join(_WORDS[kind] for kind in row.missing)}"
    if not is_utf8(row.key):
        return "bad_key", "its name is not UTF-8"
    if len(row.key.encode()) > MAX_KEY_BYTES:
        return "long_key", f"its name has over {MAX_KEY_BYTES} bytes"
    for part in row.parts.values():
        if part.content.problem:
            return part.content.problem
    return None if row.caption_bytes else ("empty_caption", "its caption is empty")
