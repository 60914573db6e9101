"""The first hits in the order of ALBEF's matching head, which reads picture and text together.

Vectors find candidates among millions, matching orders the few that were found (ALBEF,
arXiv:2107.07651, section 3.4), from the small pictures that the collection keeps. Start at
`rerank`. The service, which reads the pairs by turns with other requests, takes its steps one by
one: `candidates`, `pictures_of`, `reorder`.

Legend: Q queries, I pictures, N pairs.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clipserve.config import RerankScore
from clipserve.embed import batched, to_numpy
from clipserve.errors import ConfigError, ImageError
from clipserve.images import open_image
from clipserve.match import check_fusion, check_score, match_pairs, probability
from clipserve.model import Model
from index.collection import Collection
from index.search import Hit

logger = logging.getLogger(__name__)

_IMAGES_AT_A_TIME = 64
"""pictures whose tokens are in memory: 0.1 GB at ALBEF's 577 tokens of 768 numbers in fp32"""


Logits = Mapping[tuple[int, str], np.ndarray]
"""(query, id) -> logits (2,), the second one for a match, of all pairs with a picture"""


@dataclass(frozen=True)
class Reranked:
    """Hits in their new order, and how fast that went."""

    hits: list[list[Hit]]
    """`Hit.matching` is set where a pair was read"""
    pairs_per_second: float
    """with decoding and encoding; 0 where there was nothing to read"""


@torch.inference_mode()
def rerank(
    model: Model,
    texts: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    collection: Collection,
    *,
    k_test: int = 16,
    score: RerankScore = "matching+contrastive",
) -> Reranked:
    """Order the first k_test hits of each text anew; those behind them stay where they are.

    score: the logit of a match, or its sum with the cosine (LAVIS) or with the contrastive logit,
    the model's scale times the cosine. A hit whose picture was not kept, or cannot be read, keeps
    its place, and the others are ordered around it. Each text and each picture is encoded once.
    ConfigError for a model without fusion layers.
    """
    check_fusion(model)
    if k_test < 1:
        raise ConfigError(f"k_test = {k_test} is not allowed; match at least 1 hit")
    check_score(score)
    if len(texts) != len(hits):
        raise ConfigError(f"{len(texts)} texts for {len(hits)} lists of hits; give one for each")
    started = time.monotonic()
    logits = _match(model, texts, candidates(hits, k_test), collection)
    scale = model.logit_scale.item()
    ordered = reorder(hits, logits, k_test=k_test, score=score, logit_scale=scale)
    speed = len(logits) / max(time.monotonic() - started, 1e-9)
    return Reranked(ordered, speed)


def candidates(hits: Sequence[Sequence[Hit]], k_test: int) -> dict[str, list[int]]:
    """Id -> the queries that its picture is matched with: those with it in their first k_test."""
    queries_of: dict[str, list[int]] = {}
    for row, own in enumerate(hits):
        for hit in own[:k_test]:
            queries_of.setdefault(hit.id, []).append(row)
    return queries_of


def pictures_of(collection: Collection, ids: Iterable[str]) -> dict[str, bytes]:
    """Id -> JPEG, in the order of the ids, of the items whose small picture was kept."""
    with collection.snapshot():
        rowids = collection.rowids_of(ids)
        jpegs = collection.thumbnails_of(np.array(list(rowids.values()), dtype=np.int64))
    return {id: jpegs[rowid] for id, rowid in rowids.items() if rowid in jpegs}


def reorder(
    hits: Sequence[Sequence[Hit]],
    logits: Logits,
    *,
    k_test: int,
    score: RerankScore,
    logit_scale: float,
) -> list[list[Hit]]:
    """The hits of each query by their logits, as `rerank` says; a hit without stays in its
    place."""
    factor = {"matching": 0.0, "matching+cosine": 1.0}.get(score, logit_scale)
    return [_reorder(row, own, k_test, factor, logits) for row, own in enumerate(hits)]


def warn_unread(id: str, error: ImageError) -> None:
    """Of a picture that is there and cannot be read, so that its pair is not."""
    logger.warning("the picture kept of item %r is not matched: %s", id, error)


def _match(
    model: Model, texts: Sequence[str], queries_of: dict[str, list[int]], collection: Collection
) -> dict[tuple[int, str], np.ndarray]:
    if not queries_of:
        return {}
    ids = model.tokenizer(list(texts)).cut().to(model.device)
    text_states, _ = model.network.encode_text_states(ids)
    found: dict[tuple[int, str], np.ndarray] = {}
    for block in batched(_pixels(model, list(queries_of), collection), _IMAGES_AT_A_TIME):
        pixels = torch.from_numpy(np.stack([one for _, one in block])).to(model.device)
        normal = model.transform.normalize(pixels).to(model.dtype)
        image_states, _ = model.network.encode_image_states(normal)
        pairs = [(i, row) for i, (id, _) in enumerate(block) for row in queries_of[id]]
        logits = match_pairs(model, image_states, text_states, ids, torch.tensor(pairs))
        keys = ((row, block[i][0]) for i, row in pairs)
        found |= dict(zip(keys, to_numpy(logits), strict=True))
    return found


def _pixels(
    model: Model, ids: list[str], collection: Collection
) -> Iterator[tuple[str, np.ndarray]]:
    """Ids and resized pictures (3, H, W) uint8 of those whose picture can be read."""
    for some in batched(ids, _IMAGES_AT_A_TIME):
        for id, jpeg in pictures_of(collection, some).items():
            try:
                yield id, model.transform.resize(open_image(jpeg))
            except ImageError as error:
                warn_unread(id, error)


def _reorder(
    row: int,
    hits: Sequence[Hit],
    k_test: int,
    factor: float,
    logits: Logits,
) -> list[Hit]:
    """One query's hits by logit plus factor times cosine; equal ones keep their order."""
    ordered = list(hits)
    places = [place for place, hit in enumerate(hits[:k_test]) if (row, hit.id) in logits]
    keys = {}
    for place in places:
        own = logits[row, hits[place].id]
        keys[place] = float(own[1]) + factor * hits[place].score
        ordered[place] = dataclasses.replace(hits[place], matching=probability(own))
    moved = [ordered[place] for place in sorted(places, key=lambda place: -keys[place])]
    for place, hit in zip(places, moved, strict=True):
        ordered[place] = hit
    return ordered
