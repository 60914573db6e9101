import tracemalloc
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from albefs import CAPTIONS, tiny_albef
from conftest import encode, make_picture

from clipserve.config import RerankScore
from clipserve.errors import ConfigError
from clipserve.images import decode_image
from clipserve.metrics import KS
from clipserve.metrics import retrieval as recalls_of
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.sources import SourceOptions
from training.distributed import World
from training.evaluate import report, rerank, retrieval
from training.evaluate.gallery import Gallery, embed_shards
from training.evaluate.report import evaluate
from training.evaluate.rerank import evaluate_reranked
from training.evaluate.retrieval import evaluate_retrieval
from training.shards import PackOptions, pack


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Weights so large that pictures and texts make a difference to the matching head."""
    found = tiny_albef(tmp_path / "words")
    with torch.no_grad():
        for parameter in found.network.fusion.parameters():
            parameter.mul_(2 if parameter.ndim == 2 else 1)
        found.network.matching_head.weight.mul_(10)
    return found


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Eight pictures; every other one has two captions."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = ["image,caption"]
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
        words = [f"{CAPTIONS[i % 6]} {'cat ' * i}", f"{CAPTIONS[(i + 1) % 6]} {'dog ' * i}"]
        lines += [f"{i}.png,{text}" for text in words[: 1 + i % 2]]
    (folder / "captions.csv").write_text("\n".join(lines))
    options = PackOptions(source=SourceOptions(group_by="image"))
    pack(folder / "captions.csv", tmp_path / "shards", options)
    return ShardSet.open(tmp_path / "shards")


def make_gallery(num_images: int = 20, noise: float = 0.8, seed: int = 0) -> Gallery:
    """Noisy vectors; a third of the pictures have three captions, in mixed order."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(num_images, 6))
    text_of = np.repeat(np.arange(num_images), np.where(np.arange(num_images) % 3, 1, 3))
    text_of = random.permutation(text_of)
    texts = images[text_of] + noise * random.normal(size=(len(text_of), 6))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    return Gallery(unit[0], unit[1], [f"text {j}" for j in range(len(text_of))], text_of)


def truth(gallery: Gallery) -> np.ndarray:
    """(N, M): 1 for pairs, 0 for others."""
    rows = np.arange(len(gallery.images))
    return np.where(gallery.text_of[None, :] == rows[:, None], 1.0, 0.0)


def reranked(
    monkeypatch: pytest.MonkeyPatch,
    model: Model,
    gallery: Gallery,
    table: np.ndarray,
    k: int,
    score: RerankScore = "matching",
) -> dict[str, float]:
    """With logits of a match (N, M) as the table has them."""

    def match(
        model: Model, shards: Any, gallery: Gallery, pairs: np.ndarray, world: World
    ) -> np.ndarray:
        assert (np.diff(pairs) > 0).all()  # by picture, each pair once
        image, text = np.divmod(pairs, len(gallery.texts))
        return table[image, text]

    monkeypatch.setattr(rerank, "_match", match)
    nothing: Any = None
    return evaluate_reranked(model, nothing, gallery, k, score)


def naive(gallery: Gallery, table: np.ndarray, k: int, weight: float) -> dict[str, float]:
    """Recalls by sorting lists, one query at a time; for scores without ties."""
    cosine = gallery.images @ gallery.texts.T
    score = table + weight * cosine

    def recall(n: int, similarity: np.ndarray, logits: np.ndarray, pairs: np.ndarray) -> float:
        hits = 0
        for row, second, positive in zip(similarity, logits, pairs, strict=True):
            order = sorted(range(len(row)), key=lambda j: -row[j])
            front = sorted(order[:k], key=lambda j: -second[j])
            hits += any(positive[j] for j in (front + order[k:])[:n])
        return hits / len(similarity)

    found: dict[str, float] = {}
    for n in KS:
        i2t = recall(n, cosine, score, truth(gallery))
        t2i = recall(n, cosine.T, score.T, truth(gallery).T)
        found |= {f"i2t_r{n}": i2t, f"t2i_r{n}": t2i, f"mean_r{n}": (i2t + t2i) / 2}
    return found


def plain(gallery: Gallery) -> dict[str, float]:
    return recalls_of(gallery.images, gallery.texts, gallery.text_of)


@pytest.mark.parametrize("score", get_args(RerankScore))
@pytest.mark.parametrize("k", [1, 2, 5, 12, 1000])
def test_it_equals_a_naive_restatement(
    monkeypatch: pytest.MonkeyPatch, model: Model, k: int, score: RerankScore
) -> None:
    monkeypatch.setattr(rerank, "_CHUNK_ROWS", 7)
    monkeypatch.setattr(rerank, "_CHUNK_PAIRS", 11)
    for seed in range(3):
        gallery = make_gallery(seed=seed)
        table = np.random.default_rng(seed).normal(size=truth(gallery).shape) + truth(gallery)
        found = reranked(monkeypatch, model, gallery, table, k, score)
        weight = {"matching": 0.0, "matching+cosine": 1.0}.get(score, model.logit_scale.item())
        assert found == pytest.approx(naive(gallery, table, k, weight))


def test_a_head_that_knows_the_pairs_finds_them_all(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    gallery = make_gallery()
    assert plain(gallery)["mean_r1"] < 0.8
    for k in (len(gallery.texts), 10_000):  # more than there are is all there are
        scores = reranked(monkeypatch, model, gallery, truth(gallery), k)
        assert set(scores.values()) == {1.0}


def test_it_orders_candidates_and_finds_no_new_ones(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    gallery = make_gallery(noise=1.5)
    before = plain(gallery)
    assert before["mean_r5"] < before["mean_r10"] < 1
    best = reranked(monkeypatch, model, gallery, truth(gallery), k=5)
    worst = reranked(monkeypatch, model, gallery, -truth(gallery), k=5)
    for way in ("i2t", "t2i", "mean"):
        assert best[f"{way}_r1"] == best[f"{way}_r5"] == worst[f"{way}_r5"] == before[f"{way}_r5"]
        assert best[f"{way}_r10"] == worst[f"{way}_r10"] == before[f"{way}_r10"]
    assert worst["t2i_r1"] == 0


def test_one_candidate_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    for seed in range(5):
        gallery = make_gallery(seed=seed)
        table = np.random.default_rng(seed).normal(size=truth(gallery).shape)
        assert reranked(monkeypatch, model, gallery, table, k=1) == plain(gallery)


def test_the_cosine_decides_between_equal_logits_only_where_it_is_added(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    gallery = make_gallery()
    equal = np.zeros(truth(gallery).shape)
    assert reranked(monkeypatch, model, gallery, equal, 1000, "matching+cosine") == plain(gallery)
    assert reranked(monkeypatch, model, gallery, equal, 1000)["mean_r1"] == 0


@pytest.mark.parametrize("k", [1, 3, 20])
def test_a_model_without_information_scores_zero_not_luck(
    monkeypatch: pytest.MonkeyPatch, model: Model, k: int
) -> None:
    same = np.ones((20, 4)) / 2
    gallery = Gallery(same, same, ["a"] * 20, np.arange(20))
    assert reranked(monkeypatch, model, gallery, np.zeros((20, 20)), k)["mean_r10"] == 0
    nothing = np.full((20, 20), np.nan)
    assert reranked(monkeypatch, model, gallery, nothing, k)["mean_r10"] == 0


def brute_force(model: Model, shards: ShardSet, gallery: Gallery) -> np.ndarray:
    """(N, M) logits of a match, one pair at a time."""
    pictures = [model.transform(decode_image(shards.read(i).image)) for i in range(len(shards))]
    table = np.empty((len(pictures), len(gallery.texts)))
    with torch.no_grad():
        for j, caption in enumerate(gallery.captions):
            ids = model.tokenizer([caption]).ids
            words, _ = model.network.encode_text_states(ids)
            for i, pixels in enumerate(pictures):
                states, _ = model.network.encode_image_states(pixels[None])
                fused = model.network.fuse(words, ids, states)
                table[i, j] = model.network.matching_logits(fused)[0, 1]
    return table


@pytest.mark.parametrize("at_a_time", [1, 3, 500])
def test_logits_are_those_of_the_models_own_pairs(
    monkeypatch: pytest.MonkeyPatch, model: Model, shards: ShardSet, at_a_time: int
) -> None:
    """In whatever portions pictures and texts are taken."""
    monkeypatch.setattr(rerank, "_IMAGES_AT_A_TIME", at_a_time)
    monkeypatch.setattr(rerank, "_TEXTS_AT_A_TIME", at_a_time)
    monkeypatch.setattr(rerank, "_IMAGE_BATCH", 2)
    monkeypatch.setattr(rerank, "_TEXT_BATCH", 2)
    gallery = embed_shards(model, shards)
    assert len(gallery.texts) == 12
    table = brute_force(model, shards, gallery)
    assert table.std() > 0.01
    pairs = np.flatnonzero(np.random.default_rng(0).random(table.size) < 0.5)
    logits = rerank._match(model, shards, gallery, pairs)
    assert logits == pytest.approx(table.ravel()[pairs], abs=1e-5)
    for k in (2, 4, 99):
        found = evaluate_reranked(model, shards, gallery, k)
        assert found == pytest.approx(naive(gallery, table, k, False))


def test_pictures_are_encoded_once_and_texts_once_for_each_block_of_pictures(
    monkeypatch: pytest.MonkeyPatch, model: Model, shards: ShardSet
) -> None:
    """Here 8 pictures in blocks of 3, and 12 texts in blocks of 5 of which 4 are a batch."""
    gallery = embed_shards(model, shards)
    seen: dict[str, list[int]] = {}

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        seen[name] = []

        def counted(rows: Any) -> Any:
            seen[name].append(len(rows))
            return real(rows)

        monkeypatch.setattr(owner, name, counted)

    for name, size in (
        ("_IMAGES_AT_A_TIME", 3),
        ("_IMAGE_BATCH", 2),
        ("_TEXTS_AT_A_TIME", 5),
        ("_TEXT_BATCH", 4),
    ):
        monkeypatch.setattr(rerank, name, size)
    count(model, "tokenizer")
    count(model.network, "encode_image_states")
    count(model.network, "encode_text_states")
    rerank._match(model, shards, gallery, np.arange(8 * 12))
    assert seen["tokenizer"] == [12]
    assert seen["encode_image_states"] == [2, 1, 2, 1, 2]
    assert seen["encode_text_states"] == 3 * [4, 1, 4, 1, 2]


def test_texts_that_no_picture_asks_for_are_not_encoded(
    monkeypatch: pytest.MonkeyPatch, model: Model, shards: ShardSet
) -> None:
    gallery = embed_shards(model, shards)
    real, rows = model.network.encode_text_states, []

    def encode_text_states(ids: Any) -> Any:
        rows.append(len(ids))
        return real(ids)

    monkeypatch.setattr(model.network, "encode_text_states", encode_text_states)
    pairs = np.array([3, 12 + 3, 12 + 7])  # texts 3 and 7
    logits = rerank._match(model, shards, gallery, pairs)
    assert rows == [2]
    assert logits == pytest.approx(brute_force(model, shards, gallery).ravel()[pairs], abs=1e-5)


def test_cosines_of_many_pairs_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both vectors of 40,000 pairs would be 41 MB."""
    monkeypatch.setattr(rerank, "_CHUNK_PAIRS", 500)
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(20, 64)), random.normal(size=(2000, 64))
    gallery = Gallery(images, texts, [""] * 2000, np.zeros(2000, np.int64))
    pairs = np.arange(40_000)
    tracemalloc.start()
    found = rerank._cosine(gallery, pairs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx((images @ texts.T).ravel())
    assert peak < 2_000_000


def test_an_unknown_score_is_refused(model: Model, shards: ShardSet) -> None:
    gallery = embed_shards(model, shards)
    with pytest.raises(ConfigError, match="unknown score 'cosine'; use matching or"):
        evaluate_reranked(model, shards, gallery, 4, cast(Any, "cosine"))


def test_both_stages_are_told_side_by_side(model: Model, shards: ShardSet) -> None:
    scores = evaluate_retrieval(model, shards, "val/", rerank=4, score="matching+cosine")
    gallery = embed_shards(model, shards)
    first = recalls_of(gallery.images, gallery.texts, gallery.text_of, "val/")
    second = evaluate_reranked(model, shards, gallery, 4, "matching+cosine", "val/reranked_")
    assert scores == first | second
    assert len(scores) == 18
    report = evaluate(
        model, shards, ["retrieval"], "caption", "none", rerank=4, score="matching+cosine"
    )
    assert report["retrieval"] == {name.removeprefix("val/"): s for name, s in scores.items()}


def test_pictures_that_do_not_decode_shift_nothing(
    model: Model, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = embed_shards(model, shards)
    table = brute_force(model, shards, gallery)
    real = ShardSet.read

    def read(self: ShardSet, i: int) -> Any:
        sample = real(self, i)
        if i in (0, 3):
            object.__setattr__(sample, "image", sample.image[:60])
        return sample

    monkeypatch.setattr(ShardSet, "read", read)
    monkeypatch.setattr(rerank, "_IMAGES_AT_A_TIME", 2)
    left = embed_shards(model, shards)
    rows = [1, 2, 4, 5, 6, 7]
    texts = [j for j in range(12) if gallery.text_of[j] in rows]
    assert left.captions == [gallery.captions[j] for j in texts]
    assert [rows[i] for i in left.text_of] == [gallery.text_of[j] for j in texts]
    found = evaluate_reranked(model, shards, left, 4)
    assert found == pytest.approx(naive(left, table[rows][:, texts], 4, False))


def test_a_model_that_only_compares_vectors_is_refused_before_the_work(
    tiny_model: Model, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "reranked_i2t_r1" not in evaluate_retrieval(tiny_model, shards)

    def embed(*_: object) -> None:
        pytest.fail("the pictures were embedded")

    for module in (retrieval, report):
        monkeypatch.setattr(module, "embed_shards", embed)
    message = "has no fusion layers to match with; .*albef_tiny"
    with pytest.raises(ConfigError, match=message):
        evaluate_retrieval(tiny_model, shards, rerank=4)
    with pytest.raises(ConfigError, match=message):
        evaluate(tiny_model, shards, ["retrieval"], "caption", "none", rerank=4)
    with pytest.raises(ConfigError, match=message):
        evaluate_reranked(tiny_model, shards, make_gallery(), 4)
