"""WordPiece, BERT's tokens (arXiv:1810.04805, section 3): a vocabulary found or built, and its use.

`load` takes the vocabulary of a local BERT, `build` makes one of the captions at hand. Everything
runs on the calling thread, so that a process may fork into data workers at any time: the threads
of the `tokenizers` library would not survive that.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipserve.bert import PAD_ID
from clipserve.errors import CheckpointError, ConfigError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILE = "tokenizer.json"
_MAX_ALPHABET = 1000
"""characters that are kept, the most common ones; words with others are unknown (as in BERT)"""
_MIN_COUNT = 2
"""a piece must occur so often to become a token"""
_CHUNK = 10_000
"""words handed to the trainer as one text"""


class WordPiece:
    """Text -> the numbers of its pieces. Made from the JSON that `build` and `load` give."""

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer

        self.content = content
        self._inner = Tokenizer.from_str(content)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # "[SEP]" in a caption is text, not an end
        numbers = [self._inner.token_to_id(token) for token in SPECIAL]
        self.special_ids = tuple(number for number in numbers if number is not None)
        if len(self.special_ids) < len(SPECIAL) or self.special_ids[0] != PAD_ID:
            raise ValueError(f"it must have the tokens {', '.join(SPECIAL)}, [PAD] as number 0")
        _, _, self.sot_token_id, self.eot_token_id, self.mask_id = self.special_ids
        self.vocab_size = max(self._inner.get_vocab().values()) + 1

    def __reduce__(self) -> tuple[type["WordPiece"], tuple[str]]:
        return type(self), (self.content,)

    def encode(self, text: str) -> list[int]:
        """Numbers of the pieces, without start and end."""
        numbers: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return numbers


def load(folder: Path) -> WordPiece:
    """The vocabulary in a folder: its tokenizer.json, or BERT's vocab.txt.

    vocab.txt is taken as lower case unless a tokenizer_config.json beside it says
    `do_lower_case = false`. Raises CheckpointError.
    """
    try:
        if (folder / FILE).is_file():
            return WordPiece((folder / FILE).read_text(encoding="utf-8"))
        words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        settings = folder / "tokenizer_config.json"
        options = json.loads(settings.read_text()) if settings.is_file() else {}
        vocabulary = {word: number for number, word in enumerate(words)}
        return WordPiece(_describe(vocabulary, bool(options.get("do_lower_case", True))))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no WordPiece vocabulary: neither {FILE} nor vocab.txt"
        ) from None
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise CheckpointError(
            f"the WordPiece vocabulary in {folder} is unusable: {error}"
        ) from None


def build(captions: Iterable[str], vocab_size: int = 30522) -> WordPiece:
    """A vocabulary of at most `vocab_size` tokens, lower case and without accents, from captions.

    Pieces are joined where that is most frequent, as BERT's were; each letter is a token, at the
    start and inside of a word, so that any word of known letters can be spelled. The same captions
    in any order give the same vocabulary. Takes about 60 us a caption (2-core Xeon, 2026-11).
    Raises ConfigError when there is no room for the letters, or nothing to learn from.
    """
    counts = _count_words(captions)
    letters: Counter[str] = Counter()
    for word, count in counts.items():
        for letter in set(word):
            letters[letter] += count
    room = min(_MAX_ALPHABET, (vocab_size - len(SPECIAL)) // 2)
    if room < 1:
        raise ConfigError(f"a WordPiece vocabulary of {vocab_size} is too small; use 1000 or more")
    if not letters:
        raise ConfigError("no captions with words to build a WordPiece vocabulary from")
    common = sorted(letters, key=lambda letter: (-letters[letter], letter))[:room]
    known = set(common)
    counts = Counter({word: n for word, n in counts.items() if known.issuperset(word)})
    return WordPiece(_describe(_train(counts, sorted(common), vocab_size), lower_case=True))


def _count_words(captions: Iterable[str]) -> Counter[str]:
    from tokenizers import normalizers, pre_tokenizers

    normaliser = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        normal = normaliser.normalize_str(caption)
        counts.update(word for word, _ in splitter.pre_tokenize_str(normal))
    return counts


def _train(counts: Counter[str], alphabet: list[str], vocab_size: int) -> dict[str, int]:
    """Tokens and their numbers.

    The library numbers the letters by the chance of a hash and breaks ties by these numbers; given
    as special tokens they are numbered in the order given.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fixed = [*SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet)]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_COUNT,
        special_tokens=fixed,
        show_progress=False,
    )
    with _one_thread():
        inner.train_from_iterator(_repeat(counts), trainer)
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=False)
    return vocabulary


def _repeat(counts: Counter[str]) -> Iterator[str]:
    """Texts that hold each word as often as it was counted."""
    for word, count in counts.items():
        for done in range(0, count, _CHUNK):
            yield f"{word} " * min(_CHUNK, count - done)


def _describe(vocabulary: dict[str, int], lower_case: bool) -> str:
    """The JSON of a tokenizer that treats text as BERT's does."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    inner = Tokenizer(models.WordPiece(ordered, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lower_case, strip_accents=lower_case)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    present = [token for token in SPECIAL if token in vocabulary]
    inner.add_special_tokens([AddedToken(token, special=True) for token in present])
    content: Any = inner.to_str(pretty=True)
    return str(content)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library from starting threads, after which a fork would warn, or hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
