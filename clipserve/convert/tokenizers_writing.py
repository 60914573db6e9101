"""Our tokenizers, out, as transformers reads them, with open_clip's cleaning of texts before them.

What the tokenizers package can express of it becomes a part of the tokenizer: curled quotes,
ligatures, wide letters, control characters and the usual HTML entities (ftfy's tables). Text that
was decoded by the wrong code (mojibake) and other entities stay as they are.
"""

import string
import tempfile
from pathlib import Path
from typing import Any

from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.towers import tokenizer_module

UNREPAIRED = "texts decoded by a wrong code, or with rare HTML entities: only ours repairs them"
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "#39": "'", "nbsp": " "}
"""`amp` first: open_clip resolves them twice"""
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
    # A CLIPTokenizer itself would forget the cleaning when it is loaded again.
    theirs = CLIPTokenizer(vocab=vocab, merges=list(inner.bpe_ranks))
    return _clean_before(theirs, _repairs(), context_length, ["input_ids", "attention_mask"])


def _with_cleaning(model: Model) -> Any:
    """The model's transformers tokenizer, with open_clip's cleaning before its own."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder))
        inner = AutoTokenizer.from_pretrained(folder)
    options = model.architecture["text_cfg"].get("tokenizer_kwargs") or {}
    if unknown := options.keys() - {"clean"}:
        raise ConfigError(f"tokenizer_kwargs.{min(unknown)} has no counterpart in transformers")
    if getattr(inner, "backend_tokenizer", None) is None:
        raise ConfigError("a tokenizer that only Python can run has no counterpart")
    steps = [*_repairs(), *_cleaning(str(options.get("clean", "whitespace")))]
    return _clean_before(inner, steps, model.context_length, ["input_ids"])


def _clean_before(inner: Any, steps: list[Any], context_length: int, inputs: list[str]) -> Any:
    """A tokenizer of transformers with these steps before its own; `inputs` is what it returns."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = inner.backend_tokenizer
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, *own])
    special = {
        name: str(token)
        for name, token in inner.special_tokens_map.items()
        if isinstance(token, str)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=inputs,
        **special,
    )


def _repairs() -> list[Any]:
    """ftfy's, in its order, as far as they look at one character after the other."""
    from ftfy import chardata
    from tokenizers import Regex, normalizers

    letters = {chr(code): text for code, text in (chardata.LIGATURES | chardata.WIDTH_MAP).items()}
    removed = "".join(f"\\x{{{code:x}}}" for code in chardata.CONTROL_CHARS)
    return [
        *(normalizers.Replace(f"&{name};", text) for name, text in _ENTITIES.items()),
        *(normalizers.Replace(letter, text) for letter, text in letters.items()),
        normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'"),
        normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'),
        normalizers.Replace(Regex(f"[{removed}]"), ""),
    ]


def _cleaning(kind: str) -> list[Any]:
    """open_clip's get_clean_fn, after the repairs."""
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
