"""Starting an ALBEF from weights that are at hand: a local BERT, a DeiT or other ViT, a CLIP.

`load_bert` fills the text and fusion layers, `load_image_tower` the picture's ViT; what a source
does not have (cross-attention, projections, the matching head) keeps its fresh weights. Nothing is
downloaded. `bert_names` is the table between our names and BERT's, which ALBEF's own checkpoints
share (see `clipserve.convert`).

Legend: G patches along a side, D width.
"""

import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipserve import checkpoint
from clipserve.albef import Albef
from clipserve.errors import CheckpointError, first_line

logger = logging.getLogger(__name__)

_EMBEDDINGS = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LAYER = {
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "self_attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp.norm": "output.LayerNorm",
}
_TOKEN_HEAD = {
    "token_head.dense.weight": "cls.predictions.transform.dense.weight",
    "token_head.dense.bias": "cls.predictions.transform.dense.bias",
    "token_head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "token_head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "token_head.bias": "cls.predictions.bias",
}


_READING_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)
"""what torch.load raises on files that hold something else"""
_PROJECTIONS = {"proj", "projection.weight", "projection.bias"}
"""of open_clip's ViT and of ours: they lead to E, which differs from model to model"""


def bert_names(text_layers: int, fusion_layers: int, token_head: bool) -> dict[str, str]:
    """Our name -> BERT's, for all that ALBEF has from it.

    The fusion layers are numbered on after the text layers. Without `token_head` the names begin
    one level deeper, as those of a BertModel do beside those of a BertForMaskedLM.
    """
    parts = ("weight", "bias")
    bert = "bert." if token_head else ""
    names = {
        f"text.embeddings.{ours}.{part}": f"{bert}embeddings.{theirs}.{part}"
        for ours, theirs in _EMBEDDINGS.items()
        for part in (parts if ours == "norm" else parts[:1])
    }
    for number in range(text_layers + fusion_layers):
        is_text = number < text_layers
        place = f"text.layers.{number}" if is_text else f"fusion.{number - text_layers}"
        names |= {
            f"{place}.{ours}.{part}": f"{bert}encoder.layer.{number}.{theirs}.{part}"
            for ours, theirs in _LAYER.items()
            if not (is_text and ours.startswith("cross_attention"))
            for part in parts
        }
    return names | (_TOKEN_HEAD if token_head else {})


def load_bert(network: Albef, folder: Path) -> None:
    """Fill text and fusion layers, in place, from a transformers BERT folder.

    BERT's first layers go to the text, the next ones to the fusion, whose cross-attention stays
    fresh; longer position tables are cut; the head for masked words is taken where both have one.
    Raises CheckpointError for another vocabulary, another width, or too few layers.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds neither {' nor '.join(f.name for f in files)}")
    found = {_modern(name).removeprefix("bert."): t for name, t in read_tensors(file).items()}
    names = bert_names(len(network.text.layers), len(network.fusion), token_head=True)
    wanted = {ours: theirs.removeprefix("bert.") for ours, theirs in names.items()}
    has_head = network.token_head is not None and _TOKEN_HEAD["token_head.bias"] in found
    fresh = ("cross_attention",) if has_head else ("cross_attention", "token_head")
    wanted = {ours: t for ours, t in wanted.items() if not any(f in ours for f in fresh)}
    if missing := wanted.keys() - {ours for ours, theirs in wanted.items() if theirs in found}:
        raise CheckpointError(f"{file} lacks {shorten(wanted[name] for name in missing)}")
    tensors = {ours: found[theirs] for ours, theirs in wanted.items()}
    positions = "text.embeddings.positions.weight"
    tensors[positions] = tensors[positions][: network.text.embeddings.positions.num_embeddings]
    _fill(network, tensors, file)


def load_image_tower(network: Albef, source: Path) -> None:
    """Fill the picture's tower, in place; its projection only if there is one of the same shape.

    `source` is a file of weights, a DeiT's or another timm ViT's, or an open_clip model's, or a
    clipserve model directory; the tower must be the same, another input size is interpolated.
    Raises CheckpointError where the weights do not fit.
    """
    file = _tower_file(source) if source.is_dir() else source
    found = read_tensors(file)
    if any(name.startswith("visual.") for name in found):  # a model of two towers
        found = {k.removeprefix("visual."): v for k, v in found.items() if k.startswith("visual.")}
        found = {k: v for k, v in found.items() if not k.startswith("head.")}
    else:
        heads = ("head.", "head_dist.", "fc_norm.", "pre_logits.")
        found = {f"trunk.{k}": v for k, v in found.items() if not k.startswith(heads)}
    own = network.visual.state_dict()
    for name in ("trunk.pos_embed", "positional_embedding"):
        if name in found and name in own:
            found[name] = resize_positions(found[name], own[name])
    for name in _PROJECTIONS:
        if name in found and (name not in own or found[name].shape != own[name].shape):
            del found[name]
    check_names(file, found.keys(), own.keys() - (_PROJECTIONS - found.keys()))
    _fill(network, {f"visual.{name}": tensor for name, tensor in found.items()}, file)


def _tower_file(directory: Path) -> Path:
    """Where a clipserve model directory keeps its towers."""
    names = (checkpoint.WEIGHTS, checkpoint.TOWERS)
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{directory} is no model directory: it has no {' or '.join(names)}")
    return file


def resize_positions(table: Tensor, like: Tensor, antialias: bool = False) -> Tensor:
    """`table` for as many patches as `like` has, both (1, 1 + G * G, D) or (1 + G * G, D), or both
    without a class token's row."""
    if table.shape == like.shape:
        return table
    grid = grid_of(like.shape[-2])
    batched = table if table.ndim == 3 else table[None]
    resized = interpolate_positions(batched, grid, antialias)
    return resized if table.ndim == 3 else resized[0]


def interpolate_positions(table: Tensor, grid: int, antialias: bool = False) -> Tensor:
    """Position embeddings (1, 1 + G * G, D) of a square of patches, for `grid` along each side.

    Bicubic, the row of a class token, if there is one, stays; as it is if nothing changes (ALBEF,
    section 4). `antialias` when they become fewer, as open_clip.
    """
    before = grid_of(table.shape[1])
    if before == grid:
        return table
    tokens = table.shape[1] - before * before
    token, patches = table[:, :tokens], table[:, tokens:]
    square = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    square = F.interpolate(
        square.float(), (grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    patches = square.permute(0, 2, 3, 1).flatten(1, 2)  # (1, grid * grid, D)
    return torch.cat([token, patches.to(table.dtype)], dim=1)


def grid_of(rows: int) -> int:
    """Patches along a side, of a table with a square of patches, and maybe a class token."""
    for patches in (rows, rows - 1):
        if patches == math.isqrt(patches) ** 2:
            return math.isqrt(patches)
    raise CheckpointError(f"{rows} position embeddings are no class token and a square of patches")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch file, also if that has them under "model" or
    "state_dict". Nothing in the file is executed. Raises CheckpointError."""
    content: Any
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # whose message advises to trust the file
            raise CheckpointError(
                f"{file} cannot be read as a file of weights: it is damaged, or holds other objects"
                " than tensors, which are not loaded, since that can execute code"
            ) from None
        except _READING_ERRORS as error:
            what = first_line(error)
            raise CheckpointError(f"{file} cannot be read as a file of weights: {what}") from None
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no table of tensors")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def check_names(file: Path, found: Any, expected: Any) -> None:
    """CheckpointError that names tensors which are missing, or are left over."""
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if missing or extra:
        lacks = f"lacks {shorten(missing)}" if missing else ""
        has = f"has {shorten(extra)} left over" if extra else ""
        raise CheckpointError(f"{file} {' and '.join(filter(None, [lacks, has]))}")


def shorten(names: Any, limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def _fill(network: Albef, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Overwrite the parameters named; of the shapes they have, or CheckpointError."""
    own = network.state_dict()
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: {name} would be {tuple(tensor.shape)}, this model's is"
                f" {tuple(own[name].shape)}; choose text_cfg and vision_cfg as the file's"
            )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    logger.info("%d tensors taken from %s", len(tensors), file)


def _modern(name: str) -> str:
    """BERT files of 2018 call a LayerNorm's parameters gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
