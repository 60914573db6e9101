"""Tokenizers behind one interface that says when it truncates.

`Tokenizer` wraps the two kinds open_clip uses, CLIP's byte-pair encoding, which ships with
open_clip, and transformers tokenizers, and BERT's WordPiece, which ALBEF uses. The files of the
latter two travel in the model directory.

Legend: B batch, T text tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipserve import wordpiece
from clipserve.bert import PAD_ID
from clipserve.bpe import BytePairs
from clipserve.errors import CheckpointError, ConfigError
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

    `text_config` is `text_cfg` of an architecture; `folder` holds the tokenizer's files when the
    model directory has them.
    """

    def __init__(self, text_config: dict[str, Any], folder: Path | None = None) -> None:
        self.context_length = int(text_config.get("context_length", 77))
        self._name = text_config.get("hf_tokenizer_name")
        options = text_config.get("tokenizer_kwargs") or {}
        self._inner: Any
        if text_config.get("tokenizer") == "wordpiece":
            self._inner = _load_wordpiece(text_config, folder)
        elif self._name:
            mode = text_config.get("tokenizer_mode")
            self._inner = _load_transformers_tokenizer(
                str(folder or self._name), self.context_length, mode, options
            )
        else:
            self._inner = _load_bpe(self.context_length, options)

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
        if isinstance(self._inner, wordpiece.WordPiece):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / wordpiece.FILE).write_text(self._inner.content, encoding="utf-8")
        elif self._name:
            self._inner.save_pretrained(str(folder))

    @property
    def mask_id(self) -> int | None:
        """What stands for a masked word; None if the tokenizer has no such token."""
        if self._name:
            return self._inner.tokenizer.mask_token_id  # type: ignore[no-any-return]
        return getattr(self._inner, "mask_id", None)

    @property
    def pad_id(self) -> int:
        """What fills a short text up."""
        return int(self._inner.tokenizer.pad_token_id or 0) if self._name else PAD_ID

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that stand for no part of a text: never masked, never put in a word's place."""
        if self._name:
            return tuple(self._inner.tokenizer.all_special_ids)
        if isinstance(self._inner, wordpiece.WordPiece):
            return self._inner.special_ids
        return (PAD_ID, self._inner.sot_token_id, self._inner.eot_token_id)

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return len(self._inner.tokenizer) if self._name else int(self._inner.vocab_size)

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


def _load_bpe(context_length: int, options: dict[str, Any]) -> BytePairs:
    module = tokenizer_module()
    # The one without options is made by the import, and is the better part of it.
    inner = module.SimpleTokenizer(**options) if options else module._tokenizer
    return BytePairs(inner, context_length)


def _load_wordpiece(text_config: dict[str, Any], folder: Path | None) -> wordpiece.WordPiece:
    """From the model directory, or for a new model from where the architecture says."""
    named = text_config.get("tokenizer_path")
    if folder is None and named is None:
        raise ConfigError(
            "a WordPiece tokenizer needs a vocabulary: name the folder of a local BERT, or of one"
            " built from captions (clipserve.wordpiece.build), as text_cfg.tokenizer_path"
        )
    inner = wordpiece.load(folder or Path(str(named)))
    size = text_config.get("vocab_size", inner.vocab_size)
    if inner.vocab_size > size:
        raise ConfigError(
            f"the WordPiece vocabulary has {inner.vocab_size} tokens, more than the {size} of"
            " text_cfg.vocab_size; make them equal"
        )
    return inner


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
