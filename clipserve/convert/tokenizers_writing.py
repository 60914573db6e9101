"""Our tokenizers, out, as transformers reads them; without what only our cleaning of texts does.

CLIP's own becomes a CLIPTokenizer. It leaves broken Unicode and HTML entities as they are, which
open_clip's cleaning (ftfy) repairs. Of the others the cleaning of open_clip's that the tokenizers
package can express becomes a part of the tokenizer.
"""

import string
import tempfile
from pathlib import Path
from typing import Any

from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.towers import tokenizer_module

UNREPAIRED = "texts with broken Unicode or HTML entities: ours repairs them first, theirs does not"
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def write_tokenizer(model: Model, folder: Path) -> list[str]:
    """Into a folder; a line for what is otherwise there."""
    if model.architecture["text_cfg"].get("tokenizer") == "wordpiece":
        model.tokenizer.save(folder)
        return []
    to_transformers(model).save_pretrained(str(folder))
    return [UNREPAIRED]


def to_transformers(model: Model) -> Any:
    """A transformers tokenizer with this model's ids. ConfigError where there is none."""
    text = model.architecture["text_cfg"]
    if text.get("tokenizer") == "wordpiece":
        raise ConfigError("tokenizer = wordpiece has no counterpart beside transformers' CLIP")
    if text.get("tokenizer_mode"):
        raise ConfigError(f"tokenizer_mode = {text['tokenizer_mode']!r} has no counterpart")
    if text.get("hf_tokenizer_name"):
        return _with_cleaning(model)
    if text.get("tokenizer_kwargs"):
        raise ConfigError(f"tokenizer_kwargs = {text['tokenizer_kwargs']} has no counterpart")
    return _clip_tokenizer(model.context_length)


def _clip_tokenizer(context_length: int) -> Any:
    from transformers import CLIPTokenizer

    inner = tokenizer_module()._tokenizer
    vocab = {_SPECIAL.get(token, token): number for token, number in inner.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(inner.bpe_ranks), model_max_length=context_length)


def _with_cleaning(model: Model) -> Any:
    """The model's transformers tokenizer, with open_clip's cleaning before its own."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder))
        inner = AutoTokenizer.from_pretrained(folder)
    options = model.architecture["text_cfg"].get("tokenizer_kwargs") or {}
    if unknown := options.keys() - {"clean"}:
        raise ConfigError(f"tokenizer_kwargs.{min(unknown)} has no counterpart in transformers")
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("a tokenizer that only Python can run has no counterpart")
    steps = _cleaning(str(options.get("clean", "whitespace")))
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)
    special = {
        name: str(token)
        for name, token in inner.special_tokens_map.items()
        if isinstance(token, str)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model.context_length,
        model_input_names=["input_ids"],
        **special,
    )


def _cleaning(kind: str) -> list[Any]:
    """open_clip's get_clean_fn, but for ftfy and HTML."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if kind == "canonicalize":
        punctuation = "".join(f"\\{character}" for character in string.punctuation)
        steps += [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        ]
    if kind in ("canonicalize", "lower"):
        steps.append(normalizers.Lowercase())
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
