"""The same tensors under open_clip's names and under transformers': tables that work both ways.

An entry is a `Move`: tensors that, laid end to end, are the same rows. transformers keeps query,
key and value apart where open_clip has one tensor, and turns the projections on their side.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """Which tensors of the one side are which of the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    is_turned: bool = False
    """rows here are columns there"""


def clip_moves(image_layers: int, text_layers: int) -> list[Move]:
    """Of open_clip's CLIP and transformers' CLIPModel."""
    image, text = "vision_model", "text_model"
    return [
        *_same(
            {
                "visual.class_embedding": f"{image}.embeddings.class_embedding",
                "visual.positional_embedding": f"{image}.embeddings.position_embedding.weight",
                "visual.conv1.weight": f"{image}.embeddings.patch_embedding.weight",
                "token_embedding.weight": f"{text}.embeddings.token_embedding.weight",
                "positional_embedding": f"{text}.embeddings.position_embedding.weight",
                "logit_scale": "logit_scale",
            }
        ),
        *_layer("visual.ln_pre", f"{image}.pre_layrnorm"),
        *_layer("visual.ln_post", f"{image}.post_layernorm"),
        *_layer("ln_final", f"{text}.final_layer_norm"),
        *_blocks("visual.transformer", image, image_layers),
        *_blocks("transformer", text, text_layers),
        Move(("visual.proj",), ("visual_projection.weight",), is_turned=True),
        Move(("text_projection",), ("text_projection.weight",), is_turned=True),
    ]


def siglip_moves(image_layers: int, text_layers: int) -> list[Move]:
    """Of open_clip's SigLIP, whose image tower is timm's, and transformers' SiglipModel."""
    trunk, image, text = "visual.trunk", "vision_model", "text_model"
    pool, head = f"{trunk}.attn_pool", f"{image}.head"
    moves = [
        *_same(
            {
                f"{trunk}.pos_embed": f"{image}.embeddings.position_embedding.weight",
                f"{pool}.latent": f"{head}.probe",
                "text.token_embedding.weight": f"{text}.embeddings.token_embedding.weight",
                "text.positional_embedding": f"{text}.embeddings.position_embedding.weight",
                "logit_scale": "logit_scale",
                "logit_bias": "logit_bias",
            }
        ),
        *_layer(f"{trunk}.patch_embed.proj", f"{image}.embeddings.patch_embedding"),
        *_layer(f"{trunk}.norm", f"{image}.post_layernorm"),
        *_layer(f"{pool}.proj", f"{head}.attention.out_proj"),
        *_layer(f"{pool}.norm", f"{head}.layernorm"),
        *_layer(f"{pool}.mlp.fc1", f"{head}.mlp.fc1"),
        *_layer(f"{pool}.mlp.fc2", f"{head}.mlp.fc2"),
        *_layer("text.ln_final", f"{text}.final_layer_norm"),
        *_layer("text.text_projection", f"{text}.head"),
        *_blocks("text.transformer", text, text_layers),
    ]
    for part in ("weight", "bias"):
        query_then_rest = (f"{pool}.q.{part}", f"{pool}.kv.{part}")
        moves.append(Move(query_then_rest, (f"{head}.attention.in_proj_{part}",)))
    for number in range(image_layers):
        block, layer = f"{trunk}.blocks.{number}", f"{image}.encoder.layers.{number}"
        for ours, theirs in _TIMM_BLOCK.items():
            moves += _layer(f"{block}.{ours}", f"{layer}.{theirs}")
        moves += _joined(f"{block}.attn.qkv.", layer)
    return moves


def to_ours(
    moves: Iterable[Move], tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Under open_clip's names, of the shapes in `like`."""
    found: dict[str, Tensor] = {}
    for move in moves:
        found |= _carry(tensors, move.theirs, move.ours, move.is_turned, like)
    return found


def to_theirs(
    moves: Iterable[Move], tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Under transformers' names, of the shapes in `like`."""
    found: dict[str, Tensor] = {}
    for move in moves:
        found |= _carry(tensors, move.ours, move.theirs, move.is_turned, like)
    return found


_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}


def _same(names: Mapping[str, str]) -> list[Move]:
    return [Move((ours,), (theirs,)) for ours, theirs in names.items()]


def _layer(ours: str, theirs: str) -> list[Move]:
    return _same({f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")})


def _blocks(ours: str, theirs: str, count: int) -> list[Move]:
    """The layers of one of open_clip's own transformers."""
    moves = []
    for number in range(count):
        block, layer = f"{ours}.resblocks.{number}", f"{theirs}.encoder.layers.{number}"
        for name, their_name in _BLOCK.items():
            moves += _layer(f"{block}.{name}", f"{layer}.{their_name}")
        moves += _joined(f"{block}.attn.in_proj_", layer)
    return moves


def _joined(ours: str, layer: str) -> list[Move]:
    return [
        Move((f"{ours}{part}",), tuple(f"{layer}.self_attn.{which}_proj.{part}" for which in "qkv"))
        for part in ("weight", "bias")
    ]


def _carry(
    tensors: Mapping[str, Tensor],
    sources: tuple[str, ...],
    names: tuple[str, ...],
    is_turned: bool,
    like: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    first = tensors[sources[0]]
    joined = torch.cat([tensors[name] for name in sources]) if len(sources) > 1 else first
    if is_turned:
        joined = joined.T
    is_split = len(names) > 1
    parts = torch.split(joined, [len(like[name]) for name in names]) if is_split else (joined,)
    return {
        name: part.reshape(like[name].shape).contiguous()
        for name, part in zip(names, parts, strict=True)
    }
