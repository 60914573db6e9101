"""Models by name: what other programs have fetched before. Nothing is downloaded here.

hf-hub:OWNER/NAME    a repository in huggingface_hub's cache
NAME:TAG             weights that open_clip knows, as ViT-B-32:openai: in that cache or its own
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipserve import checkpoint
from clipserve.convert.open_clip_files import WEIGHTS, preparation
from clipserve.errors import ConfigError
from clipserve.images import ImageTransform
from clipserve.towers import architecture_config

_HUB = "hf-hub:"
_CONFIGS = (checkpoint.MANIFEST, checkpoint.OPEN_CLIP_CONFIG, "config.json")
_OPEN_CLIP_CACHE = Path("~/.cache/clip")


class Tagged(NamedTuple):
    """A file of weights that open_clip publishes, and what it knows of them."""

    file: Path
    architecture: str
    quick_gelu: bool
    transform: ImageTransform


def repository_of(source: Path) -> str | None:
    """OWNER/NAME, if that is what is named."""
    name = str(source)
    return name.removeprefix(_HUB) if name.startswith(_HUB) else None


def find_repository(name: str) -> Path:
    """The directory with its files. ConfigError if it is not in the cache."""
    for config in _CONFIGS:
        if file := _in_hub_cache(name, config):
            return file.parent
    raise ConfigError(
        f"the cache of huggingface_hub has no model {name}, and nothing is downloaded; fetch it"
        f" with `hf download {name}`, or name a directory"
    )


def is_tagged(source: Path) -> bool:
    """Whether it looks like NAME:TAG."""
    name, _, tag = str(source).partition(":")
    return bool(name and tag) and "/" not in tag


def find_tagged(source: Path) -> Tagged:
    """The file of NAME:TAG. ConfigError if open_clip does not know it, or it is not here."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name, _, tag = str(source).partition(":")
    architecture = name.replace("/", "-")
    config = get_pretrained_cfg(architecture, tag)
    if not config:
        architecture_config(name)  # which names the nearest one
        known = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise ConfigError(f"open_clip knows no weights {tag!r} of {name}; it knows {known}")
    file = next(_places(config), None)
    if file is None:
        where = config.get("url") or f"the model {config['hf_hub'].rpartition('/')[0]} of the hub"
        raise ConfigError(
            f"the weights {source} are in no cache of this machine, and nothing is downloaded;"
            f" fetch {where}, then name the file, with its architecture {name}"
        )
    transform = ImageTransform.from_open_clip(preparation(config))
    return Tagged(file, name, bool(config.get("quick_gelu")), transform)


def _places(config: dict[str, Any]) -> Iterator[Path]:
    """The files that there are, those that open_clip would take first."""
    name, _, file = config.get("hf_hub", "").rpartition("/")
    names = [f"{Path(file).stem}.safetensors", file] if file else WEIGHTS
    for each in names if name else ():
        if found := _in_hub_cache(name, each):
            yield found
    if url := config.get("url"):
        found = (_OPEN_CLIP_CACHE / url.rpartition("/")[2]).expanduser()
        if found.is_file():
            yield found


def _in_hub_cache(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError as error:
        raise ConfigError(f"{name!r} is no name of a model: {error}") from None
    return Path(found) if isinstance(found, str) else None
