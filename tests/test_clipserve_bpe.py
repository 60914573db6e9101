"""Byte-pair encoding against open_clip's own, and what it may cost."""

import copy
import random
from typing import Any

import pytest

from clipserve import bpe
from clipserve.bpe import BytePairs, join
from clipserve.towers import tokenizer_module


@pytest.fixture
def inner() -> Any:
    """open_clip's tokenizer, with a cache of its own."""
    made = copy.copy(tokenizer_module()._tokenizer)
    made.cache = dict(made.cache)
    return made


def letters(count: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(random.Random(0).choices(alphabet, k=count))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "It's 2 photos of the Eiffel-Tower... <b>&amp;</b>",
        "Caf\u00e9 cr\u00e8me \u732b\u3068\u72ac \U0001f602\U0001f602\U0001f602",
        "!" * 300,
        "a" * 300,
        "ha" * 150,
        "theinthe" * 30,
        "<start_of_text> a cat <end_of_text>",
        letters(300),
        letters(300, "etaoin"),
        letters(100, "\u00e9\u732b\u72ac\U0001f602"),
    ],
)
def test_numbers_are_open_clips(inner: Any, text: str) -> None:
    assert BytePairs(inner, 10_000).encode(text) == inner.encode(text)


def test_a_text_that_does_not_fit_begins_as_open_clips(inner: Any) -> None:
    for text in (letters(4000, "etaoin"), "two dogs on a beach " * 100, "ha" * 2000):
        numbers = BytePairs(inner, 20).encode(text)
        assert len(numbers) >= 20
        assert numbers[:20] == inner.encode(text)[:20]


def test_pairs_of_one_rank_go_before_those_that_they_make() -> None:
    ranks = {("a", "bc"): 9, ("abc", "a"): 7}
    assert join(["a", "bc", "a", "bc"], ranks) == ["abc", "abc"]
    assert join(["a", "bc", "a", "x"], ranks) == ["abca", "x"]


def test_equal_neighbours_are_joined_from_the_left() -> None:
    assert join(list("aaaaa"), {("a", "a"): 0, ("aa", "a"): 1}) == ["aa", "aaa"]


class Counted(dict[tuple[str, str], int]):
    """Ranks that know how often they were asked."""

    asked = 0

    def get(self, *arguments: Any) -> Any:
        self.asked += 1
        return super().get(*arguments)


def test_a_long_word_costs_no_more_for_each_of_its_letters(inner: Any) -> None:
    per_letter = []
    for count in (100, 10_000):
        ranks = Counted(inner.bpe_ranks)
        join(list(letters(count)), ranks)
        per_letter.append(ranks.asked / count)
    assert per_letter[1] < 1.2 * per_letter[0] < 10


def test_what_does_not_fit_is_not_read(inner: Any) -> None:
    pairs = BytePairs(inner, 16)
    inner.bpe_ranks = Counted(inner.bpe_ranks)
    pairs.encode(letters(1_000_000))
    assert inner.bpe_ranks.asked < 10_000
    pairs.encode(" ".join(f"word{letters(n)}" for n in range(200)))
    assert len(pairs._known) < 40


def test_words_are_kept_up_to_a_number(inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_MAX_WORDS", 10)
    pairs, theirs = BytePairs(inner, 77), len(inner.cache)
    texts = [f"{a}{b} <end_of_text>" for a in "abcde" for b in "vwxyz"]
    for text in [*texts, "a" * 65]:
        assert pairs.encode(text) == BytePairs(inner, 77).encode(text)
        assert 0 < len(pairs._known) <= 10
    assert "a" * 65 not in pairs._known
    assert len(inner.cache) == theirs
