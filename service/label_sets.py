"""Lists of labels that a classification may name instead of sending them.

A TOML or JSON file holds `{name: [label, ...]}`; a folder has several of them. Names are looked up
in what was read at the start, and lead to no file. Start at `load_label_sets`.
"""

import json
import tomllib
from pathlib import Path

from clipserve.errors import ConfigError

LabelSets = dict[str, tuple[str, ...]]

_READERS = {".json": json.loads, ".toml": tomllib.loads}


def load_label_sets(path: Path | None, max_labels: int) -> LabelSets:
    """All sets of a file or a folder; ConfigError says which file is wrong, and why, also of a set
    larger than one classification may be."""
    sets: LabelSets = {}
    if path is None:
        return sets
    for file in _files(path):
        for name, labels in _read(file).items():
            if name in sets:
                raise ConfigError(f"label set {name!r} of {file} is there twice; rename one")
            if len(labels) > max_labels:
                raise ConfigError(
                    f"label set {name!r} of {file} has {len(labels)} labels; at most {max_labels}"
                    " are allowed in one classification: divide it, or raise CLIPSERVE_MAX_LABELS"
                )
            sets[name] = labels
    return sets


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not found:
            raise ConfigError(f"label_sets {path} holds no .json or .toml file; add one")
        return found
    if path.suffix not in _READERS:
        raise ConfigError(f"label_sets {path} is not .json or .toml, nor a folder of them")
    return [path]


def _read(file: Path) -> LabelSets:
    try:
        content = _READERS[file.suffix](file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"label sets {file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"label sets {file}: expected names with lists of labels")
    return {name: _check(file, name, labels) for name, labels in content.items()}


def _check(file: Path, name: str, labels: object) -> tuple[str, ...]:
    if not isinstance(labels, list) or not labels:
        raise ConfigError(f"label sets {file}: {name!r} must be a list of labels, at least one")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ConfigError(f"label sets {file}: {name!r} holds {label!r}, which is no label")
    return tuple(label.strip() for label in labels)
