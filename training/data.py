"""From the [data] settings to sets of shards. Start at `open_data`.

A source that is not shards (a table, a folder of pictures) is packed into OUT/shards once and read
from there: training needs any sample at any time, checked and at a known place.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from clipserve.config import Config, DataConfig
from clipserve.errors import ConfigError, DataError
from clipserve.files import write_atomic
from clipserve.shards import MANIFEST, ShardSet, is_shard_source
from clipserve.sources import SourceOptions, read_source
from clipserve.storage import ShardCache, cache_root
from training.mixture import Mixture, WeightedShards
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is measured on."""

    train: Mixture
    val: ShardSet | None


def open_data(config: Config, directory: RunDirectory) -> Data:
    """Open all sets of shards; pack those sources that are none. Raises DataError."""
    settings = config.data
    cache_folder = Path(settings.cache_dir) if settings.cache_dir else cache_root()
    cache = ShardCache(cache_folder / "shards", int(settings.cache_gb * 2**30))
    sets = [
        WeightedShards(
            ShardSet.open(_as_shards(item.path, f"train-{number}", settings, directory), cache),
            item.weight,
        )
        for number, item in enumerate(settings.train)
    ]
    val = _open_val(settings, directory, cache)
    return Data(Mixture(sets), val)


def _open_val(settings: DataConfig, directory: RunDirectory, cache: ShardCache) -> ShardSet | None:
    if settings.val is not None:
        location = _as_shards(settings.val, "val", settings, directory)
    elif settings.val_fraction:
        location = str(directory.path / "shards" / "train-0" / "val")
    else:
        return None
    val = ShardSet.open(location, cache)
    if not len(val):
        raise DataError(f"{location} holds no samples to validate on; leave it out or fill it")
    return val


def _as_shards(location: str, name: str, settings: DataConfig, directory: RunDirectory) -> str:
    """Where the shards of a training or validation set are; packed first if it is a source."""
    held_out = settings.val_fraction if name != "val" else 0.0
    if is_shard_source(location):
        if held_out:
            raise ConfigError(
                f"data.val_fraction holds out of a source, but {location} is shards already; pack"
                " them with --val-fraction and name data.val"
            )
        return location
    columns = SourceOptions(
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption_template=settings.caption_template,
    )
    read_source(location, columns)  # what is wrong with it is told before anything is written
    folder = directory.path / "shards" / name
    with directory.lock():
        _pack_once(location, folder, PackOptions(source=columns, val_fraction=held_out), settings)
    return str(folder / "train" if held_out else folder)


def _pack_once(location: str, folder: Path, options: PackOptions, settings: DataConfig) -> None:
    """Pack, or see that what was packed is still what `location` holds."""
    note = folder.with_name(f"{folder.name}.source.json")
    identity = {"source": location, "options": asdict(options), "stamp": _stamp(location)}
    text = json.dumps(identity, indent=1, default=str)
    if note.exists():
        if note.read_text() != text:
            raise DataError(
                f"{location} or its columns changed since {folder} was packed; train into another"
                f" `out`, or remove {folder} and {note.name}"
            )
        return
    logger.info("packing %s into %s", location, folder)
    if not _is_packed(folder):
        report = pack(location, folder, options)
        logger.info("packed %d samples, %d bad", report.num_good, report.num_bad)
        if report.bad_fraction > max(settings.max_bad_fraction, 0):
            logger.warning("%.1f%% of %s is bad", 100 * report.bad_fraction, location)
    write_atomic(note, text)


def _is_packed(folder: Path) -> bool:
    return any(folder.glob(f"**/{MANIFEST}"))


def _stamp(location: str) -> list[int]:
    """Size and time of a local file or folder, to notice a change."""
    try:
        found = Path(location).stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]
