"""open_clip networks, built without paying for the parts of open_clip that are not used.

Importing open_clip whole loads torchvision's model zoo, timm and transformers: 5 of the 7 seconds
(2-core Xeon, 2026-11) that a command-line classification would take. A plain ViT with a plain text
transformer needs none of them, so for such an architecture only `open_clip.model` and what it
truly needs is imported, under placeholders that are gone when the import ends. All other
architectures, and every process that has open_clip loaded already, take the ordinary import.
"""

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipserve.errors import ConfigError, first_line

BUILDING_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError)
"""what other packages raise at sizes that do not fit each other"""
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
    """A network with fresh weights, in training mode, on the CPU.

    `architecture` is an open_clip `model_cfg` table, or one with `fusion_cfg` as `clipserve.albef`
    describes it. Nothing is downloaded. ConfigError if the table is not understood.
    """
    config = json.loads(json.dumps(architecture))
    text, vision = config.get("text_cfg"), config.get("vision_cfg")
    if not isinstance(text, dict) or not isinstance(vision, dict) or "embed_dim" not in config:
        raise ConfigError("model.architecture must hold embed_dim, vision_cfg and text_cfg")
    _check_patch_dropout(vision)
    if "fusion_cfg" in config:
        from clipserve.albef import build as build_albef

        return build_albef(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    try:
        if "multimodal_cfg" in config:
            network = _build_coca(config)
        else:
            model = _open_clip_model_module(plain=is_plain(architecture))
            network = (model.CustomTextCLIP if custom else model.CLIP)(**config)
    except (*BUILDING_ERRORS, OSError) as error:
        what = first_line(error)
        raise ConfigError(f"open_clip cannot build model.architecture: {what}") from error
    assert isinstance(network, nn.Module)
    _replace_patch_dropout(network.visual)
    return network


def build_image_tower(embed_dim: int, vision: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """The image tower of an open_clip network alone; `vision` is its `vision_cfg`."""
    model = _open_clip_model_module(plain=is_plain({"vision_cfg": vision, "text_cfg": {}}))
    try:
        tower = model._build_vision_tower(embed_dim, vision, quick_gelu)
    except BUILDING_ERRORS as error:
        raise ConfigError(f"open_clip cannot build vision_cfg: {first_line(error)}") from error
    assert isinstance(tower, nn.Module)
    _replace_patch_dropout(tower)
    return tower


def tower_defaults() -> dict[str, dict[str, Any]]:
    """What open_clip takes for what vision_cfg and text_cfg leave out."""
    model = _open_clip_model_module(plain=True)
    tables = {"vision_cfg": model.CLIPVisionCfg(), "text_cfg": model.CLIPTextCfg()}
    return {name: dataclasses.asdict(table) for name, table in tables.items()}


class PatchDropout(nn.Module):
    """Some patches of each picture, drawn anew in every training step, and its class token
    (arXiv:2212.00794).

    open_clip's draws on the CPU, which a GPU has to wait for and compiled code is broken off by;
    on a CPU the choice is the same.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + P, D) -> (B, 1 + kept, D)"""
        if not self.training:
            return x
        patches = x.shape[1] - 1
        kept = max(1, int(patches * (1 - self.rate)))
        drawn = torch.randn(len(x), patches, device=x.device).topk(kept, dim=1).indices  # (B, kept)
        tokens = torch.cat([drawn.new_zeros(len(x), 1), drawn + 1], dim=1)
        return x.gather(1, tokens[:, :, None].expand(-1, -1, x.shape[2]))


def trunk_features(tower: Any, pixels: Tensor) -> Tensor:
    """(B, F) what an image tower knows of normalised pixels before its projection to E.

    Of towers other than open_clip's and timm's transformers: what comes after it.
    """
    if hasattr(tower, "trunk"):
        features: Tensor = tower.trunk(pixels)
    elif type(tower).__name__ == "VisionTransformer":
        features, _ = tower._pool(tower.transformer(tower._embeds(pixels)))
    else:
        features = tower(pixels)
    return features


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


def _check_patch_dropout(vision: dict[str, Any]) -> None:
    rate = vision.get("patch_dropout") or 0
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ConfigError(
            f"vision_cfg.patch_dropout = {rate!r} is no part of the patches to leave out; it must"
            " be 0 or more, and less than 1"
        )


def _build_coca(config: dict[str, Any]) -> nn.Module:
    """open_clip's CoCa (arXiv:2205.01917), refused where its decoder could not learn to caption."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    if "hf_model_name" in text or text.get("no_causal_mask"):
        raise ConfigError(
            "a text tower of CoCa (multimodal_cfg) must be open_clip's own and causal: it may not"
            " see the words that are to be written; leave out hf_model_name and no_causal_mask"
        )
    if not is_plain(config) or not text.get("output_tokens") or not vision.get("output_tokens"):
        raise ConfigError(
            "both towers of CoCa (multimodal_cfg) must hand over their tokens; use open_clip's own"
            " ViT, and output_tokens = true in vision_cfg and text_cfg"
        )
    import open_clip.coca_model

    network = open_clip.coca_model.CoCa(**config)
    decoder = network.text_decoder
    widths = (network.visual.ln_post.normalized_shape[0], network.text.width, decoder.width)
    if len(set(widths)) > 1:
        raise ConfigError(
            f"tokens of CoCa's image tower, text tower and decoder are {widths} wide; make them"
            " equal (of the image tower: embed_dim with attentional_pool, else width)"
        )
    if decoder.context_length < network.text.context_length - 1:
        raise ConfigError(
            f"multimodal_cfg.context_length {decoder.context_length} is shorter than the captions,"
            f" of {network.text.context_length} tokens; make it text_cfg.context_length"
        )
    # open_clip 3.3 leaves it as the memory was: nothing calls the decoder's init_parameters.
    nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)
    assert isinstance(network, nn.Module)
    return network


def _replace_patch_dropout(tower: Any) -> None:
    """That of an open_clip transformer by ours; neither has weights."""
    rate = getattr(getattr(tower, "patch_dropout", None), "prob", None)
    if rate is not None:
        tower.patch_dropout = PatchDropout(rate)


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
