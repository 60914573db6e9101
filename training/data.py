"""From the [data] settings to sets of shards. Start at `open_data`.

A source that is not shards (a table, a folder of pictures) is packed into OUT/shards once and read
from there: training needs any sample at any time, checked and at a known place.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipserve.config import Config, DataConfig
from clipserve.errors import ConfigError, DataError, SampleError
from clipserve.files import sha256, write_atomic
from clipserve.shards import MANIFEST, UNFINISHED, ShardSet, is_shard_source
from clipserve.sources import SourceOptions, read_source
from clipserve.storage import ShardCache, cache_root, is_remote
from training.mixture import Mixture, WeightedShards
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack

logger = logging.getLogger(__name__)

_SAMPLES_LOOKED_AT = 64
REMOTE_SHUFFLE_SHARDS = 8
"""shards mixed at a time where they are fetched, if not said otherwise"""


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is measured on."""

    train: Mixture
    val: ShardSet | None


def open_data(config: Config, directory: RunDirectory, is_main: bool = True) -> Data:
    """Open all sets of shards; the main process packs those sources that are none before.

    Raises DataError.
    """
    _warn_of_unused(config.data)
    settings = config.data
    cache_folder = Path(settings.cache_dir) if settings.cache_dir else cache_root()
    cache = ShardCache(cache_folder / "shards", int(settings.cache_gb * 2**30))
    packer = _Packer(settings, directory, is_main)
    sets = [
        WeightedShards(
            ShardSet.open(packer.as_shards(item.path, f"train-{number}"), cache), item.weight
        )
        for number, item in enumerate(settings.train)
    ]
    for part in sets:
        _warn_of_small_cache(part.shards, settings)
    train = Mixture(sets)
    _check_fields(config, train)
    return Data(train, _open_val(packer, cache))


def _check_fields(config: Config, data: Mixture) -> None:
    """A field that no sample has is a mistake, and one that no objective asks for is not used."""
    asked = {same for o in config.objectives for same in getattr(o, "positives", ())}
    for name, same in (("label_field", "label"), ("picture_field", "picture")):
        field = getattr(config.data, name)
        if field is None:
            continue
        if same not in asked:
            logger.warning('data.%s is not used: no objective has positives with "%s"', name, same)
            continue
        looked_at = np.linspace(0, len(data) - 1, _SAMPLES_LOOKED_AT).astype(int).tolist()
        found = [_fields_of(data, number) for number in looked_at]
        if not any(field in fields for fields in found):
            known = sorted({key for fields in found for key in fields})
            raise DataError(
                f"data.{name} = {field!r}: no sample of {data.name} that was looked at has it;"
                f" they have {', '.join(known) or 'no fields'}"
            )


def _fields_of(data: Mixture, sample: int) -> Mapping[str, Any]:
    try:
        return data.read(sample).metadata
    except SampleError:
        return {}


def _open_val(packer: "_Packer", cache: ShardCache) -> ShardSet | None:
    if packer.settings.val is not None:
        location = packer.as_shards(packer.settings.val, "val")
    elif packer.settings.val_fraction:
        location = str(packer.folder / "train-0" / "val")
    else:
        return None
    val = ShardSet.open(location, cache)
    if not len(val):
        raise DataError(f"{location} holds no samples to validate on; leave it out or fill it")
    return val


@dataclass(frozen=True)
class _Packer:
    """Makes shards of sources that are none, under OUT/shards."""

    settings: DataConfig
    directory: RunDirectory
    is_main: bool

    @property
    def folder(self) -> Path:
        return self.directory.path / "shards"

    def as_shards(self, location: str, name: str) -> str:
        """Where the shards of a training or validation set are."""
        held_out = self.settings.val_fraction if name != "val" else 0.0
        if is_shard_source(location) or is_remote(location):
            if held_out:
                raise ConfigError(
                    f"data.val_fraction holds out of a source, but {location} is shards already;"
                    " pack them with --val-fraction and name data.val"
                )
            return location
        folder = self.folder / name
        if self.is_main:
            self._pack_once(location, folder, held_out)
        return str(folder / "train" if held_out else folder)

    def _pack_once(self, location: str, folder: Path, held_out: float) -> None:
        """Pack, or see that what was packed is still what `location` holds."""
        columns = SourceOptions(
            image_column=self.settings.image_column,
            caption_column=self.settings.caption_column,
            caption_template=self.settings.caption_template,
        )
        read_source(location, columns)  # what is wrong with it is told before anything is written
        options = PackOptions(source=columns, val_fraction=held_out)
        note = folder.with_name(f"{folder.name}.source.json")
        identity = {"source": location, "options": asdict(options), "stamp": _stamp(location)}
        text = json.dumps(identity, indent=1, default=str)
        if note.exists() and note.read_text() != text:
            raise DataError(
                f"{location} or its columns changed since {folder} was packed; train into another"
                f" `out`, or remove {folder} and {note.name}"
            )
        if not note.exists():
            with self.directory.lock():
                self._pack(location, folder, options)
                write_atomic(note, text)

    def _pack(self, location: str, folder: Path, options: PackOptions) -> None:
        manifest = folder / ("val" if options.val_fraction else "") / MANIFEST
        if manifest.exists() and not (folder / UNFINISHED).exists():
            return  # killed before the note was written
        logger.info("packing %s into %s", location, folder)
        report = pack(location, folder, options)
        logger.info("packed %d samples, %d bad", report.num_good, report.num_bad)
        if report.bad_fraction > self.settings.max_bad_fraction:
            logger.warning("%.1f%% of %s is bad", 100 * report.bad_fraction, location)


def _stamp(location: str) -> list[object]:
    """What tells a changed source: a file's digest; count, sizes and newest time in a folder."""
    path = Path(location)
    if path.is_file():
        return [sha256(path)]
    if not path.is_dir():
        return []
    found = [file.stat() for file in path.rglob("*") if file.is_file()]
    newest = max((file.st_mtime_ns for file in found), default=0)
    return [len(found), sum(file.st_size for file in found), newest]


def _warn_of_unused(settings: DataConfig) -> None:
    """Settings of sources have no meaning where all is shards already."""
    locations = [item.path for item in settings.train] + [settings.val or ""]
    if any(path and not is_shard_source(path) and not is_remote(path) for path in locations):
        return
    for name in ("image_column", "caption_column", "caption_template"):
        if getattr(settings, name) is not None:
            logger.warning(
                "data.%s is not used: all data is shards already; see data.caption_fields", name
            )


def _warn_of_small_cache(shards: ShardSet, settings: DataConfig) -> None:
    if not shards.is_remote:
        return
    window = 2 * (settings.shuffle_shards or REMOTE_SHUFFLE_SHARDS)
    largest = sorted((shard.num_bytes for shard in shards.manifest.shards), reverse=True)[:window]
    needed = sum(largest) / 2**30
    if needed > settings.cache_gb:
        logger.warning(
            "data.cache_gb = %g is less than %d shards of %s, %.1f GB: some will be fetched twice",
            settings.cache_gb,
            len(largest),
            shards.location,
            needed,
        )
