import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from albefs import CAPTIONS

from clipserve import wordpiece
from clipserve.errors import CheckpointError, ConfigError


def tokens(built: wordpiece.WordPiece, text: str) -> list[str]:
    names = {number: name for name, number in built._inner.get_vocab().items()}
    return [names[number] for number in built.encode(text)]


def test_frequent_words_become_tokens_and_rare_ones_pieces() -> None:
    built = wordpiece.build(["cat dog cat dog cat dog tac"], 40)
    assert tokens(built, "cat dog") == ["cat", "dog"]
    assert "".join(tokens(built, "tacdog")).replace("##", "") == "tacdog"
    assert len(tokens(built, "tacdog")) > 1


def test_the_first_tokens_are_berts_special_ones() -> None:
    built = wordpiece.build(CAPTIONS, 100)
    vocabulary = built._inner.get_vocab()
    assert [vocabulary[token] for token in wordpiece.SPECIAL] == [0, 1, 2, 3, 4]
    assert built.special_ids == (0, 1, 2, 3, 4)
    assert (built.sot_token_id, built.eot_token_id, built.mask_id) == (2, 3, 4)


def test_case_and_accents_do_not_matter() -> None:
    built = wordpiece.build(CAPTIONS, 100)
    assert built.encode("A R\u00c9D CAT") == built.encode("a red cat")


def test_unknown_letters_are_unknown_words() -> None:
    built = wordpiece.build(CAPTIONS, 100)
    assert tokens(built, "a \u732b cat") == ["a", "[UNK]", "cat"]


def test_special_tokens_in_a_caption_are_text() -> None:
    built = wordpiece.build([*CAPTIONS, *["[pad] [mask]"] * 3], 200)
    assert tokens(built, "[PAD]") == ["[", "pad", "]"]
    assert not {0, 2, 3, 4} & set(built.encode("[PAD] [CLS] [SEP] [MASK]"))


@pytest.mark.parametrize("size", [40, 60, 1000])
def test_the_size_asked_for_is_a_limit(size: int) -> None:
    built = wordpiece.build(CAPTIONS * 3, size)
    numbers = sorted(built._inner.get_vocab().values())
    assert numbers == list(range(built.vocab_size))
    assert built.vocab_size <= size
    assert max(max(built.encode(caption)) for caption in CAPTIONS) < size


def test_letters_for_which_there_is_no_room_are_left_out() -> None:
    built = wordpiece.build(["aaa aaa aaa bbb bbb z"], 9)
    assert built.vocab_size <= 9
    assert tokens(built, "z") == ["[UNK]"]
    assert tokens(built, "aaa") != ["[UNK]"]


def many_captions(seed: int) -> list[str]:
    """The same captions for every seed, in another order."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(300)]
    captions = [" ".join(draw.choices(words, k=6)) for _ in range(1000)]
    random.Random(seed).shuffle(captions)
    return captions


def test_the_order_of_the_captions_does_not_matter() -> None:
    first = wordpiece.build(many_captions(1), 400)
    assert wordpiece.build(iter(many_captions(2)), 400).content == first.content


def test_another_process_builds_the_same(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps(many_captions(3)))
    code = (
        "import json, sys; from clipserve import wordpiece\n"
        "captions = json.load(open(sys.argv[1]))\n"
        "sys.stdout.write(wordpiece.build(captions, 400).content)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "captions.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == wordpiece.build(many_captions(1), 400).content


def test_counts_decide_not_only_words() -> None:
    rare, common = "ab " * 3 + "cd " * 30_001, "ab " * 30_001 + "cd " * 3
    size = 5 + 4 + 4 + 1  # special, letters at the start, letters inside, one join
    assert "cd" in wordpiece.build([rare], size)._inner.get_vocab()
    assert "ab" in wordpiece.build([common], size)._inner.get_vocab()


def test_too_little_to_build_from_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no captions"):
        wordpiece.build(["", "  "], 100)
    with pytest.raises(ConfigError, match="of 6 is too small"):
        wordpiece.build(CAPTIONS, 6)


def test_encoding_equals_that_of_transformers(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    built = wordpiece.build(CAPTIONS * 2, 90)
    words = sorted(built._inner.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n")
    theirs = BertTokenizerFast(vocab=dict(words), do_lower_case=True)
    ours = wordpiece.load(tmp_path)
    for text in [*CAPTIONS, "Caf\u00e9s, in the-house!", "", "x" * 300, "\u732b mat"]:
        start, *inner, end = theirs(text)["input_ids"]
        assert (start, end) == (ours.sot_token_id, ours.eot_token_id)
        assert ours.encode(text) == built.encode(text) == inner


def test_a_saved_tokenizer_is_loaded_as_it_was(tmp_path: Path) -> None:
    built = wordpiece.build(CAPTIONS, 100)
    (tmp_path / "tokenizer.json").write_text(built.content, encoding="utf-8")
    loaded = wordpiece.load(tmp_path)
    assert [loaded.encode(c) for c in CAPTIONS] == [built.encode(c) for c in CAPTIONS]


def test_a_tokenizer_of_transformers_is_loaded(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    built = wordpiece.build(CAPTIONS, 100)
    BertTokenizerFast(vocab=built._inner.get_vocab()).save_pretrained(tmp_path)
    loaded = wordpiece.load(tmp_path)
    assert [loaded.encode(c) for c in CAPTIONS] == [built.encode(c) for c in CAPTIONS]


def test_a_cased_vocabulary_is_taken_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*wordpiece.SPECIAL, "Cat", "cat"]))
    assert wordpiece.load(tmp_path).encode("Cat cat") == [6, 6]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert wordpiece.load(tmp_path).encode("Cat cat") == [5, 6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other", "", "neither tokenizer.json nor vocab.txt"),
        ("tokenizer.json", "{", "unusable"),
        ("vocab.txt", "cat\ndog", r"\[PAD\]"),
        ("vocab.txt", "[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]", r"\[PAD\] as number 0"),
    ],
)
def test_an_unusable_folder_says_why(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        wordpiece.load(tmp_path)


def test_a_copy_treats_special_tokens_alike() -> None:
    built = wordpiece.build(CAPTIONS, 100)
    copy = pickle.loads(pickle.dumps(built))
    assert copy.encode("[SEP] a cat") == built.encode("[SEP] a cat")


FORK = """
import os, sys
from clipserve import wordpiece
built = wordpiece.build(sys.argv[1:] * 50, 100)
first = [built.encode(text) for text in sys.argv[1:]]
child = os.fork()
if not child:
    os._exit(0 if [built.encode(text) for text in sys.argv[1:]] == first else 1)
assert os.waitpid(child, 0)[1] == 0
assert "TOKENIZERS_PARALLELISM" not in os.environ
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_encodes_without_warning_or_hanging() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK, *CAPTIONS],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
