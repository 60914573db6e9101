"""The WordPiece vocabulary of a model that is trained from scratch, made of its own captions."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from clipserve import wordpiece
from clipserve.config import Config
from clipserve.errors import SampleError
from clipserve.files import new_directory, write_atomic
from clipserve.towers import architecture_config
from training.mixture import Mixture
from training.run_directory import RunDirectory
from training.streaming import captions_in

logger = logging.getLogger(__name__)

_ENOUGH_SAMPLES = 200_000


def find_or_build(
    config: Config, data: Mixture, directory: RunDirectory, is_main: bool
) -> Path | None:
    """The folder of the run's vocabulary; None where the model brings one, or has none.

    That of `model.pretrained_text` if there is one, else one built of the captions, once: a run
    keeps it. An architecture asks for it by `tokenizer = "wordpiece"` without `tokenizer_path`.
    """
    architecture = config.model.architecture
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    text = (table or {}).get("text_cfg", {})
    if text.get("tokenizer") != "wordpiece" or "tokenizer_path" in text or config.model.pretrained:
        return None
    if config.model.pretrained_text:
        return Path(config.model.pretrained_text)
    folder = directory.path / "tokenizer"
    if is_main:
        with directory.lock():
            _build_once(folder, data, int(text["vocab_size"]), config.data.caption_fields)
    return folder


def _build_once(folder: Path, data: Mixture, size: int, fields: Mapping[str, float] | None) -> None:
    """Unless it is there, of the same captions; one that a run has begun with always stays."""
    note = folder.with_name(f"{folder.name}.source.json")
    datasets = [dataset.fingerprint for dataset in data.datasets]
    identity = {"data": datasets, "fields": sorted(fields or ()), "vocab_size": size}
    source = json.dumps(identity, indent=1)
    is_begun = (folder.parent / "latest").is_symlink()
    if folder.exists() and (is_begun or (note.exists() and note.read_text() == source)):
        return
    vocabulary = wordpiece.build(_captions(data, fields), size)
    logger.info("built a vocabulary of %d word pieces", vocabulary.vocab_size)
    with new_directory(folder) as unfinished:
        (unfinished / wordpiece.FILE).write_text(vocabulary.content, encoding="utf-8")
    write_atomic(note, source)


def _captions(data: Mixture, fields: Iterable[str] | None) -> Iterator[str]:
    """Of all samples, or of shards spread evenly where there are very many."""
    for number in np.flatnonzero(_chosen(data)).tolist():
        try:
            sample = data.read(number)
        except SampleError:
            continue  # counted and named when training meets it
        for field in fields or ("caption",):
            yield from captions_in(sample, field)


def _chosen(data: Mixture) -> np.ndarray:
    samples = np.arange(len(data))
    if len(data) <= _ENOUGH_SAMPLES:
        return np.ones(len(data), bool)
    shards = data.shards_of(samples)
    chosen: np.ndarray = shards % -(-len(data) // _ENOUGH_SAMPLES) == 0
    return chosen
