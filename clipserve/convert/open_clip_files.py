"""What open_clip and OpenAI publish, in: directories with a configuration, and bare weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipserve import checkpoint
from clipserve.convert.found import Found, count_parts
from clipserve.errors import CheckpointError, ConfigError
from clipserve.images import ImageTransform
from clipserve.model import ModelInfo
from clipserve.towers import architecture_config
from clipserve.weights import read_tensors

WEIGHTS = (checkpoint.WEIGHTS, "open_clip_pytorch_model.bin", "open_clip_model.pt")
_TEXT_PARTS = (
    "text_projection",
    "positional_embedding",
    "token_embedding",
    "transformer",
    "ln_final",
)
"""of a text tower, which some architectures keep under `text.`"""
_HEAD_WIDTH = 64
"""of all that OpenAI published"""


def read_directory(directory: Path, tokenizer: Path | None = None) -> Found:
    """An open_clip directory: open_clip_config.json beside the weights."""
    file = directory / checkpoint.OPEN_CLIP_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        table, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
        tables = [table, preprocess, table["vision_cfg"], table["text_cfg"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is no configuration of open_clip's: {error}") from None
    if not all(isinstance(part, dict) for part in tables):
        raise CheckpointError(f"{file} is no configuration of open_clip's: a part is no table")
    weights = next((directory / n for n in WEIGHTS if (directory / n).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{directory} holds none of {', '.join(WEIGHTS)}")
    size = table["vision_cfg"].get("image_size", 224)
    return Found(
        tensors=_for_architecture(read_tensors(weights), table),
        architecture=table,
        transform=ImageTransform.from_open_clip({"size": size} | preprocess),
        tokenizer=tokenizer or _tokenizer_in(directory, table),
        info=ModelInfo(directory.name),
    )


def find_weights(
    tensors: dict[str, Tensor],
    file: Path,
    *,
    is_openai: bool,
    architecture: str | None,
    tokenizer: Path | None,
) -> Found:
    """The weights of a file, of an architecture that is named; OpenAI's ViTs say theirs themselves.

    `is_openai`: it is one of OpenAI's archives, all of which compute QuickGELU, though most of
    open_clip's tables of their names do not.
    """
    if architecture is not None:
        table = architecture_config(architecture) | ({"quick_gelu": True} if is_openai else {})
    elif is_openai:
        table = _openai_architecture(tensors, file)
    else:
        raise ConfigError(
            f"{file} holds weights, which tell neither heads nor activation; name the architecture,"
            " such as ViT-B-32, or ViT-B-32-quickgelu"
        )
    transform, notes = _published_transform(architecture) if architecture else (None, [])
    return Found(
        tensors=_for_architecture(tensors, table),
        architecture=table,
        transform=transform,
        tokenizer=tokenizer,
        info=ModelInfo(file.stem),
        notes=notes,
    )


def preparation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of open_clip's notes on published weights is a `preprocess_cfg`."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _tokenizer_in(directory: Path, table: dict[str, Any]) -> Path | None:
    """open_clip keeps a transformers tokenizer beside the weights."""
    is_there = (directory / "tokenizer_config.json").is_file()
    return directory if is_there and table["text_cfg"].get("hf_tokenizer_name") else None


def _for_architecture(tensors: dict[str, Tensor], table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Text towers move below `text.`, where the architecture has them, as open_clip does."""
    text = table["text_cfg"]
    has_own = table.get("custom_text") or "hf_model_name" in text or "multimodal_cfg" in table
    if not has_own or any(name.startswith("text.") for name in tensors):
        return tensors
    return {
        f"text.{name}" if name.startswith(_TEXT_PARTS) else name: tensor
        for name, tensor in tensors.items()
    }


def _published_transform(architecture: str) -> tuple[ImageTransform | None, list[str]]:
    """How pictures were prepared for this architecture, where all published weights agree."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name = architecture.replace("/", "-")
    seen = []
    for tag in list_pretrained_tags_by_model(name):
        used = preparation(get_pretrained_cfg(name, tag))
        if used not in seen:
            seen.append(used)
    if len(seen) == 1:
        return ImageTransform.from_open_clip(seen[0]), []
    return None, ["pictures are prepared as OpenAI's CLIP does it; the weights do not say"]


def _openai_architecture(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """The table of one of OpenAI's ViTs with tensors of these shapes (open_clip,
    model.py, build_model_from_openai_state_dict)."""
    if "visual.proj" not in tensors or "text_projection" not in tensors:
        raise ConfigError(f"{file} is no ViT of OpenAI's; name its architecture, such as RN50")
    image_width, _, patch, _ = tensors["visual.conv1.weight"].shape
    text_width, embed_dim = tensors["text_projection"].shape
    grid = math.isqrt(len(tensors["visual.positional_embedding"]) - 1)
    return {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": image_width,
            "layers": count_parts(tensors, "visual.transformer.resblocks."),
            "head_width": _HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": len(tensors["positional_embedding"]),
            "vocab_size": len(tensors["token_embedding.weight"]),
            "width": text_width,
            "heads": max(1, text_width // _HEAD_WIDTH),
            "layers": count_parts(tensors, "transformer.resblocks."),
        },
    }
