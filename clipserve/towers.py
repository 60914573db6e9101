"""open_clip networks, built without paying for the parts of open_clip that are not used.

Importing open_clip whole loads torchvision's model zoo, timm and transformers: 5 of the 7 seconds
(2-core Xeon, 2026-11) that a command-line classification would take. A plain ViT with a plain text
transformer needs none of them, so for such an architecture only `open_clip.model` and what it
truly needs is imported, under placeholders that are gone when the import ends. All other
architectures, and every process that has open_clip loaded already, take the ordinary import.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from clipserve.errors import ConfigError

_PLACEHOLDERS = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "timm", "transformers")


def architecture_config(name: str) -> dict[str, Any]:
    """The configuration table of an open_clip architecture; ConfigError names the nearest one."""
    folder = _open_clip_folder() / "model_configs"
    path = folder / f"{name.replace('/', '-')}.json"
    if path.parent != folder or not path.is_file():
        import difflib

        known = sorted(file.stem for file in folder.glob("*.json"))
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"open_clip has no architecture {name!r}; {hint}")
    config = json.loads(path.read_text())
    assert isinstance(config, dict)
    return config


def build_network(architecture: dict[str, Any]) -> nn.Module:
    """An open_clip network with fresh weights, in training mode, on the CPU.

    `architecture` is an open_clip `model_cfg` table. Nothing is downloaded. ConfigError if the
    table is not one that open_clip understands.
    """
    config = json.loads(json.dumps(architecture))
    text, vision = config.get("text_cfg"), config.get("vision_cfg")
    if not isinstance(text, dict) or not isinstance(vision, dict) or "embed_dim" not in config:
        raise ConfigError("model.architecture must hold embed_dim, vision_cfg and text_cfg")
    if "multimodal_cfg" in config:
        raise ConfigError("CoCa architectures (multimodal_cfg) are not supported yet")
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    model = _open_clip_model_module(plain=is_plain(architecture))
    build = model.CustomTextCLIP if custom else model.CLIP
    try:
        network = build(**config)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"open_clip cannot build model.architecture: {error}") from error
    assert isinstance(network, nn.Module)
    return network


def is_plain(architecture: dict[str, Any]) -> bool:
    """Whether both towers are open_clip's own transformers (no timm, ResNet or transformers)."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    return (
        "timm_model_name" not in vision
        and not isinstance(vision.get("layers"), list)
        and "hf_model_name" not in text
    )


def tokenizer_module() -> Any:
    """`open_clip.tokenizer`, without the rest of open_clip."""
    return _import_alone("open_clip.tokenizer")


def zero_shot_module() -> Any:
    """`open_clip.zero_shot_metadata`, without the rest of open_clip."""
    return _import_alone("open_clip.zero_shot_metadata")


def _open_clip_model_module(plain: bool) -> Any:
    if plain and "open_clip" not in sys.modules:
        return _import_alone("open_clip.model")
    import open_clip.model

    return open_clip.model


_alone: dict[str, Any] = {}


def _import_alone(name: str) -> Any:
    """Import one module of open_clip without its package's __init__ and heavy dependencies."""
    if "open_clip" in sys.modules:
        return importlib.import_module(name)
    if name not in _alone:
        with _placeholders():
            _alone[name] = importlib.import_module(name)
    return _alone[name]


@contextlib.contextmanager
def _placeholders() -> Iterator[None]:
    """For the time of one import: an open_clip package without __init__, and hollow dependencies.

    Dependencies that are loaded already are used as they are. Afterwards sys.modules holds neither
    placeholder nor partial package, so a later `import open_clip` is the ordinary, complete one.
    """
    package = types.ModuleType("open_clip")
    package.__path__ = [str(_open_clip_folder())]
    package.__spec__ = importlib.machinery.ModuleSpec("open_clip", None, is_package=True)
    sys.modules["open_clip"] = package
    hollow = [name for name in _PLACEHOLDERS if name.split(".")[0] not in sys.modules]
    for name in hollow:
        sys.modules[name] = _Hollow(name)
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name == "open_clip" or name.startswith("open_clip.") or name in hollow:
                del sys.modules[name]


class _Hollow(types.ModuleType):
    """A module whose every attribute is an empty nn.Module class: enough to be imported from."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (nn.Module,), {})


def _open_clip_folder() -> Path:
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
