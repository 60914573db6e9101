"""Whether a picture and a text belong together, read jointly: ALBEF's matching head (ITM).

Slower than comparing two vectors and more exact, so it is for few pairs: `match` for pairs given,
`match_pairs` to order again what the vectors found. Only models with fusion layers can do it.

Legend: I pictures, N pairs or texts, P image tokens, T text tokens, D width.
"""

from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipserve.embed import batched, to_numpy
from clipserve.errors import ConfigError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource, open_image

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
        pixels = np.stack([model.transform.resize(open_image(image, limits)) for image, _ in pairs])
        ids = model.tokenizer([text for _, text in pairs]).cut().to(model.device)
        normal = model.transform.normalize(torch.from_numpy(pixels).to(model.device))
        states = model(normal, ids)
        every = torch.arange(len(ids), device=model.device)
        logits = match_pairs(
            model, states.image_states, states.text_states, ids, torch.stack([every, every], 1)
        )
        found.append(to_numpy(logits.softmax(dim=1)[:, 1]))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)


def match_pairs(
    model: "Model",
    image_states: Tensor,
    text_states: Tensor,
    ids: Tensor,
    pairs: Tensor,
    batch_size: int = 64,
) -> Tensor:
    """(N, 2) float32 matching logits, column 1 for "together", of pairs (N, 2): picture, text.

    image_states (I, P, D) and text_states (T', T, D) with ids (T', T) are what the model's forward
    gives, for any number of pictures and texts; they may stay where they are, a batch of pairs goes
    to the model's device at a time.
    """
    network, device = model.network, model.device
    logits = []
    for first in range(0, len(pairs), batch_size):
        picture, text = pairs[first : first + batch_size].T
        fused = network.fuse(
            text_states[text.to(text_states.device)].to(device),
            ids[text.to(ids.device)].to(device),
            image_states[picture.to(image_states.device)].to(device),
        )
        logits.append(network.matching_logits(fused).float())
    return torch.cat(logits) if logits else torch.zeros(0, 2, device=device)


def check_fusion(model: "Model") -> None:
    """ConfigError if the model cannot read a picture and a text together."""
    if not model.has_fusion:
        raise ConfigError(
            f"model {model.info.name!r} compares vectors and has no fusion layers to match with;"
            " use embed_images and embed_texts, or a model trained with the preset albef_tiny or"
            " albef_vit_b16"
        )
