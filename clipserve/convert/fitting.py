"""Weights for another text context or another image size than they were trained with.

Text positions, where texts become longer: the first 20, which short texts have trained, stay, the
others are stretched over the rest (Long-CLIP, arXiv:2403.15378, section 3.1); a table of at most 20
is stretched as a whole. Where they become shorter, the first ones stay. A last row that the text is
read from (SigLIP, CoCa's class token) stays the last. Image positions: bicubic, as open_clip.

Legend: T text positions, D width.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipserve.errors import ConfigError
from clipserve.weights import grid_of, resize_positions

_KEPT = 20
"""Long-CLIP's count of positions that are trained well, of CLIP's 77"""
_TEXT = ("positional_embedding", "text.positional_embedding")
_IMAGE = (
    "visual.positional_embedding",
    "visual.trunk.pos_embed",
    "visual.attnpool.positional_embedding",
)


def change_sizes(
    table: dict[str, Any], context_length: int | None, image_size: int | None
) -> dict[str, Any]:
    """The table with another context or image size; ConfigError where it has none to change."""
    changed = copy.deepcopy(table)
    text = changed["text_cfg"]
    if context_length is not None and context_length != text.get("context_length", 77):
        if "fusion_cfg" in table:
            raise ConfigError("the text context of an ALBEF cannot be changed; train one with it")
        if context_length < 3:
            raise ConfigError(f"a text context of {context_length} leaves no room for a word")
        text["context_length"] = context_length
        if "multimodal_cfg" in changed:
            changed["multimodal_cfg"]["context_length"] = context_length
    own_size = table["vision_cfg"].get("image_size", 224)
    patch = table["vision_cfg"].get("patch_size", 16)
    if image_size is not None and isinstance(patch, int) and image_size < patch:
        raise ConfigError(f"an image size of {image_size} is less than one patch of {patch}")
    if image_size is not None and image_size != own_size:
        changed["vision_cfg"]["image_size"] = image_size
        if "timm_model_name" in table["vision_cfg"] and "fusion_cfg" not in table:
            name = table["vision_cfg"]["timm_model_name"]
            changed["vision_cfg"]["timm_model_name"] = _of_size(name, own_size, image_size)
    return changed


def _of_size(name: str, before: int, after: int) -> str:
    """timm's name of a tower for another input size, which open_clip cannot tell it otherwise."""
    import timm

    if not name.endswith(f"_{before}"):
        return name
    other = f"{name.removesuffix(f'_{before}')}_{after}"
    if not timm.is_model(other):
        raise ConfigError(f"timm has no {other}: the input size of {name} cannot be {after}")
    return other


def fit_positions(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], text_config: dict[str, Any]
) -> list[str]:
    """Resize, in place, the position tables to those of the network; a line for each change."""
    notes = []
    keeps_last = text_config.get("pool_type") == "last" or bool(text_config.get("embed_cls"))
    for name in _TEXT:
        if name in tensors and name in own and tensors[name].shape != own[name].shape:
            before, after = len(tensors[name]), len(own[name])
            tensors[name] = resize_text(tensors[name], after, keeps_last)
            notes.append(_describe_text(before, after, keeps_last))
    for name in _IMAGE:
        if name in tensors and name in own and tensors[name].shape != own[name].shape:
            before, after = (grid_of(table[name].shape[-2]) for table in (tensors, own))
            tensors[name] = resize_positions(tensors[name], own[name], antialias=True)
            notes.append(
                f"image positions {before}x{before} -> {after}x{after}: interpolated, bicubic"
            )
    return notes


def resize_text(table: Tensor, size: int, keeps_last: bool = False) -> Tensor:
    """Positions (T, D) for texts of `size` tokens."""
    rows, last = (table[:-1], table[-1:]) if keeps_last else (table, table[:0])
    count = size - len(last)
    if count <= len(rows):
        return torch.cat([rows[:count], last])
    kept = _kept(len(rows))
    columns = rows[kept:].float().T[None]  # (1, D, T)
    stretched = F.interpolate(columns, count - kept, mode="linear", align_corners=True)[0].T
    return torch.cat([rows[:kept], stretched.to(table.dtype), last]).contiguous()


def _kept(count: int) -> int:
    return _KEPT if count > _KEPT + 1 else 0


def _describe_text(before: int, after: int, keeps_last: bool) -> str:
    also = ", and the last" if keeps_last else ""
    if after < before:
        return f"text positions {before} -> {after}: the first ones stay{also}"
    kept = _kept(before - keeps_last)
    how = f"the first {kept} stay{also}, the others are stretched" if kept else "stretched"
    return f"text positions {before} -> {after}: {how}, linearly"
