"""Weights for another text context or another image size than they were trained with.

Text positions, where texts become longer: the first 20, which short texts have trained, stay, the
others are stretched over the rest (Long-CLIP, arXiv:2403.15378, section 3.1); a table of at most 20
is stretched as a whole. Where they become shorter, the first ones stay. A last row that the text is
read from (SigLIP, CoCa's class token) stays the last. Image positions: bicubic, as open_clip, of an
ALBEF as its own code does, which does not smooth where they become fewer.

Legend: T text positions, D width.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipserve.albef import TextConfig
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
    is_albef = "fusion_cfg" in table
    text = changed["text_cfg"]
    own_length = text.get("context_length", TextConfig.context_length if is_albef else 77)
    if context_length is not None and context_length != own_length:
        if context_length < 3:
            raise ConfigError(f"a text context of {context_length} leaves no room for a word")
        if is_albef:  # whose table stays, and is the most that can be read
            text["positions"] = text.get("positions") or own_length
        text["context_length"] = context_length
        if "multimodal_cfg" in changed:
            changed["multimodal_cfg"]["context_length"] = context_length
    own_size = table["vision_cfg"].get("image_size", 224)
    patch = table["vision_cfg"].get("patch_size", 16)
    if image_size is not None and isinstance(patch, int) and image_size < patch:
        raise ConfigError(f"an image size of {image_size} is less than one patch of {patch}")
    if image_size is not None and image_size != own_size:
        changed["vision_cfg"]["image_size"] = image_size
        if "timm_model_name" in table["vision_cfg"] and not is_albef:
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
        stem = name.removesuffix(str(before))
        known = {found.removeprefix(stem) for found in timm.list_models(f"{stem}*")}
        sizes = ", ".join(sorted((size for size in known if size.isdecimal()), key=int))
        raise ConfigError(f"timm has no {other}: the input size of {stem}* can be {sizes}")
    return other


def fit_positions(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], table: Mapping[str, Any]
) -> list[str]:
    """Resize, in place, the position tables to those of the network, which has the architecture
    `table`; a line for each change."""
    notes = []
    text_config = table["text_cfg"]
    keeps_last = text_config.get("pool_type") == "last" or bool(text_config.get("embed_cls"))
    for name in _TEXT:
        if name in tensors and name in own and tensors[name].shape != own[name].shape:
            before, after = len(tensors[name]), len(own[name])
            tensors[name] = resize_text(tensors[name], after, keeps_last)
            notes.append(_describe_text(before, after, keeps_last))
    for name in _IMAGE:
        if name in tensors and name in own and tensors[name].shape != own[name].shape:
            before, after = (grid_of(some[name].shape[-2]) for some in (tensors, own))
            smooths = "fusion_cfg" not in table
            tensors[name] = resize_positions(tensors[name], own[name], antialias=smooths)
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
