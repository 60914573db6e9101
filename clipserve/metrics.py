"""Retrieval and classification metrics: pure functions of features.

Ties count against us: an item as good as the right one ranks before it. A constant model thus
scores zero, not luck; and so does one whose vectors are not finite.

Legend: N images, M texts, E embedding.
"""

import numpy as np

KS = (1, 5, 10)
RETRIEVAL_METRICS = tuple(f"{way}_r{k}" for k in KS for way in ("i2t", "t2i", "mean"))
_CHUNK_ROWS = 1024


def retrieval(
    images: np.ndarray, texts: np.ndarray, text_of: np.ndarray, prefix: str = ""
) -> dict[str, float]:
    """Recall at 1, 5, 10 both ways, and their means, as fractions of one.

    images (N, E) and texts (M, E) are unit vectors; `text_of[j]` is the row of the image that text
    j describes. i2t: an image scores if any of its texts is among the first k. t2i: a text scores
    if its image is. k beyond the gallery counts everything. `mean_rK` averages both directions.
    """
    if len(images) == 0 or len(texts) == 0:
        raise ValueError("retrieval needs at least one image and one text")
    i2t = best_ranks(images, texts, text_of[None, :] == np.arange(len(images))[:, None])
    t2i = best_ranks(texts, images, text_of[:, None] == np.arange(len(images))[None, :])
    return recalls(i2t, t2i, prefix)


def recalls(i2t: np.ndarray, t2i: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Recall at 1, 5, 10 from the ranks, counted from 0, of each image's and each text's best."""
    scores: dict[str, float] = {}
    for k in KS:
        scores[f"{prefix}i2t_r{k}"] = float((i2t < k).mean())
        scores[f"{prefix}t2i_r{k}"] = float((t2i < k).mean())
        scores[f"{prefix}mean_r{k}"] = (
            scores[f"{prefix}i2t_r{k}"] + scores[f"{prefix}t2i_r{k}"]
        ) / 2
    return scores


def accuracy(logits: np.ndarray, targets: np.ndarray, k: int = 1) -> float:
    """Fraction of rows whose target is among the k largest of logits (N, C)."""
    return float((_ranks(logits, targets) < min(k, logits.shape[1])).mean())


def best_ranks(queries: np.ndarray, gallery: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Rank (from 0) of each query's best positive: the number of others at least as similar."""
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        ranks[rows] = ranks_of_best(queries[rows] @ gallery.T, positives[rows])
    return ranks


def ranks_of_best(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Likewise, of each row of scores (Q, C) with its positives (Q, C); C where a row has none."""
    best = np.where(positives, scores, -np.inf).max(axis=1, keepdims=True)
    # Not "at least as similar", which nothing is to a positive that is not a number.
    others: np.ndarray = (~(scores < best) & ~positives).sum(axis=1)
    return others


def _ranks(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    own = np.take_along_axis(logits, targets[:, None], axis=1)
    num_as_good: np.ndarray = (~(logits < own)).sum(axis=1)
    return num_as_good - 1
