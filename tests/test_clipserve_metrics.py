import numpy as np
import pytest

from clipserve.metrics import RETRIEVAL_METRICS, accuracy, ranks_of_best, recalls, retrieval


def naive(
    images: np.ndarray, texts: np.ndarray, text_of: np.ndarray, k: int
) -> tuple[float, float]:
    """Recall by sorting, one query at a time; for similarities without ties."""
    i2t = []
    for i, image in enumerate(images):
        order = sorted(range(len(texts)), key=lambda j: -float(image @ texts[j]))
        i2t.append(any(text_of[j] == i for j in order[:k]))
    t2i = []
    for j, text in enumerate(texts):
        order = sorted(range(len(images)), key=lambda i: -float(text @ images[i]))
        t2i.append(text_of[j] in order[:k])
    return float(np.mean(i2t)), float(np.mean(t2i))


def test_recall_equals_a_naive_restatement_with_several_captions() -> None:
    random = np.random.default_rng(0)
    images = random.normal(size=(60, 8))
    text_of = random.permutation(np.repeat(np.arange(60), 3))
    texts = images[text_of] + random.normal(size=(180, 8)) * 1.5
    scores = retrieval(images, texts, text_of, "val/")
    for k in (1, 5, 10):
        i2t, t2i = naive(images, texts, text_of, k)
        assert scores[f"val/i2t_r{k}"] == pytest.approx(i2t)
        assert scores[f"val/t2i_r{k}"] == pytest.approx(t2i)
        assert scores[f"val/mean_r{k}"] == pytest.approx((i2t + t2i) / 2)


def test_a_model_without_information_scores_zero_not_luck() -> None:
    same = np.ones((20, 4))
    assert retrieval(same, same, np.arange(20))["mean_r10"] == 0.0
    assert accuracy(np.zeros((5, 3)), np.zeros(5, dtype=int)) == 0.0


def test_a_diverged_model_scores_zero() -> None:
    nothing = np.full((20, 4), np.nan)
    assert retrieval(nothing, nothing, np.arange(20))["mean_r10"] == 0.0
    assert accuracy(np.full((5, 3), np.nan), np.zeros(5, dtype=int)) == 0.0


def test_k_beyond_the_gallery_counts_everything() -> None:
    vectors = np.eye(3)
    assert retrieval(vectors, vectors[[1, 2, 0]], np.arange(3))["mean_r5"] == 1.0


def test_accuracy_by_hand() -> None:
    logits = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert accuracy(logits, np.array([0, 1])) == 0.5
    assert accuracy(logits, np.array([0, 1]), k=2) == 1.0


def test_the_rank_of_the_best_positive_by_hand() -> None:
    scores = np.array(
        [
            [0.9, 0.5, 0.7, 0.1],  # of two positives the better one counts
            [0.9, 0.5, 0.7, 0.1],  # positives that are better are no competitors
            [0.5, 0.5, 0.5, 0.1],  # equals rank before it
            [0.9, 0.5, 0.7, 0.1],  # without a positive: behind all
            [np.nan, 0.5, 0.7, 0.1],  # what is no number is not behind a positive
            [np.nan, 0.5, 0.7, 0.1],  # nor is a positive before anything then
        ]
    )
    positives = np.zeros((6, 4), bool)
    positives[0, [1, 2]] = positives[1, [0, 1]] = positives[2, 1] = True
    positives[4, 2] = positives[5, 0] = True
    assert ranks_of_best(scores, positives).tolist() == [1, 0, 2, 4, 1, 3]


def test_recalls_by_hand() -> None:
    scores = recalls(np.array([0, 1, 4, 30]), np.array([9, 10]), "x/")
    assert scores == {
        "x/i2t_r1": 0.25,
        "x/t2i_r1": 0.0,
        "x/mean_r1": 0.125,
        "x/i2t_r5": 0.75,
        "x/t2i_r5": 0.0,
        "x/mean_r5": 0.375,
        "x/i2t_r10": 0.75,
        "x/t2i_r10": 0.5,
        "x/mean_r10": 0.625,
    }
    assert set(scores) == {f"x/{name}" for name in RETRIEVAL_METRICS}


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        retrieval(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0, dtype=int))
