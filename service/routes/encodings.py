"""Unit vectors -> the encodings that clients know.

Legend: N items, E embedding.
"""

import base64
from typing import Any, Literal, get_args

import numpy as np

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


def encode(rows: np.ndarray, encoding: Encoding) -> list[Any]:
    """Unit vectors (N, E), a value each.

    base64 is little-endian float32. int8 and uint8 (128 is zero) scale each vector's largest number
    to 127, which leaves cosines as they are. binary and ubinary hold a bit for each number above
    zero, the first one highest (as Cohere's and Jina's); binary has 128 taken off each byte.
    """
    if encoding == "float":
        return list(np.ascontiguousarray(rows))
    if encoding == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in rows]
    if encoding in ("int8", "uint8"):
        scaled = np.rint(rows * (127 / np.abs(rows).max(axis=1, keepdims=True))).astype(np.int16)
        return list(scaled + (128 if encoding == "uint8" else 0))
    bits = np.packbits(rows > 0, axis=1).astype(np.int16)
    return list(bits - (128 if encoding == "binary" else 0))
