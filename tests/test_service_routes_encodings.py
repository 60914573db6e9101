"""Vectors as clients know them."""

import numpy as np
import pytest
from toys import from_b64

from service.routes.encodings import encode

ROWS = np.array([[0.6, -0.8, 0, 0, 0, 0, 0, 0, 0.1], [1, 0, 0, 0, 0, 0, 0, 0, 0]], np.float32)


def test_floats_and_base64_are_exact():
    assert np.array_equal(np.stack(encode(ROWS, "float")), ROWS)
    assert np.array_equal(from_b64(encode(ROWS, "base64")), ROWS)


def test_bytes_keep_the_angles():
    rows = np.random.default_rng(0).normal(size=(20, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    signed = np.stack(encode(rows, "int8"))
    assert (signed.min(), signed.max()) >= (-127, 127)
    assert np.abs(signed).max(axis=1).tolist() == [127] * 20
    units = signed / np.linalg.norm(signed, axis=1, keepdims=True)
    np.testing.assert_allclose(units @ units.T, rows @ rows.T, atol=0.01)
    assert np.array_equal(np.stack(encode(rows, "uint8")), signed + 128)


@pytest.mark.parametrize(("kind", "offset"), [("ubinary", 0), ("binary", 128)])
def test_bits_are_packed_with_the_first_one_highest(kind: str, offset: int):
    first, second = encode(ROWS, kind)  # type: ignore[arg-type]
    assert first.tolist() == [0b10000000 - offset, 0b10000000 - offset]
    assert second.tolist() == [0b10000000 - offset, -offset]
