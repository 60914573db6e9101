"""Model: two towers, open_clip's or ALBEF's, with everything that belongs to them.

A `Model` is what training writes and the service loads: network, image transform, tokenizer,
temperature, and where it came from. Any architecture open_clip knows. Start at `create` for fresh
weights and at `clipserve.checkpoint.load` for trained ones.

Legend: B batch, P image tokens, T text tokens, V vocabulary, D width, E embedding, N pictures or
texts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource, ImageTransform
from clipserve.text import Tokenizer
from clipserve.towers import architecture_config, build_network
from clipserve.trial import try_out

if TYPE_CHECKING:
    from clipserve.prompts import ClassHead


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from."""

    name: str = "untitled"
    fingerprint: str | None = None
    """names the function from pictures and texts to vectors; None until saved"""
    objective: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    """summary and metrics of the training run"""


class Encoded(NamedTuple):
    """What a forward pass gives; the losses are functions of it."""

    image: Tensor
    """(B, E) unit vectors"""
    text: Tensor
    """(B, E) unit vectors"""
    image_states: Tensor | None = None
    """(B, P, D) of a network with fusion layers: the picture's tokens"""
    text_states: Tensor | None = None
    """(B, T, D) of a network with fusion layers: the text's tokens"""
    caption_logits: Tensor | None = None
    """(B, T - 1, V) of a network with a decoder: at t, the guess of token t + 1"""


class Model(nn.Module):
    """Pictures and texts to unit vectors in one space."""

    def __init__(
        self,
        network: nn.Module,
        architecture: dict[str, Any],
        transform: ImageTransform,
        tokenizer: Tokenizer,
        info: ModelInfo,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.architecture = architecture
        self.transform = transform
        self.tokenizer = tokenizer
        self.info = info
        self.fp32_cosine: float | None = None
        """least cosine of a faster precision to fp32, where `embed.prepare` measured it"""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, E) from normalised pixels (B, 3, H, W)."""
        features = self.network.visual(pixels.to(self.dtype))
        if self.has_decoder:  # CoCa's tower gives its tokens as well
            features, _ = features
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit vectors (B, E) from token ids (B, T).

        T is the context length, or anything down to the longest text if `can_cut_text`: a causal
        transformer, and one that masks it, give the same answer without the padding.
        """
        if ids.shape[1] < self.context_length and not self.has_fusion:
            features = self._encode_cut_text(ids)
        else:
            features = self.network.encode_text(ids)
        return F.normalize(features.float(), dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor) -> Encoded:
        """Both encodings: what training compiles and differentiates."""
        if self.has_decoder:
            return self._encode_and_caption(pixels, ids)
        if not self.has_fusion:
            return Encoded(self.encode_image(pixels), self.encode_text(ids))
        image_states, image = self.network.encode_image_states(pixels.to(self.dtype))
        text_states, text = self.network.encode_text_states(ids)
        return Encoded(
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
            image_states,
            text_states,
        )

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned log-temperature: a scalar."""
        scale: Tensor = self.network.logit_scale
        return scale.exp().float().reshape(())  # in its own precision: ALBEF's is float64

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's bias, a scalar; None for CLIP."""
        bias: Tensor | None = self.network.logit_bias
        return None if bias is None else bias.float().reshape(())

    @property
    def embed_dim(self) -> int:
        """E, the length of a vector."""
        return int(self.architecture["embed_dim"])

    @property
    def context_length(self) -> int:
        """Most tokens of a text, start and end included."""
        return self.tokenizer.context_length

    @property
    def dtype(self) -> torch.dtype:
        """Of the towers' weights; logit scale and bias stay as precise as they were trained."""
        dtype: torch.dtype = next(self.network.visual.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def has_fusion(self) -> bool:
        """Whether a picture and a text can be read together (ALBEF), see `match`."""
        return "fusion_cfg" in self.architecture

    @property
    def has_decoder(self) -> bool:
        """Whether it can write captions (CoCa)."""
        return "multimodal_cfg" in self.architecture

    @property
    def can_cut_text(self) -> bool:
        """Whether padding can be left away: it is masked, or attention is causal and pooling finds
        the end token."""
        if self.has_fusion:
            return True
        if self.has_decoder:  # its class token comes last
            return False
        tower = self._text_tower
        pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        return (
            getattr(tower, "attn_mask", None) is not None
            and not getattr(tower, "use_pad_mask", False)
            and getattr(tower, "cls_emb", None) is None
            and pooling == "argmax"
        )

    def embed_images(
        self,
        sources: Iterable[ImageSource],
        batch_size: int = 32,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> np.ndarray:
        """(N, E) float32 unit vectors of paths, bytes or PIL images. ImageError names a bad one."""
        from clipserve.embed import embed_images

        return embed_images(self, sources, batch_size, limits)

    def embed_texts(self, texts: Iterable[str], batch_size: int = 256) -> np.ndarray:
        """(N, E) float32 unit vectors; a warning says when a text was truncated."""
        from clipserve.embed import embed_texts

        return embed_texts(self, texts, batch_size)

    def match(
        self,
        images: Iterable[ImageSource],
        texts: Iterable[str],
        batch_size: int = 32,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> np.ndarray:
        """(N,) float32: how likely picture i and text i belong together. ALBEF models only."""
        from clipserve.match import match

        return match(self, images, texts, batch_size, limits)

    def zero_shot(self, labels: list[str], templates: str | list[str] = "none") -> "ClassHead":
        """A classifier over `labels`; `templates`: a set's name, a file, or templates with `{}`."""
        from clipserve.prompts import build_head

        return build_head(self, labels, templates)

    @property
    def _text_tower(self) -> Any:
        """open_clip's CLIP is its own text tower; CustomTextCLIP has one."""
        return self.network if hasattr(self.network, "token_embedding") else self.network.text

    def _encode_and_caption(self, pixels: Tensor, ids: Tensor) -> Encoded:
        """One pass, as open_clip's CoCa.forward: the decoder sees token t and guesses t + 1."""
        image, image_states = self.network.visual(pixels.to(self.dtype))
        text, text_states = self.network.text(ids)
        return Encoded(
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
            caption_logits=self.network.text_decoder(image_states, text_states[:, :-1]),
        )

    def _encode_cut_text(self, ids: Tensor) -> Tensor:
        assert self.can_cut_text
        tower, length = self._text_tower, ids.shape[1]
        x = tower.token_embedding(ids) + tower.positional_embedding[:length]  # (B, T, D)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        x = tower.ln_final(x)
        x = x[torch.arange(x.shape[0], device=x.device), ids.argmax(dim=-1)]  # the end token
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection
        features: Tensor = x
        return features


def create(architecture: str | dict[str, Any], transform: ImageTransform | None = None) -> Model:
    """A model with fresh weights (draws from torch's global generator; seed it first).

    `architecture`: an open_clip name, an open_clip `model_cfg` table, or one of `clipserve.albef`.
    Raises ConfigError unless a picture and a text of its sizes go through it.
    """
    table = architecture_config(architecture) if isinstance(architecture, str) else architecture
    network = build_network(table)
    tokenizer = Tokenizer(table["text_cfg"])
    name = architecture if isinstance(architecture, str) else "custom"
    # where the vocabulary came from is nothing that a saved model, which holds it, depends on
    text = {key: value for key, value in table["text_cfg"].items() if key != "tokenizer_path"}
    table = table | {"text_cfg": text}
    model = assemble(network, table, transform, tokenizer, ModelInfo(name))
    try_out(model)
    return model


def assemble(
    network: nn.Module,
    architecture: dict[str, Any],
    transform: ImageTransform | None,
    tokenizer: Tokenizer,
    info: ModelInfo,
) -> Model:
    """Put the parts together; the network's own input size is the transform's default."""
    if transform is None:
        size = architecture["vision_cfg"].get("image_size", 224)
        transform = ImageTransform((size, size) if isinstance(size, int) else tuple(size))
    return Model(network, architecture, transform, tokenizer, info)
