"""Any model at hand -> a `Model`: what it is is told by its files.

Start at `read_model`. It takes

    a directory of clipserve's     clipserve.json
    one of open_clip's             open_clip_config.json and weights
    one of transformers'           config.json of a CLIP or SigLIP, weights, tokenizer, processor
    a file of weights              open_clip's, with the name of its architecture; OpenAI's
                                   archives; ALBEF's published checkpoints

and can change the text context and the image size on the way.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipserve import checkpoint
from clipserve.convert.albef import import_checkpoint, read_albef
from clipserve.convert.archives import is_archive
from clipserve.convert.fitting import change_sizes, fit_positions
from clipserve.convert.found import Found, refuse_existing
from clipserve.convert.open_clip_files import CONFIG, read_directory, read_weights
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model, assemble
from clipserve.text import Tokenizer
from clipserve.towers import architecture_config, build_network
from clipserve.weights import check_names, read_tensors


@dataclass(frozen=True)
class Read:
    """A model, and what was changed on the way: a line each."""

    model: Model
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    """A configuration may name a model of a hub; what lies in its cache may be read."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def import_model(
    source: Path,
    out: Path,
    *,
    architecture: str | None = None,
    tokenizer: Path | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
) -> tuple[str, list[str]]:
    """Write a model directory of somebody else's model; returns its fingerprint, and a line for
    each change that was made. Arguments as of `read_model`; an ALBEF keeps its momentum weights.
    Raises ConfigError if `out` holds something."""
    refuse_existing(out)
    if source.is_file() and is_albef(source):
        _refuse_albef_options(architecture, context_length)
        return import_checkpoint(source, out, "albef", image_size, tokenizer), []
    read = read_model(
        source,
        architecture=architecture,
        tokenizer=tokenizer,
        context_length=context_length,
        image_size=image_size,
    )
    info = read.model.info
    fingerprint = checkpoint.save(
        read.model, out, name=info.name, objective=info.objective, training=info.training
    )
    return fingerprint, read.notes


@_no_downloads()
def read_model(
    source: Path,
    *,
    architecture: str | None = None,
    tokenizer: Path | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
) -> Read:
    """The model in a directory or file, in float32 on the CPU, for inference.

    `architecture` is the open_clip name of a file of weights, `tokenizer` the folder of a tokenizer
    that is not beside the weights. ConfigError or CheckpointError says what does not fit.
    """
    if source.is_file() and is_albef(source):
        _refuse_albef_options(architecture, context_length)
        if tokenizer is None:
            raise ConfigError(f"{source} is an ALBEF's, without vocabulary; `clipserve import` it")
        return Read(read_albef(source, tokenizer, image_size)[0])
    found = _find(source, architecture, tokenizer)
    return _build(found, change_sizes(found.architecture, context_length, image_size), source)


@_no_downloads()
def read_pretrained(source: str, architecture: str | dict[str, Any] | None) -> Read:
    """What the settings name as model.pretrained, with model.architecture as it is set there.

    That is the name of the architecture for a file of weights; else a table, or part of one, that
    may ask for another text_cfg.context_length and vision_cfg.image_size and nothing else.
    """
    path = Path(source)
    if architecture is None or (path.is_file() and isinstance(architecture, str)):
        return read_model(path, architecture=architecture)
    found = _find(path, None, None)
    given = architecture_config(architecture) if isinstance(architecture, str) else architecture
    is_whole = {"embed_dim", "vision_cfg", "text_cfg"} <= given.keys()
    wanted = given if is_whole else _overlay(found.architecture, given)
    if _but_for_sizes(wanted) != _but_for_sizes(found.architecture):
        raise ConfigError(
            f"model.architecture is not that of model.pretrained = {source!r}, of which only"
            " text_cfg.context_length and vision_cfg.image_size can be changed; leave it out"
        )
    context_length = wanted["text_cfg"].get("context_length")
    image_size = wanted["vision_cfg"].get("image_size")
    return _build(found, change_sizes(found.architecture, context_length, image_size), path)


def is_albef(file: Path) -> bool:
    """Whether a file of weights is what ALBEF publishes, by the names in it."""
    return not is_archive(file) and any(
        name.startswith("visual_encoder.") for name in read_tensors(file)
    )


def _refuse_albef_options(architecture: object, context_length: int | None) -> None:
    if architecture is not None or context_length is not None:
        raise ConfigError(
            "an ALBEF's architecture is read from its weights, and its text context cannot be"
            " changed; leave them out"
        )


def _find(source: Path, architecture: str | None, words: Path | None) -> Found:
    if source.is_file():
        return read_weights(source, architecture, words)
    if architecture is not None:
        raise ConfigError(f"{source} is no file of weights: leave {architecture!r} out")
    if checkpoint.is_model_directory(source):
        return _read_own(source)
    if (source / CONFIG).is_file():
        return read_directory(source, words)
    if (source / "config.json").is_file():
        from clipserve.convert.transformers_reading import read_transformers

        return read_transformers(source, words)
    raise ConfigError(
        f"{str(source)!r} is not a clipserve model directory, nor one of open_clip's or"
        f" transformers': it has none of {checkpoint.MANIFEST}, {CONFIG} and config.json;"
        " nothing is downloaded"
    )


def _read_own(directory: Path) -> Found:
    model = checkpoint.load_for_training(directory)
    folder = directory / "tokenizer"
    return Found(
        tensors=model.network.state_dict(),
        architecture=model.architecture,
        transform=model.transform,
        tokenizer=folder if folder.is_dir() else None,
        info=replace(model.info, fingerprint=None),
    )


def _overlay(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _overlay(base.get(key), value) for key, value in over.items()}


def _but_for_sizes(table: dict[str, Any]) -> dict[str, Any]:
    rest = copy.deepcopy(table)
    rest["text_cfg"].pop("context_length", None)
    rest["vision_cfg"].pop("image_size", None)
    return rest


def _build(found: Found, table: dict[str, Any], source: Path) -> Read:
    """A model of these weights with this architecture."""
    network = build_network(table)
    own = network.state_dict()
    tensors = {
        name: tensor.to(own[name].dtype) if name in own else tensor
        for name, tensor in found.tensors.items()
    }
    notes = fit_positions(tensors, own, table["text_cfg"])
    check_names(source, tensors, own)
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(tensor.shape)}, of the architecture"
                f" {tuple(own[name].shape)}; name the one that it was trained with"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} holds values that are not finite")
    network.load_state_dict(tensors)
    transform = found.transform
    if transform is not None:
        size = table["vision_cfg"].get("image_size", 224)
        transform = replace(transform, size=(size, size) if isinstance(size, int) else tuple(size))
    words = Tokenizer(table["text_cfg"], found.tokenizer)
    model = assemble(network.eval(), table, transform, words, found.info)
    return Read(model, [*found.notes, *notes])
