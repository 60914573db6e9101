"""Retrieval in two stages (ALBEF, section 3.4): vectors find candidates, matching orders them.

Only the pairs that either direction asks for are matched, each once, in blocks of 256 pictures by
4096 texts whose tokens' states are in memory together: at the size of the published ALBEF (384
pixels, 30 tokens) 0.4 GB in bf16, 0.6 while batches are joined, twice that in fp32, however large
the set is. A picture is encoded once, a text once for each block of pictures that asks for it.

Legend: N images, M texts, E embedding, k candidates, P pairs to match, I pictures of a block, T
text tokens, S image tokens, D width.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clipserve.config import RerankScore
from clipserve.embed import batched, to_numpy
from clipserve.match import check_fusion, check_score, match_pairs
from clipserve.metrics import ranks_of_best, recalls
from clipserve.model import Model
from clipserve.shards import ShardSet
from clipserve.text import Tokens
from training.distributed import ALONE, World
from training.evaluate.gallery import Gallery, read_pixels

_CHUNK_ROWS = 1024
_CHUNK_PAIRS = 65536
_IMAGES_AT_A_TIME, _TEXTS_AT_A_TIME = 256, 4096
_IMAGE_BATCH, _TEXT_BATCH = 32, 256


def evaluate_reranked(
    model: Model,
    shards: ShardSet,
    gallery: Gallery,
    k: int,
    score: RerankScore = "matching",
    prefix: str = "",
    world: World = ALONE,
) -> dict[str, float]:
    """Recall at 1, 5, 10 both ways, as `clipserve.metrics.retrieval`, after matching.

    The first k by cosine (all, where there are fewer) are ordered by `score`: the logit of a match
    (ALBEF), its sum with the cosine (LAVIS), or with the contrastive logit, the model's scale times
    the cosine. The last takes both answers as evidence, which helps while matching is the weaker.
    What comes after them stays where it was. ConfigError for a model without fusion layers, or
    another score. Ranks but the first only help with the matching.
    """
    check_fusion(model)
    check_score(score)
    texts_of = _nearest(gallery.images, gallery.texts, k)
    images_of = _nearest(gallery.texts, gallery.images, k)
    num_texts = len(gallery.texts)
    wanted = [
        np.arange(len(texts_of))[:, None] * num_texts + texts_of,  # (N, k)
        images_of * num_texts + np.arange(num_texts)[:, None],  # (M, k)
    ]
    pairs = np.unique(np.concatenate([codes.ravel() for codes in wanted]))  # sorted by image
    scores = _match(model, shards, gallery, pairs, world)
    if not world.is_main:
        return {}
    if score != "matching":
        factor = model.logit_scale.item() if score == "matching+contrastive" else 1.0
        scores = scores + factor * _cosine(gallery, pairs)
    i2t, t2i = (scores[np.searchsorted(pairs, codes)] for codes in wanted)
    image_of = gallery.text_of
    return recalls(
        _ranks(gallery.images, gallery.texts, texts_of, i2t, lambda q, g: image_of[g] == q),
        _ranks(gallery.texts, gallery.images, images_of, t2i, lambda q, g: image_of[q] == g),
        prefix,
    )


def _nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) rows of the gallery, nearest by cosine, in no order; k at most the gallery's size."""
    k = min(k, len(gallery))
    found = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        similarity = queries[rows] @ gallery.T
        found[rows] = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return found


def _cosine(gallery: Gallery, pairs: np.ndarray) -> np.ndarray:
    """(P,) of pairs; a part of them at a time, because both vectors of each are copied."""
    found = np.empty(len(pairs), gallery.images.dtype)
    for start in range(0, len(pairs), _CHUNK_PAIRS):
        part = slice(start, start + _CHUNK_PAIRS)
        image, text = np.divmod(pairs[part], len(gallery.texts))
        found[part] = np.einsum("pe,pe->p", gallery.images[image], gallery.texts[text])
    return found


@torch.inference_mode()
def _match(
    model: Model,
    shards: ShardSet,
    gallery: Gallery,
    pairs: np.ndarray,
    world: World = ALONE,
) -> np.ndarray:
    """(P,) float32 logits of a match of pairs that are sorted by image; ranks take turns."""
    image, text = np.divmod(pairs, len(gallery.texts))
    tokens = model.tokenizer(gallery.captions)
    logits = np.zeros(len(pairs), np.float32)
    first = 0
    for turn, block in enumerate(batched(read_pixels(model, shards), _IMAGES_AT_A_TIME)):
        if turn % world.size != world.rank:
            first += len(block)
            continue
        image_states = _encode_images(model, [pixels for pixels, _ in block])
        begin, end = np.searchsorted(image, [first, first + len(block)])
        needed, row = np.unique(text[begin:end], return_inverse=True)
        for start in range(0, len(needed), _TEXTS_AT_A_TIME):
            chosen = np.flatnonzero((row >= start) & (row < start + _TEXTS_AT_A_TIME))
            places = np.stack([image[begin + chosen] - first, row[chosen] - start], axis=1)
            ids = _cut(tokens, needed[start : start + _TEXTS_AT_A_TIME]).to(model.device)
            found = match_pairs(
                model, image_states, _encode_texts(model, ids), ids, torch.from_numpy(places)
            )
            logits[begin + chosen] = to_numpy(found[:, 1])
        first += len(block)
    return world.total(torch.from_numpy(logits)).numpy()


def _encode_images(model: Model, pixels: Sequence[np.ndarray]) -> Tensor:
    """(I, S, D) states of resized pictures (3, H, W) uint8."""
    states = []
    for batch in batched(pixels, _IMAGE_BATCH):
        normal = model.transform.normalize(torch.from_numpy(np.stack(batch)).to(model.device))
        states.append(model.network.encode_image_states(normal.to(model.dtype))[0])
    return torch.cat(states)


def _encode_texts(model: Model, ids: Tensor) -> Tensor:
    """(rows, T, D) states of ids (rows, T)."""
    states = [model.network.encode_text_states(part)[0] for part in torch.split(ids, _TEXT_BATCH)]
    return torch.cat(states)


def _cut(tokens: Tokens, rows: np.ndarray) -> Tensor:
    """(rows, T) ids of some texts, up to the longest of these."""
    longest = max(tokens.lengths[row] for row in rows)
    return tokens.ids[rows, :longest]


def _ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    candidates: np.ndarray,
    scores: np.ndarray,
    belongs: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Rank of each query's best positive: by score among the candidates, else behind them.

    candidates and scores: (Q, k); `belongs` says of rows of queries and of the gallery, of shapes
    that broadcast, which are pairs.
    """
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, len(queries)))
        positive = belongs(rows[:, None], candidates[rows])
        among = ranks_of_best(scores[rows], positive)
        everyone = belongs(rows[:, None], np.arange(len(gallery))[None, :])
        by_cosine = ranks_of_best(queries[rows] @ gallery.T, everyone)
        # Not by whether a positive is among the candidates: of equals, luck decides which are.
        ranks[rows] = np.where(by_cosine < candidates.shape[1], among, by_cosine)
    return ranks
