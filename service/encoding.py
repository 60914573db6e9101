"""What the model's thread does with a batch: prepared items -> answers.

Start at `Encoder.functions`. The items: a picture is its resized pixels, on the model's device; a
text is its ids and their number; a pair is both; a call is a function.

Legend: N items, T text tokens, H height, W width, E embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clipserve.embed import embed_ids, embed_staged, to_numpy
from clipserve.match import match_pairs
from clipserve.model import Model
from clipserve.text import Tokens
from service.batching import Encode, Kind


class Padding(Protocol):
    def padding(self, fraction: float) -> None: ...


class TextRow(NamedTuple):
    ids: Tensor
    """(T,) padded to the context"""
    length: int


class Pair(NamedTuple):
    pixels: Tensor
    """(3, H, W); the same tensor in all pairs of one picture"""
    text: TextRow


class Encoder:
    """A model, as its queue sees it."""

    def __init__(self, model: Model, observer: Padding) -> None:
        self._model = model
        self._observer = observer

    def functions(self) -> Mapping[Kind, Encode]:
        """By the kind of the items."""
        return {
            "image": self.encode_images,
            "text": self.encode_texts,
            "match": self.match,
            "call": _call,
        }

    def encode_images(self, pixels: Sequence[Tensor]) -> np.ndarray:
        """(N, E) from pixels (3, H, W) uint8."""
        return embed_staged(self._model, torch.stack(list(pixels)))

    def encode_texts(self, rows: Sequence[TextRow]) -> np.ndarray:
        """(N, E); padding is left away where the model allows."""
        ids = self._join(rows)
        filled = 1 - sum(row.length for row in rows) / ids.numel()
        self._observer.padding(max(0.0, filled))
        return embed_ids(self._model, ids)

    @torch.inference_mode()
    def match(self, pairs: Sequence[Pair]) -> np.ndarray:
        """(N,) how likely picture and text of each pair belong together. Each picture is encoded
        once, and its pairs follow one another, which is what `match_pairs` is fast at."""
        model = self._model
        pictures = {id(pair.pixels): pair.pixels for pair in pairs}
        places = {picture: place for place, picture in enumerate(pictures)}
        order = sorted(range(len(pairs)), key=lambda i: places[id(pairs[i].pixels)])
        pixels = model.transform.normalize(torch.stack(list(pictures.values())).to(model.device))
        image_states, _ = model.network.encode_image_states(pixels.to(model.dtype))
        ids = self._join([pairs[i].text for i in order]).to(model.device)
        text_states, _ = model.network.encode_text_states(ids)
        rows = torch.tensor([(places[id(pairs[i].pixels)], row) for row, i in enumerate(order)])
        logits = match_pairs(model, image_states, text_states, ids, rows)
        probabilities = np.empty(len(pairs), dtype=np.float32)
        probabilities[order] = to_numpy(logits.softmax(dim=1)[:, 1])
        return probabilities

    def _join(self, rows: Sequence[TextRow]) -> Tensor:
        ids = torch.stack([row.ids for row in rows])  # (N, T)
        if not self._model.can_cut_text:
            return ids
        return Tokens(ids, [row.length for row in rows], []).cut()


def _call(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises; it is the caller's error, not the model's."""
    return [_attempt(function) for function in functions]


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error
