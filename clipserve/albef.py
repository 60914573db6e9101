"""ALBEF (arXiv:2107.07651): two towers, and layers that read a text while looking at a picture.

The towers give unit-length features to compare, as CLIP's do, and the states of all their tokens.
The fusion layers take the states of a text and of a picture; from what they make of the first
token one head says whether the two belong together (ITM), from the others another head says which
words were masked (MLM). The picture's tower is a ViT, open_clip's own or timm's; others have no
tokens to attend to and are refused. Start at `build`, which takes a table such as

    embed_dim = 256
    vision_cfg = {timm_model_name = "vit_base_patch16_224", image_size = 256}
    text_cfg = {context_length = 30, vocab_size = 30522, width = 768, heads = 12, layers = 6}
    fusion_cfg = {layers = 6}

Legend: B batch, P image tokens, T text tokens, D width, E embedding, V vocabulary.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipserve.bert import Layer, Layers, TextEncoder, TokenHead, initialise, visible
from clipserve.errors import ConfigError, first_line
from clipserve.towers import BUILDING_ERRORS, build_image_tower

T = TypeVar("T")


@dataclass(frozen=True)
class TextConfig:
    """`text_cfg`: the embeddings and the layers that see only the text."""

    vocab_size: int
    context_length: int = 30
    """most tokens of a text, start and end included"""
    width: int = 768
    heads: int = 12
    layers: int = 6
    intermediate: int | None = None
    """width inside the MLPs; absent: 4 * width"""
    dropout: float = 0.1
    positions: int | None = None
    """rows of the position table, 512 in BERT's; absent: context_length"""
    tokenizer: str = "wordpiece"
    tokenizer_path: str | None = None
    """folder of a WordPiece vocabulary for a new model; a saved one has its own"""

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.context_length, self.width, self.heads, self.layers) < 1:
            raise ConfigError("text_cfg: sizes and layers must be 1 or more")
        if self.width % self.heads:
            raise ConfigError(
                f"text_cfg.width {self.width} is not a multiple of text_cfg.heads {self.heads}"
            )
        if self.positions is not None and self.positions < self.context_length:
            raise ConfigError(
                f"text_cfg.context_length {self.context_length} is more than the"
                f" {self.positions} of text_cfg.positions"
            )
        if self.tokenizer != "wordpiece":
            raise ConfigError(f"text_cfg.tokenizer {self.tokenizer!r}: ALBEF has 'wordpiece' only")

    @property
    def layer(self) -> dict[str, Any]:
        """What a layer is made of."""
        return {
            "width": self.width,
            "heads": self.heads,
            "intermediate": self.intermediate or 4 * self.width,
            "dropout": self.dropout,
        }


@dataclass(frozen=True)
class FusionConfig:
    """`fusion_cfg`: the layers with cross-attention, and their heads."""

    layers: int = 6
    token_head: bool = True
    """whether there is a head for masked words; published retrieval checkpoints have none"""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError(f"fusion_cfg.layers = {self.layers}; ALBEF needs one or more")


@dataclass(frozen=True)
class TimmConfig:
    """`vision_cfg` with timm_model_name; what is absent is as that model has it."""

    timm_model_name: str
    image_size: int | tuple[int, int] = 224
    patch_size: int | None = None
    width: int | None = None
    layers: int | None = None
    head_width: int | None = None
    mlp_ratio: float | None = None
    timm_pool: str = "token"
    timm_proj: str = "linear"
    timm_model_pretrained: bool = False
    timm_drop_path: float | None = None
    patch_dropout: float = 0.0
    """part of the patches left out in training"""

    def __post_init__(self) -> None:
        if (self.timm_pool, self.timm_proj) != ("token", "linear"):
            raise ConfigError(
                f"vision_cfg: ALBEF's timm towers have timm_pool = 'token' and timm_proj ="
                f" 'linear', not {self.timm_pool!r} and {self.timm_proj!r}"
            )
        if self.timm_model_pretrained:
            raise ConfigError(
                "vision_cfg.timm_model_pretrained: weights are not downloaded; name a file of them"
                " as model.pretrained_image"
            )
        if (self.width is None) != (self.head_width is None):
            raise ConfigError("vision_cfg: width and head_width go together, or are both absent")

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of timm's VisionTransformer."""
        chosen = {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.layers,
            "num_heads": self.width // self.head_width if self.width and self.head_width else None,
            "mlp_ratio": self.mlp_ratio,
            "drop_path_rate": self.timm_drop_path,
            "patch_drop_rate": self.patch_dropout or None,
        }
        return {name: value for name, value in chosen.items() if value is not None}


class Albef(nn.Module):
    """The network; `clipserve.model.Model` puts transform and tokenizer beside it."""

    logit_bias = None

    def __init__(
        self,
        visual: nn.Module,
        image_width: int,
        embed_dim: int,
        text: TextConfig,
        fusion: FusionConfig,
        init_logit_scale: float,
    ) -> None:
        """`visual` maps pixels to (B, E) and is one that `image_states` knows."""
        super().__init__()
        self.visual = visual
        self.text = TextEncoder(
            text.layers,
            vocab_size=text.vocab_size,
            positions=text.positions or text.context_length,
            **text.layer,
        )
        self.text_projection = nn.Linear(text.width, embed_dim)
        self.fusion = Layers(
            Layer(image_width=image_width, **text.layer) for _ in range(fusion.layers)
        )
        self.matching_head = nn.Linear(text.width, 2)
        self.token_head = TokenHead(text.width, text.vocab_size) if fusion.token_head else None
        for name, module in self.named_children():
            if name != "visual":
                initialise(module, text.width)
        # float64: a published float32 temperature comes back from log and exp to the last bit
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale, dtype=torch.float64))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features (B, E), not normalised, of pixels (B, 3, height, width)."""
        return self.encode_image_states(pixels)[1]

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features (B, E), not normalised, of token ids (B, T), T up to the context length."""
        return self.encode_text_states(ids)[1]

    def encode_image_states(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, P, D) of the class token and the patches, and features (B, E)."""
        return image_states(self.visual, pixels)

    def encode_text_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, D), those of padding meaningless, and features (B, E) of the first."""
        states = self.text(ids)
        return states, self.text_projection(states[:, 0])

    def fuse(self, text_states: Tensor, ids: Tensor, image_states: Tensor) -> Tensor:
        """States (B, T, D) of the texts with the pictures in view.

        ids (B, T) tell padding, as in `encode_text_states`; masked ones do so as well.
        """
        x: Tensor = self.fusion(text_states, visible(ids), image_states)
        return x

    def matching_logits(self, fused: Tensor) -> Tensor:
        """(B, 2) from fused states (B, T, D): column 1 for "these belong together"."""
        logits: Tensor = self.matching_head(fused[:, 0])
        return logits

    def token_logits(self, states: Tensor) -> Tensor:
        """(..., V) from fused states (..., D): which word stood there. Pass masked ones only."""
        if self.token_head is None:
            raise ConfigError(
                "this model has no head for masked words (fusion_cfg.token_head = false);"
                " leave the masked language objective out"
            )
        logits: Tensor = self.token_head(states, self.text.embeddings.words.weight)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep less for backward and compute it again, as open_clip's networks do."""
        visual: Any = self.visual
        visual.set_grad_checkpointing(enable)
        for layers in (self.text.layers, self.fusion):
            layers.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Position and class embeddings, as open_clip's towers declare theirs."""
        visual: Any = self.visual
        declared = {f"visual.{name}" for name in visual.no_weight_decay()}
        return {"text.embeddings.positions.weight"} | declared


class TimmTower(nn.Module):
    """A ViT of timm's and a linear map, with bias, of its class token."""

    def __init__(self, trunk: Any, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection = nn.Linear(trunk.num_features, embed_dim)
        initialise(self.projection, trunk.num_features)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, E)."""
        return image_states(self, pixels)[1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"trunk.{name}" for name in self.trunk.no_weight_decay()}


def image_states(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, P, D) after the last norm, class token first, and features (B, E).

    With patch dropout P counts the class token and the patches kept. `tower` is a TimmTower or an
    open_clip VisionTransformer, whose own projection is kept.
    """
    if isinstance(tower, TimmTower):
        states = tower.trunk.forward_features(pixels)
        return states, tower.projection(states[:, 0])
    states = tower.ln_post(tower.transformer(tower._embeds(pixels)))
    pooled, _ = tower._global_pool(states)
    return states, pooled if tower.proj is None else pooled @ tower.proj


def build(table: dict[str, Any]) -> Albef:
    """An ALBEF with fresh weights, from a table as above. ConfigError says what is wrong with it.

    Draws from torch's global generator; downloads nothing.
    """
    known = {"embed_dim", "vision_cfg", "text_cfg", "fusion_cfg", "quick_gelu", "init_logit_scale"}
    if unknown := table.keys() - known:
        raise ConfigError(f"model.architecture: {_names(unknown)} unknown beside fusion_cfg")
    text = _read(TextConfig, table["text_cfg"], "text_cfg")
    fusion = _read(FusionConfig, table["fusion_cfg"], "fusion_cfg")
    embed_dim = int(table["embed_dim"])
    visual: Any
    if "timm_model_name" in table["vision_cfg"]:
        visual = _timm_tower(_read(TimmConfig, table["vision_cfg"], "vision_cfg"), embed_dim)
        image_width = visual.projection.in_features
    else:
        visual = build_image_tower(embed_dim, table["vision_cfg"], table.get("quick_gelu", False))
        _check_open_clip_tower(visual)
        image_width = visual.conv1.out_channels
    scale = table.get("init_logit_scale", math.log(1 / 0.07))
    return Albef(visual, image_width, embed_dim, text, fusion, scale)


def _read(kind: type[T], table: object, name: str) -> T:
    """The dataclass that a table describes."""
    if not isinstance(table, dict):
        raise ConfigError(f"model.architecture.{name} must be a table, not {table!r}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := table.keys() - {field.name for field in fields}:
        known = ", ".join(field.name for field in fields)
        raise ConfigError(f"{name}: {_names(unknown)} unknown; known: {known}")
    try:
        return kind(**table)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from None


def _names(found: set[str]) -> str:
    return f"{', '.join(sorted(found))} {'is' if len(found) == 1 else 'are'}"


def _timm_tower(config: TimmConfig, embed_dim: int) -> TimmTower:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name = config.timm_model_name
    if not timm.is_model(name):  # names with a host in front would be fetched
        near = difflib.get_close_matches(name, timm.list_models("*it_*"), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"timm has no model {name!r}{hint}")
    try:
        trunk = timm.create_model(name, num_classes=0, global_pool="token", **config.options)
    except BUILDING_ERRORS as error:
        what = first_line(error)
        raise ConfigError(f"timm cannot build {name!r} as vision_cfg says: {what}") from error
    if not isinstance(trunk, VisionTransformer) or trunk.num_prefix_tokens != 1:
        raise ConfigError(f"{name!r} is no ViT with one class token, which ALBEF needs")
    return TimmTower(trunk, embed_dim)


def _check_open_clip_tower(tower: Any) -> None:
    """Refuse a tower whose states `image_states` cannot give."""
    is_vit = type(tower).__name__ == "VisionTransformer"
    if not is_vit or tower.attn_pool is not None or tower.final_ln_after_pool:
        raise ConfigError(
            "vision_cfg: ALBEF needs open_clip's ViT without attentional_pool and"
            " final_ln_after_pool, or a timm ViT"
        )
    if tower.pool_type == "none":
        raise ConfigError("vision_cfg: pool_type 'none' gives no feature; use 'tok' or 'avg'")
