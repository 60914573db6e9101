"""A small ALBEF for the tests: its table, a vocabulary, and both together as a model."""

from pathlib import Path
from typing import Any

import torch

from clipserve import wordpiece
from clipserve.model import Model, create

CAPTIONS = [
    "a red cat on a mat",
    "two dogs in a house",
    "the blue bird sings",
    "a red house",
    "a dog and a cat",
    "the mat in the house is red",
]


def open_clip_vision(**changes: Any) -> dict[str, Any]:
    """open_clip's own ViT."""
    table = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    return table | changes


def timm_vision(**changes: Any) -> dict[str, Any]:
    """timm's, as the published ALBEF has it, but small."""
    table = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 64}
    return table | {"timm_model_name": "vit_base_patch16_224"} | changes


def albef_table(vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    """An architecture table; `text` changes text_cfg."""
    return {
        "embed_dim": 16,
        "vision_cfg": vision or open_clip_vision(),
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 200,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "tokenizer": "wordpiece",
        }
        | text,
        "fusion_cfg": {"layers": 2},
    }


def vocabulary(folder: Path, vocab_size: int = 120) -> Path:
    """A folder with a WordPiece vocabulary of CAPTIONS."""
    folder.mkdir(exist_ok=True)
    built = wordpiece.build(CAPTIONS * 3, vocab_size)
    (folder / wordpiece.FILE).write_text(built.content, encoding="utf-8")
    return folder


def tiny_albef(folder: Path, vision: dict[str, Any] | None = None, **text: Any) -> Model:
    """A model in evaluation mode; `folder` gets its vocabulary."""
    torch.manual_seed(0)
    table = albef_table(vision, tokenizer_path=str(vocabulary(folder)), **text)
    return create(table).eval()


def decided_albef(folder: Path) -> Model:
    """`tiny_albef` with weights so large that pictures and texts make a difference to the matching
    head."""
    found = tiny_albef(folder)
    with torch.no_grad():
        for parameter in found.network.fusion.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)
        found.network.matching_head.weight.mul_(10)
    return found
