"""The layers of BERT (arXiv:1810.04805), some of them with cross-attention to a picture.

Written out because transformers ties cross-attention to causal decoders: a BERT that reads both
ways and looks at a picture cannot be had from it. Layers normalise after they add (post-LN), as
BERT does; without cross-attention they compute what `transformers.BertModel` computes. Start at
`TextEncoder` and `Layer`.

Legend: B batch, T text tokens, D width, S tokens attended to, V vocabulary, H heads.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

PAD_ID = 0
"""the token that fills a short text up; never attended to"""
_EPS = 1e-12
_INIT_STD, _INIT_WIDTH = 0.02, 768


class TextEncoder(nn.Module):
    """Token ids to the states of their tokens, by layers that see the text alone."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        intermediate: int,
        dropout: float,
        vocab_size: int,
        positions: int,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocab_size, positions, width, dropout)
        self.layers = Layers(Layer(width, heads, intermediate, dropout) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        """States (B, T, D) of ids (B, T); padding is not attended to."""
        x: Tensor = self.layers(self.embeddings(ids), visible(ids))
        return x


class Embeddings(nn.Module):
    """Word, position and (always the first) type vectors, added and normalised."""

    def __init__(self, vocab_size: int, positions: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(positions, width)
        self.types = nn.Embedding(2, width)  # of sentence pairs; a caption is a first sentence
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x: Tensor = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0]
        x = self.dropout(self.norm(x))
        return x


class Layer(nn.Module):
    """Self-attention, cross-attention to `image_width` wide states if that is given, and an MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        dropout: float,
        image_width: int | None = None,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(width, width, heads, dropout)
        self.cross_attention = (
            None if image_width is None else Attention(width, image_width, heads, dropout)
        )
        self.mlp = Mlp(width, intermediate, dropout)

    def forward(self, x: Tensor, mask: Tensor, image_states: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). mask (B, 1, 1, T), see `visible`; image_states (B, S, D').

        image_states of fewer rows serve several texts each, see `Attention`.
        """
        x = self.self_attention(x, x, mask)
        if self.cross_attention is not None:
            x = self.cross_attention(x, image_states)
        x = self.mlp(x)
        return x


class Layers(nn.ModuleList):
    """One after another; with `grad_checkpointing` only what is between them stays for backward."""

    grad_checkpointing = False

    def forward(self, x: Tensor, mask: Tensor, image_states: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), as each `Layer`."""
        for layer in self:
            if self.grad_checkpointing:
                x = checkpoint(layer, x, mask, image_states, use_reentrant=False)
            else:
                x = layer(x, mask, image_states)
        return x


class Attention(nn.Module):
    """What x finds in `source`, added to x and normalised."""

    def __init__(self, width: int, source_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D), source (B, S, D') -> (B, T, D); mask is true where S may be looked at.

        Without a mask, source may have fewer rows: of G rows each is what B / G successive rows of
        x look at, and its keys and values are computed once for them all.
        """
        groups = source.shape[0]  # `len` would make a batch that is traced a constant
        same = x.shape[0] == groups
        rows = x if same else x.reshape(groups, -1, x.shape[-1])  # (G, B / G * T, D)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B or G, H, tokens, D / H)
            for part in (self.query(rows), self.key(source), self.value(source))
        )
        rate = self.dropout.p if self.training else 0.0
        # Fused kernels draw their dropout from a place in memory, not from a row of the batch.
        with sdpa_kernel(SDPBackend.MATH) if rate else contextlib.nullcontext():
            found = F.scaled_dot_product_attention(query, key, value, mask, rate)
        found = found.transpose(1, 2).reshape(x.shape)  # (B, T, D)
        x = self.norm(x + self.dropout(self.output(found)))
        return x


class Mlp(nn.Module):
    """Two linear maps with a GELU (the exact one) between, added to x and normalised."""

    def __init__(self, width: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, intermediate)
        self.down = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return x


class TokenHead(nn.Module):
    """BERT's head for masked language modelling; its last map is the word embeddings'."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """States (..., D) and word vectors (V, D) -> logits (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


def visible(ids: Tensor) -> Tensor:
    """(B, 1, 1, T) bool: which tokens may be attended to, those that are no padding.

    The first one always, so that a row of nothing but padding has finite states.
    """
    mask = ids != PAD_ID
    mask[:, 0] = True
    return mask[:, None, None, :]


def initialise(root: nn.Module, width: int) -> None:
    """BERT's first weights, in place: normal with deviation 0.02, biases zero.

    0.02 is for BERT's width of 768; narrower layers get more, so that what they put out is alike.
    """
    std = _INIT_STD * math.sqrt(_INIT_WIDTH / width)
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
