import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from albefs import vocabulary as make_vocabulary
from conftest import encode, make_picture
from test_training_terms import ALBEF_SMALL

from clipserve import checkpoint, wordpiece
from clipserve.config import Config, load_config
from clipserve.errors import SampleError
from clipserve.shards import ShardSet
from training import vocabulary
from training.loop import train
from training.mixture import Mixture, WeightedShards
from training.recipe import build_model
from training.run_directory import RunDirectory
from training.shards import PackOptions, pack
from training.vocabulary import find_or_build

COLOURS = ["red", "blue", "green", "yellow"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve pictures in four shards, each shard with a word of its own, and a JSON field."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["image,caption,story"]
    for i in range(12):
        (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
        lines.append(f"{i}.png,the {COLOURS[i // 3]} house,a zebra sings")
    (folder / "captions.csv").write_text("\n".join(lines))
    pack(folder / "captions.csv", tmp_path / "shards", PackOptions(samples_per_shard=3))
    return tmp_path / "shards"


def configure(shards: Path, out: Path, *more: str) -> Config:
    given = [f"out={out}", f"data.train={shards}", "train.steps=2", *ALBEF_SMALL]
    return load_config(None, [*given, "objectives=[{name='contrastive'}]", *more])


def data(shards: Path) -> Mixture:
    return Mixture([WeightedShards(ShardSet.open(shards))])


def knows(folder: Path | None, word: str) -> bool:
    """Whether a word is one piece."""
    assert folder is not None
    words = wordpiece.load(folder)
    pieces = words.encode(word)
    return len(pieces) == 1 and pieces[0] not in words.special_ids


def test_it_is_built_once_by_the_main_process_and_found_by_the_others(
    shards: Path, tmp_path: Path
) -> None:
    config, out = configure(shards, tmp_path / "run"), tmp_path / "run"
    assert (
        find_or_build(config, data(shards), RunDirectory(out, 1), is_main=False)
        == out / "tokenizer"
    )
    assert not (out / "tokenizer").exists()
    assert (
        find_or_build(config, data(shards), RunDirectory(out, 1), is_main=True) == out / "tokenizer"
    )
    before = (out / "tokenizer" / wordpiece.FILE).read_text()
    assert all(knows(out / "tokenizer", word) for word in ("house", *COLOURS))

    def read(self: Mixture, sample: int) -> Any:
        raise AssertionError("it is there already")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "read", read)
        for is_main in (True, False):
            found = find_or_build(config, data(shards), RunDirectory(out, 1), is_main)
            assert found == out / "tokenizer"
    assert (out / "tokenizer" / wordpiece.FILE).read_text() == before


def test_the_same_captions_give_the_same_vocabulary(shards: Path, tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        config = configure(shards, tmp_path / name)
        folder = find_or_build(config, data(shards), RunDirectory(tmp_path / name, 1), is_main=True)
        assert folder is not None
        texts.append((folder / wordpiece.FILE).read_text())
    assert texts[0] == texts[1]


def test_caption_fields_are_what_it_is_made_of(shards: Path, tmp_path: Path) -> None:
    config = configure(shards, tmp_path / "run", "data.caption_fields={story=1, absent=1}")
    folder = find_or_build(config, data(shards), RunDirectory(tmp_path / "run", 1), is_main=True)
    assert knows(folder, "zebra")
    assert not knows(folder, "house")


def test_of_very_many_samples_shards_spread_evenly_are_read(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_ENOUGH_SAMPLES", 6)
    chosen = vocabulary._chosen(data(shards))
    assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 6, 7, 8]
    folder = find_or_build(
        configure(shards, tmp_path / "run"),
        data(shards),
        RunDirectory(tmp_path / "run", 1),
        is_main=True,
    )
    assert [knows(folder, word) for word in COLOURS] == [True, False, True, False]


def test_bad_samples_are_left_to_training(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Mixture.read

    def read(self: Mixture, sample: int) -> Any:
        if sample < 3:
            raise SampleError("shard 0.tar: sample changed", "changed")
        return real(self, sample)

    monkeypatch.setattr(Mixture, "read", read)
    folder = find_or_build(
        configure(shards, tmp_path / "run"),
        data(shards),
        RunDirectory(tmp_path / "run", 1),
        is_main=True,
    )
    assert [knows(folder, word) for word in COLOURS] == [False, True, True, True]


@pytest.mark.parametrize("kind", ["CLIP by name", "CLIP", "a path of its own", "pretrained"])
def test_none_is_built_where_the_model_brings_one(kind: str, shards: Path, tmp_path: Path) -> None:
    given = {
        "CLIP by name": ["model.architecture=ViT-B-32"],
        "CLIP": ["model.preset=tiny"],
        "a path of its own": [
            "model.preset=albef_tiny",
            f"model.architecture.text_cfg.tokenizer_path={make_vocabulary(tmp_path / 'words')}",
        ],
        "pretrained": ["model.pretrained=somewhere"],
    }[kind]
    settings = [f"out={tmp_path / 'run'}", f"data.train={shards}", "train.steps=2", *given]
    config = load_config(None, [*settings, "objectives=[{name='contrastive'}]"])
    assert (
        find_or_build(config, data(shards), RunDirectory(tmp_path / "run", 1), is_main=True) is None
    )
    assert not (tmp_path / "run").exists()


def test_the_network_has_as_many_words_as_there_are(shards: Path, tmp_path: Path) -> None:
    config = configure(shards, tmp_path / "run", "model.architecture.text_cfg.vocab_size=5000")
    folder = find_or_build(config, data(shards), RunDirectory(tmp_path / "run", 1), is_main=True)
    model = build_model(config, folder)
    assert model.architecture["text_cfg"]["vocab_size"] == model.tokenizer.vocab_size < 200
    assert len(model.network.text.embeddings.words.weight) == model.tokenizer.vocab_size


def test_a_run_goes_on_with_its_vocabulary_whatever_is_built_from_now_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train(configure(shards, out))
    before = (out / "tokenizer" / wordpiece.FILE).read_bytes()

    def captions(*_: Any) -> list[str]:
        return ["quite other words"] * 3

    monkeypatch.setattr(vocabulary, "_captions", captions)
    result = train(configure(shards, out, "train.steps=4"))
    assert result.step == 4
    assert (out / "tokenizer" / wordpiece.FILE).read_bytes() == before
    model = checkpoint.load_for_training(result.best)
    assert len(model.tokenizer(["house"]).ids[0].nonzero()) == 3  # start, the word, end


def test_a_model_directory_embeds_wherever_it_is_moved(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(configure(shards, out))
    expected = checkpoint.load(result.best, dtype="fp32").embed_texts(["the red house"])
    description = (result.best / "clipserve.json").read_text()
    assert str(tmp_path) not in description
    assert "tokenizer_path" not in json.loads(description)["architecture"]["text_cfg"]
    moved = tmp_path / "elsewhere"
    shutil.move(str(result.best.resolve()), moved)
    shutil.rmtree(out)
    model = checkpoint.load(moved, dtype="fp32")
    assert np.array_equal(model.embed_texts(["the red house"]), expected)
    assert model.embed_images([make_picture()]).shape == (1, 16)


def test_what_a_failed_attempt_left_is_no_vocabulary_of_other_data(
    shards: Path, tmp_path: Path
) -> None:
    out = RunDirectory(tmp_path / "run", 1)
    other = configure(shards, tmp_path / "run", "data.caption_fields={story=1}")
    folder = find_or_build(other, data(shards), out, is_main=True)
    assert knows(folder, "zebra")
    folder = find_or_build(configure(shards, tmp_path / "run"), data(shards), out, is_main=True)
    assert knows(folder, "house")
    assert not knows(folder, "zebra")
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step-000000001")  # now a run has begun
    assert not knows(find_or_build(other, data(shards), out, is_main=True), "zebra")
