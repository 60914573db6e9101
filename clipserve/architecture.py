"""Tables of architectures: which of them mean the same network, and what only training sees.

One program writes a default down that another leaves out, and a run may drop patches where another
does not: weights fit both. Start at `essence`.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from clipserve.towers import tower_defaults

TRAINING = {
    "vision_cfg": ("patch_dropout", "timm_drop", "timm_drop_path"),
    "text_cfg": ("dropout",),
}
"""what a network in training does and one that embeds does not"""
_NO_FUNCTION = {
    "vision_cfg": ("timm_model_pretrained",),
    "text_cfg": ("hf_model_pretrained", "tokenizer_path"),
}
"""where a part came from"""
_TOP = {"quick_gelu": False, "custom_text": False, "init_logit_bias": None}


def essence(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with its defaults written down, and without what no vector depends on."""
    found = {**_TOP, **table}
    found.pop("init_logit_scale", None)  # weights have their own
    for section, defaults in _defaults(table).items():
        whole = {**defaults, **table[section]}
        left_out = (*TRAINING.get(section, ()), *_NO_FUNCTION.get(section, ()))
        found[section] = {key: value for key, value in whole.items() if key not in left_out}
    return found


def with_training(table: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what only training sees as `wanted` has it."""
    changed = copy.deepcopy(dict(table))
    for section, keys in TRAINING.items():
        for key in keys:
            changed[section].pop(key, None)
            if key in wanted[section]:
                changed[section][key] = wanted[section][key]
    return changed


def first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first key of nested tables under which they differ, and its two values."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else (name, one, other)
    for key in sorted(one.keys() | other.keys()):
        inner = f"{name}.{key}" if name else key
        if found := first_difference(one.get(key), other.get(key), inner):
            return found
    return None


def _defaults(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if "fusion_cfg" not in table:
        return tower_defaults()
    from clipserve.albef import FusionConfig, TextConfig, TimmConfig

    is_timm = "timm_model_name" in table["vision_cfg"]
    vision = _fields(TimmConfig) if is_timm else tower_defaults()["vision_cfg"]
    return {
        "vision_cfg": vision,
        "text_cfg": _fields(TextConfig),
        "fusion_cfg": _fields(FusionConfig),
    }


def _fields(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
