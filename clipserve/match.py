"""Whether a picture and a text belong together, read jointly: ALBEF's matching head (ITM).

Slower than comparing two vectors and more exact, so it is for few pairs: `match` for pairs given,
`match_pairs` to order again what the vectors found. Only models with fusion layers can do it.

Legend: I pictures, N pairs or texts, G pictures of a batch, n texts for each of them, P image
tokens, T text tokens, D width.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor

from clipserve.config import RerankScore
from clipserve.decoding import open_decoded
from clipserve.embed import batched, to_numpy
from clipserve.errors import ConfigError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource

if TYPE_CHECKING:
    from clipserve.model import Model


@torch.inference_mode()
def match(
    model: "Model",
    images: Iterable[ImageSource],
    texts: Iterable[str],
    batch_size: int = 32,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """(N,) float32 probabilities that picture i and text i belong together.

    Raises ConfigError for a model without fusion layers or unequal numbers, ImageError for a bad
    picture, naming it.
    """
    check_fusion(model)
    found = []
    for pairs in batched(zip_longest(images, texts), batch_size):
        if None in pairs[-1]:
            raise ConfigError("match takes as many pictures as texts: picture i goes with text i")
        decoded = [open_decoded(image, model.transform, limits) for image, _ in pairs]
        pixels = np.stack([model.transform.resize(one) for one in decoded])
        ids = model.tokenizer([text for _, text in pairs]).cut().to(model.device)
        normal = model.transform.normalize(torch.from_numpy(pixels).to(model.device))
        image_states, _ = model.network.encode_image_states(normal.to(model.dtype))
        text_states, _ = model.network.encode_text_states(ids)
        fused = model.network.fuse(text_states, ids, image_states)
        logits = model.network.matching_logits(fused).float()
        found.append(to_numpy(logits.softmax(dim=1)[:, 1]))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)


def match_pairs(
    model: "Model",
    image_states: Tensor,
    text_states: Tensor,
    ids: Tensor,
    pairs: Tensor,
    batch_size: int = 256,
) -> Tensor:
    """(N, 2) float32 matching logits, column 1 for "together", of pairs (N, 2): picture, text.

    image_states (I, P, D) and text_states (T', T, D) with ids (T', T) are what the model's forward
    gives, for any number of pictures and texts; they may stay where they are, a batch of pairs goes
    to the model's device at a time. Pairs of one picture should follow one another: what the
    cross-attention needs of a picture, most of the work, is then computed once for them all.
    """
    network, device = model.network, model.device
    logits = [torch.zeros(0, 2, device=device)]
    for pictures, texts in _batches(pairs, batch_size):
        text = texts.flatten()
        fused = network.fuse(
            text_states[text.to(text_states.device)].to(device),
            ids[text.to(ids.device)].to(device),
            image_states[pictures.to(image_states.device)].to(device),
        )
        logits.append(network.matching_logits(fused).float())
    return torch.cat(logits)


def probability(logits: np.ndarray) -> float:
    """That picture and text belong together, of a pair's logits (2,)."""
    no, yes = logits.astype(np.float64)
    return float(np.exp(-np.logaddexp(0, no - yes)))


def check_fusion(model: "Model") -> None:
    """ConfigError if the model cannot read a picture and a text together."""
    if not model.has_fusion:
        raise ConfigError(
            f"model {model.info.name!r} compares vectors and has no fusion layers to match with;"
            " use embed_images and embed_texts, or a model trained with the preset albef_tiny or"
            " albef_vit_b16"
        )


def check_score(score: str) -> None:
    """ConfigError for what pairs cannot be ordered by."""
    if score not in get_args(RerankScore):
        raise ConfigError(f"unknown score {score!r}; use {' or '.join(get_args(RerankScore))}")


def _batches(pairs: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures (G,) and their texts (G, n), in the order of the pairs (N, 2) and G n <= size.

    Of one picture, or of several that follow one another and have equally many texts.
    """
    pictures, counts = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    texts_of = torch.split(pairs[:, 1], counts.tolist())
    for count, group in groupby(zip(pictures, texts_of, strict=True), lambda item: len(item[1])):
        for batch in batched(group, max(size // count, 1)):
            chosen = torch.stack([picture for picture, _ in batch])
            texts = torch.stack([texts for _, texts in batch])
            yield from ((chosen, part) for part in torch.split(texts, size, dim=1))
