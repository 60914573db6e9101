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
    """the same object in all pairs of one text"""


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
        """(N, 2) matching logits, column 1 for "together". Each picture and each text is encoded
        once, and a picture's pairs follow one another, which is what `match_pairs` is fast at."""
        model = self._model
        pictures = {id(pair.pixels): pair.pixels for pair in pairs}
        texts = {id(pair.text): pair.text for pair in pairs}
        picture_places, text_places = _places(pictures), _places(texts)
        of_pairs = [(picture_places[id(p.pixels)], text_places[id(p.text)]) for p in pairs]
        order = sorted(range(len(pairs)), key=lambda i: of_pairs[i])
        pixels = model.transform.normalize(torch.stack(list(pictures.values())).to(model.device))
        image_states, _ = model.network.encode_image_states(pixels.to(model.dtype))
        ids = self._join(list(texts.values())).to(model.device)
        text_states, _ = model.network.encode_text_states(ids)
        rows = torch.tensor([of_pairs[i] for i in order])
        logits = np.empty((len(pairs), 2), dtype=np.float32)
        logits[order] = to_numpy(match_pairs(model, image_states, text_states, ids, rows))
        return logits

    def _join(self, rows: Sequence[TextRow]) -> Tensor:
        ids = torch.stack([row.ids for row in rows])  # (N, T)
        if not self._model.can_cut_text:
            return ids
        return Tokens(ids, [row.length for row in rows], []).cut()


def _places(objects: Mapping[int, object]) -> dict[int, int]:
    return {key: place for place, key in enumerate(objects)}


def _call(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises; it is the caller's error, not the model's."""
    return [_attempt(function) for function in functions]


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error
