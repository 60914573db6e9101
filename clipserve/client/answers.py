"""What calls return, where JSON and arrays are not enough."""

import base64
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """A label and how probable it is."""

    label: str
    probability: float


@dataclass(frozen=True)
class Ranked:
    """A document that was ordered with others."""

    index: int
    """its place among those given"""
    score: float
    """cosine similarity to the query; of a model that matches (ALBEF) text with picture, the
    probability that they belong together"""


@dataclass(frozen=True)
class Hit:
    """An item that a search found."""

    id: str
    score: float
    """cosine similarity to the query"""
    caption: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    image_url: str = ""
    """a path on the service"""
    matching: float | None = None
    """the probability that text and picture belong together, where `rerank` read both"""
    vector: np.ndarray | None = None
    """(E,), where `with_vectors` asked for it"""

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Self:
        """From the service's JSON; what this version does not know is passed over."""
        known = {name: answer[name] for name in cls.__dataclass_fields__ if name in answer}
        if known.get("vector") is not None:
            known["vector"] = read_vector(known["vector"])
        return cls(**known)


def read_vector(value: str | list[float]) -> np.ndarray:
    """(E,) float32, from base64 of little-endian float32 or from a list."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), dtype="<f4")
    return np.asarray(value, dtype=np.float32)
