"""Tokenizers behind one interface that says when it truncates.

`Tokenizer` wraps the two kinds open_clip uses: CLIP's byte-pair encoding, which ships with
open_clip, and transformers tokenizers, whose files travel in the model directory.

Legend: B batch, T text tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve.errors import CheckpointError
from clipserve.towers import tokenizer_module

# A token of English text is about 4 characters; nothing that fits the context is this long, and a
# hostile text of 20 MB is cut before the slow cleaning and splitting start.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Tokens:
    """`ids` (B, T) int64, padded to the context; `truncated[i]` if text i did not fit into it."""

    ids: Tensor
    lengths: list[int]
    """tokens of each text that fit, start and end tokens included"""
    truncated: list[bool]

    def cut(self, multiple: int = 1) -> Tensor:
        """`ids` up to the longest text, rounded up to a `multiple` (few shapes to compile for)."""
        longest = -(-max(self.lengths, default=1) // multiple) * multiple
        return self.ids[:, :longest]


class Tokenizer:
    """Text -> token ids of one model, and whether the text fitted.

    `text_config` is open_clip's `text_cfg`; `folder` holds the files of a transformers tokenizer
    when the model directory has them.
    """

    def __init__(self, text_config: dict[str, Any], folder: Path | None = None) -> None:
        self.context_length = int(text_config.get("context_length", 77))
        self._name = text_config.get("hf_tokenizer_name")
        options = text_config.get("tokenizer_kwargs") or {}
        if self._name:
            mode = text_config.get("tokenizer_mode")
            self._inner = _load_transformers_tokenizer(
                str(folder or self._name), self.context_length, mode, options
            )
        else:
            module = tokenizer_module()
            self._inner = module.SimpleTokenizer(context_length=self.context_length, **options)

    def __call__(self, texts: list[str]) -> Tokens:
        """Tokenise; texts longer than the context are cut, keeping the end token, and marked."""
        limit = self.context_length * _MAX_CHARACTERS_PER_TOKEN
        cut, too_long = (
            zip(*(_cut(text, limit) for text in texts), strict=True) if texts else ((), ())
        )
        if self._name:
            return self._tokenize_transformers(list(cut), list(too_long))
        rows = [self._encode(text) for text in cut]
        ids = torch.zeros(len(rows), self.context_length, dtype=torch.long)
        lengths, truncated = [], []
        for i, row in enumerate(rows):
            kept = row[: self.context_length]
            kept[-1] = row[-1]  # the end token, from which the text features are read
            ids[i, : len(kept)] = torch.tensor(kept)
            lengths.append(len(kept))
            truncated.append(too_long[i] or len(row) > self.context_length)
        return Tokens(ids, lengths, truncated)

    def save(self, folder: Path) -> None:
        """Write what no package ships; nothing for CLIP's own tokenizer."""
        if self._name:
            self._inner.save_pretrained(str(folder))

    def _encode(self, text: str) -> list[int]:
        inner = self._inner
        return [inner.sot_token_id, *inner.encode(text), inner.eot_token_id]

    def _tokenize_transformers(self, texts: list[str], too_long: list[bool]) -> Tokens:
        if not texts:
            return Tokens(torch.zeros(0, self.context_length, dtype=torch.long), [], [])
        ids = self._inner(texts)
        cleaned = [self._inner.clean_fn(text) for text in texts]
        full = [len(row) for row in self._inner.tokenizer(cleaned)["input_ids"]]
        truncated = [
            long or length > self.context_length
            for long, length in zip(too_long, full, strict=True)
        ]
        return Tokens(ids, [min(length, self.context_length) for length in full], truncated)


def _cut(text: str, limit: int) -> tuple[str, bool]:
    if len(text) <= limit:
        return text, False
    text = " ".join(text.split())  # spaces are no tokens
    return text[:limit], len(text) > limit


def _load_transformers_tokenizer(
    source: str, context_length: int, mode: str | None, options: dict[str, Any]
) -> Any:
    try:
        return tokenizer_module().HFTokenizer(
            source, context_length=context_length, tokenizer_mode=mode, **options
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"tokenizer {source!r} cannot be loaded: {first_line};"
            " put its files into a local folder and name that as text_cfg.hf_tokenizer_name"
        ) from error
