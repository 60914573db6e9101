import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from albefs import CAPTIONS, vocabulary

from clipserve.errors import CheckpointError, ConfigError
from clipserve.text import Tokenizer


def test_ids_equal_open_clips() -> None:
    import open_clip

    texts = ["a cat", "", "Caf\u00e9 &amp; cr\u00e8me", "x " * 50, "\u732b\U0001f600"]
    tokens = Tokenizer({"context_length": 16})(texts)
    assert torch.equal(tokens.ids, open_clip.SimpleTokenizer(context_length=16)(texts))


def test_tokenizers_share_one_vocabulary_whatever_their_context() -> None:
    short, long = Tokenizer({"context_length": 4}), Tokenizer({"context_length": 77})
    assert short._inner.inner is long._inner.inner
    assert [t(CAPTIONS).ids.shape[1] for t in (short, long)] == [4, 77]


def test_options_of_a_tokenizer_are_its_own() -> None:
    kept = Tokenizer({"tokenizer_kwargs": {"clean": "whitespace"}})
    assert kept(["A Cat"]).ids.ne(Tokenizer({})(["A Cat"]).ids).any()


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


@pytest.fixture
def wordpiece_config(tmp_path: Path) -> dict[str, Any]:
    folder = vocabulary(tmp_path / "bert")
    return {"context_length": 6, "tokenizer": "wordpiece", "tokenizer_path": str(folder)}


def test_wordpiece_rows_begin_and_end_as_berts(wordpiece_config: dict[str, Any]) -> None:
    tokenizer = Tokenizer(wordpiece_config)
    tokens = tokenizer(["a red cat", "a red cat a", "a red cat a dog and", ""])
    assert tokens.truncated == [False, False, True, False]
    assert tokens.lengths == [5, 6, 6, 2]
    assert tokens.ids[0].tolist() == [2, *tokenizer._encode("a red cat")[1:-1], 3, 0]
    assert tokens.ids[2, -1] == 3  # the end stays
    assert tokens.ids[3].tolist() == [2, 3, 0, 0, 0, 0]
    assert torch.equal(tokens.ids[1, :5], tokens.ids[2, :5])


def test_wordpiece_files_travel(wordpiece_config: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer(wordpiece_config)
    tokenizer.save(tmp_path / "saved")
    moved = Tokenizer({"context_length": 6, "tokenizer": "wordpiece"}, tmp_path / "saved")
    assert torch.equal(moved(CAPTIONS).ids, tokenizer(CAPTIONS).ids)


def test_wordpiece_without_a_vocabulary_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"text_cfg\.tokenizer_path"):
        Tokenizer({"context_length": 6, "tokenizer": "wordpiece"})


def test_more_tokens_than_the_network_has_are_refused(wordpiece_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"more than the 50 of text_cfg\.vocab_size"):
        Tokenizer(wordpiece_config | {"vocab_size": 50})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_tokenizers_can_be_copied_to_workers(
    wordpiece_config: dict[str, Any], duplicate: Callable[[Tokenizer], Tokenizer]
) -> None:
    for config in (wordpiece_config, {"context_length": 8}):
        tokenizer = Tokenizer(config)
        assert torch.equal(duplicate(tokenizer)(CAPTIONS).ids, tokenizer(CAPTIONS).ids)


def test_special_tokens_are_named(wordpiece_config: dict[str, Any], word_tokenizer: Path) -> None:
    bert = Tokenizer(wordpiece_config)
    assert (bert.pad_id, bert.mask_id, bert.special_ids) == (0, 4, (0, 1, 2, 3, 4))
    assert max(map(max, (bert._encode(text) for text in CAPTIONS))) < bert.vocab_size <= 120
    clip = Tokenizer({"context_length": 8})
    assert (clip.pad_id, clip.mask_id, clip.vocab_size) == (0, None, 49408)
    assert clip.special_ids == (0, 49406, 49407)
    other = Tokenizer({"context_length": 4, "hf_tokenizer_name": str(word_tokenizer)})
    assert (other.pad_id, other.mask_id, other.vocab_size) == (0, None, 8)
    assert set(other.special_ids) == {0, 1}
