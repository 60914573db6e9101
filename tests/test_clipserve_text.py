from pathlib import Path
from typing import Any

import pytest
import torch

from clipserve.errors import CheckpointError
from clipserve.text import Tokenizer


def test_ids_equal_open_clips() -> None:
    import open_clip

    texts = ["a cat", "", "Caf\u00e9 &amp; cr\u00e8me", "x " * 50, "\u732b\U0001f600"]
    tokens = Tokenizer({"context_length": 16})(texts)
    assert torch.equal(tokens.ids, open_clip.SimpleTokenizer(context_length=16)(texts))


def test_truncation_is_reported_exactly_at_the_limit() -> None:
    tokens = Tokenizer({"context_length": 8})(["a b c d e f", "a b c d e f g", "short"])
    assert tokens.truncated == [False, True, False]
    assert tokens.lengths == [8, 8, 3]
    end = tokens.ids.max()
    assert tokens.ids[1, -1] == end  # the end token stays: text features are read from it


def test_cut_goes_to_the_longest_text_rounded_up() -> None:
    tokens = Tokenizer({"context_length": 32})(["a", "a b c d e f g h"])
    assert tokens.cut().shape == (2, 10)
    assert tokens.cut(multiple=8).shape == (2, 16)
    assert tokens.cut(multiple=32).shape == (2, 32)


def test_no_texts_give_no_rows() -> None:
    assert Tokenizer({"context_length": 8})([]).ids.shape == (0, 8)


def test_a_huge_text_is_cut_before_it_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer({"context_length": 77})
    lengths = []
    encode = tokenizer._inner.encode
    monkeypatch.setattr(tokenizer._inner, "encode", lambda t: lengths.append(len(t)) or encode(t))
    assert tokenizer(["word " * 4_000_000]).truncated == [True]
    assert lengths == [77 * 64]


def test_a_text_of_spaces_is_not_called_truncated() -> None:
    assert Tokenizer({"context_length": 8})([" " * 10_000 + "cat"]).truncated == [False]


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """A transformers tokenizer of eight words, saved as a folder."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "a", "red", "blue", "cat", "dog", "house"]
    inner = Words(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder)
    return folder


def test_a_transformers_tokenizer_reports_truncation_and_travels(
    word_tokenizer: Path, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"context_length": 4, "hf_tokenizer_name": str(word_tokenizer)}
    tokenizer = Tokenizer(config)
    texts = ["a red cat", "a red cat a blue dog"]
    tokens = tokenizer(texts)
    assert tokens.ids.tolist() == [[2, 3, 5, 0], [2, 3, 5, 2]]
    assert tokens.truncated == [False, True]
    tokenizer.save(tmp_path / "saved")
    moved = Tokenizer(config | {"hf_tokenizer_name": "nobody/nothing"}, tmp_path / "saved")
    assert torch.equal(moved(texts).ids, tokens.ids)


def test_a_tokenizer_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"no/such/folder.*local folder"):
        Tokenizer({"context_length": 4, "hf_tokenizer_name": "no/such/folder"})
