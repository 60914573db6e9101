"""The files that clip-retrieval writes: parts of vectors and of metadata, aligned row by row.

    img_emb/img_emb_0000.npy, text_emb/text_emb_0000.npy, metadata/metadata_0000.parquet

As its writer (rom1504/clip-retrieval, clip_inference/writer.py, 07d747b) names them, but for more
leading zeros: readers pair the files of sorted folders.
"""

import logging
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from clipserve.errors import IndexStoreError

logger = logging.getLogger(__name__)

METADATA = "metadata"

_FOLDERS = {"image": "img_emb", "text": "text_emb", METADATA: METADATA}
_NUMBER = re.compile(r"(\d+)\.\w+$")
_MAX_SHOWN = 5


def new_part(folder: Path, kind: str, number: str) -> Path:
    """Where a part of a field, or of METADATA, goes; its folder is made."""
    name = _FOLDERS[kind]
    (folder / name).mkdir(exist_ok=True)
    return folder / name / f"{name}_{number}{_suffix(kind)}"


def find_parts(folder: Path) -> list[tuple[Path, dict[str, Path]]]:
    """Each part's metadata, and its vectors by field, in the order of their numbers.

    IndexStoreError, naming the files, where one has no counterpart.
    """
    found = {kind: numbered for kind in _FOLDERS if (numbered := _numbered(folder, kind))}
    if METADATA not in found or len(found) == 1:
        raise IndexStoreError(
            f"{folder} is not as clip-retrieval writes it: it needs metadata/*.parquet, and"
            " img_emb/*.npy or text_emb/*.npy"
        )
    numbers = sorted(set().union(*found.values()))
    for number in numbers:
        there = [files[number] for files in found.values() if number in files]
        lacking = [_FOLDERS[kind] for kind, files in found.items() if number not in files]
        if lacking:
            raise IndexStoreError(
                f"{there[0]} has no counterpart in {folder / lacking[0]}: its rows would be those"
                " of another part; make or fetch the missing file again"
            )
    gaps = [pair for pair in pairwise(numbers) if pair[1] - pair[0] > 1]
    if gaps:
        shown = ", ".join(f"{before} and {after}" for before, after in gaps[:_MAX_SHOWN])
        logger.warning("%s: parts are missing between %s", folder, shown)
    fields = [kind for kind in found if kind != METADATA]
    return [(found[METADATA][n], {field: found[field][n] for field in fields}) for n in numbers]


def open_npy(file: Path) -> np.ndarray:
    """A file of vectors, mapped into memory. IndexStoreError unless it is whole."""
    try:
        matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is Python source, and may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise IndexStoreError(f"{file} is no whole .npy file: {reason}") from None
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind != "f":
        raise IndexStoreError(f"{file} is no .npy file of floating point numbers")
    return matrix


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    """The parts of a kind by number."""
    parts: dict[int, Path] = {}
    for file in sorted((folder / _FOLDERS[kind]).glob(f"*{_suffix(kind)}")):
        match = _NUMBER.search(file.name)
        number = int(match[1]) if match else -1
        if match is None or number in parts:
            other = "has no number" if match is None else f"has the number of {parts[number].name}"
            raise IndexStoreError(f"{file} {other}; parts are named as in part_0000.npy")
        parts[number] = file
    return parts


def _suffix(kind: str) -> str:
    return ".parquet" if kind == METADATA else ".npy"
