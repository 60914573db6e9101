"""Any model at hand -> a `Model`: what it is is told by its files.

Start at `read_model`. It takes

    a directory of clipserve's     clipserve.json
    one of open_clip's             open_clip_config.json and weights
    one of transformers'           config.json of a CLIP or SigLIP, weights, tokenizer, processor
    a file of weights              open_clip's, with the name of its architecture; OpenAI's
                                   archives; ALBEF's published checkpoints
    hf-hub:OWNER/NAME, NAME:TAG    what lies in the caches of huggingface_hub and open_clip

and can change the text context and the image size on the way.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clipserve import checkpoint
from clipserve.architecture import TRAINING, essence, first_difference, with_training
from clipserve.convert.albef import find_albef, is_albef
from clipserve.convert.archives import is_archive, read_archive
from clipserve.convert.cached import find_repository, find_tagged, is_tagged, repository_of
from clipserve.convert.fitting import change_sizes, fit_positions
from clipserve.convert.found import Found, refuse_existing
from clipserve.convert.open_clip_files import find_weights, read_directory
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model, ModelInfo, assemble
from clipserve.text import Tokenizer
from clipserve.towers import architecture_config, build_network
from clipserve.weights import check_names, read_tensors


@dataclass(frozen=True)
class Read:
    """A model, and what was changed on the way: a line each."""

    model: Model
    notes: list[str] = field(default_factory=list)
    momentum: dict[str, Tensor] | None = None
    """an ALBEF's, as `checkpoint.save` takes it"""
    data_fingerprint: str | None = None
    origin: str | None = None
    """the fingerprint of the model directory that it was read from"""


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
    read = read_model(
        source,
        architecture=architecture,
        tokenizer=tokenizer,
        context_length=context_length,
        image_size=image_size,
    )
    info = read.model.info
    is_changed = read.origin is not None and bool(read.notes)
    fingerprint = checkpoint.save(
        read.model,
        out,
        name=info.name,
        objective=info.objective,
        training=_tell_start(info, read.origin) if is_changed else info.training,
        data_fingerprint=read.data_fingerprint,
        momentum=read.momentum,
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
    found = _find(source, architecture, tokenizer)
    return _build(found, change_sizes(found.architecture, context_length, image_size), source)


@_no_downloads()
def read_pretrained(source: str, architecture: str | dict[str, Any] | None) -> Read:
    """What the settings name as model.pretrained, with model.architecture as it is set there.

    That is the name of the architecture for a file of weights; else a table, or part of one, that
    may ask for another text_cfg.context_length and vision_cfg.image_size, for what training alone
    sees, and nothing else. `info.training` of the model names what a run begins with, and its
    fingerprint: that of the directory, or what `clipserve import` would give it.
    """
    path = Path(source)
    is_file = path.is_file() and isinstance(architecture, str)
    found = _find(path, str(architecture) if is_file else None, None)
    table = wanted = found.architecture
    if architecture is not None and not is_file:
        wanted = _read_wanted(source, found.architecture, architecture)
        context_length = wanted["text_cfg"].get("context_length")
        table = change_sizes(table, context_length, wanted["vision_cfg"].get("image_size"))
    read = _build(found, with_training(table, wanted), path)
    model = read.model
    imported = Model(model.network, table, model.transform, model.tokenizer, model.info)
    begun = read.origin or checkpoint.fingerprint(imported)
    model.info = replace(model.info, training=_tell_start(model.info, begun))
    return read


def _read_wanted(
    source: str, own: dict[str, Any], architecture: str | dict[str, Any]
) -> dict[str, Any]:
    """The table that is asked for; ConfigError if weights of `own` do not fit it."""
    given = architecture_config(architecture) if isinstance(architecture, str) else architecture
    is_whole = {"embed_dim", "vision_cfg", "text_cfg"} <= given.keys()
    wanted: dict[str, Any] = given if is_whole else _overlay(own, given)
    if differs := first_difference(_but_for_sizes(wanted), _but_for_sizes(own)):
        name, asked, there = differs
        changeable = [f"{part}.{key}" for part, keys in TRAINING.items() for key in keys]
        raise ConfigError(
            f"model.architecture.{name} = {asked!r} is not that of model.pretrained = {source!r},"
            f" {there!r}; only text_cfg.context_length, vision_cfg.image_size and"
            f" {', '.join(changeable)} can be changed; leave it out"
        )
    return wanted


def _tell_start(info: ModelInfo, fingerprint: str | None) -> dict[str, Any]:
    """What a model was made from, as its description holds it."""
    return {"start": info.name, "start_fingerprint": fingerprint}


def _find(source: Path, architecture: str | None, words: Path | None) -> Found:
    if source.is_file():
        return _find_in_file(source, architecture, words)
    if architecture is not None:
        raise ConfigError(f"{source} is no file of weights: leave {architecture!r} out")
    if not source.exists():
        return _find_by_name(source, words)
    if checkpoint.is_model_directory(source):
        return _read_own(source)
    if (source / checkpoint.OPEN_CLIP_CONFIG).is_file():
        return read_directory(source, words)
    if (source / "config.json").is_file():
        from clipserve.convert.transformers_reading import read_transformers

        return read_transformers(source, words)
    raise ConfigError(
        f"{str(source)!r} is not a clipserve model directory, nor one of open_clip's or"
        f" transformers': it has none of {checkpoint.MANIFEST}, {checkpoint.OPEN_CLIP_CONFIG} and"
        f" config.json{checkpoint.point_into_run(source)}"
    )


def _find_by_name(source: Path, words: Path | None) -> Found:
    if name := repository_of(source):
        found = _find(find_repository(name), None, words)
        return replace(found, info=replace(found.info, name=name.rpartition("/")[2]))
    if not is_tagged(source):
        raise ConfigError(
            f"{str(source)!r} is not a clipserve model directory, nor anything else that is there;"
            " nothing is downloaded: name a directory, a file of weights, or what other programs"
            " have fetched, as hf-hub:OWNER/NAME or ViT-B-32:openai"
        )
    tagged = find_tagged(source)
    found = _find_in_file(tagged.file, tagged.architecture, words)
    return replace(
        found,
        architecture=found.architecture | ({"quick_gelu": True} if tagged.quick_gelu else {}),
        transform=tagged.transform,
        info=ModelInfo(str(source)),
        notes=[],
    )


def _find_in_file(file: Path, architecture: str | None, words: Path | None) -> Found:
    is_openai = is_archive(file)
    tensors = read_archive(file) if is_openai else read_tensors(file)
    if not is_albef(tensors):
        return find_weights(
            tensors, file, is_openai=is_openai, architecture=architecture, tokenizer=words
        )
    if architecture is not None:
        raise ConfigError(
            f"{file} is an ALBEF's, whose architecture is read from its weights: leave"
            f" {architecture!r} out"
        )
    return find_albef(tensors, file, words)


def _read_own(directory: Path) -> Found:
    directory = checkpoint.pin(directory)
    model = checkpoint.load_for_training(directory)
    folder = directory / "tokenizer"
    return Found(
        tensors=model.network.state_dict(),
        architecture=model.architecture,
        transform=model.transform,
        tokenizer=folder if folder.is_dir() else None,
        info=model.info,
        momentum=checkpoint.load_momentum(directory),
        data_fingerprint=checkpoint.read_description(directory)["data_fingerprint"],
    )


def _overlay(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _overlay(base.get(key), value) for key, value in over.items()}


def _but_for_sizes(table: dict[str, Any]) -> dict[str, Any]:
    rest = essence(table)
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
    notes = fit_positions(tensors, own, table)
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
    model = assemble(network.eval(), table, transform, words, replace(found.info, fingerprint=None))
    momentum = found.momentum and _fit_momentum(found.momentum, own, table)
    return Read(
        model, [*found.notes, *notes], momentum, found.data_fingerprint, found.info.fingerprint
    )


def _fit_momentum(
    momentum: dict[str, Tensor], own: dict[str, Tensor], table: dict[str, Any]
) -> dict[str, Tensor]:
    """Of the sizes that the network itself was given."""
    twin = {name: momentum[f"twin.{name}"] for name in own if f"twin.{name}" in momentum}
    fit_positions(twin, own, table)
    return momentum | {f"twin.{name}": tensor for name, tensor in twin.items()}
