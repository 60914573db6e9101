import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transplants import clip_table, shaken

from clipserve.convert.proof import (
    TEXTS,
    large_jpeg,
    probe_pictures,
    prove,
    prove_others,
    shifted_picture,
)
from clipserve.errors import CheckpointError
from clipserve.model import Model, create


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return shaken(create(clip_table()))  # type: ignore[no-any-return]


def test_a_model_is_itself(model: Model) -> None:
    proof = prove(model, model.embed_images, model.embed_texts)
    assert min(proof) > 0.999999


@pytest.mark.parametrize("place", ["pictures", "texts"])
def test_a_copy_that_gives_no_numbers_is_no_copy(place: str, model: Model) -> None:
    def broken(inputs: list[Any]) -> np.ndarray:
        return np.full((len(inputs), 16), math.nan)

    images = broken if place == "pictures" else model.embed_images
    texts = broken if place == "texts" else model.embed_texts
    with pytest.raises(CheckpointError, match=f"{place}, least cosine nan"):
        prove(model, images, texts)


def test_vectors_that_hardly_differ_must_still_be_told_apart(model: Model) -> None:
    """As those of a network without training: all cosines are near 1, also of wrong pairs."""
    generator = np.random.default_rng(0)
    narrow = dict(zip(TEXTS, 1 + 1e-3 * generator.normal(size=(len(TEXTS), 16)), strict=True))
    swapped = dict(zip(TEXTS, [narrow[text] for text in reversed(TEXTS)], strict=True))

    class Narrow:
        transform, embed_images = model.transform, model.embed_images

        class tokenizer(list[str]):
            @property
            def ids(self) -> list[str]:
                return list(self)

        @staticmethod
        def encode_text(texts: list[str]) -> torch.Tensor:
            return torch.from_numpy(np.stack([narrow[text] for text in texts]))

    ours: Any = Narrow()
    prove(ours, model.embed_images, lambda texts: np.stack([narrow[t] for t in texts]))
    with pytest.raises(CheckpointError, match=r"texts, least cosine 0\.99999\d+.* spread by"):
        prove(ours, model.embed_images, lambda texts: np.stack([swapped[t] for t in texts]))


def test_one_vector_for_all_inputs_is_no_copy(model: Model) -> None:
    with pytest.raises(CheckpointError, match="gives pictures"):
        prove(model, lambda pictures: model.embed_images(pictures[:1]), model.embed_texts)


@pytest.mark.parametrize("side", [32, 224, 256, 384])
def test_probes_have_every_surplus_on_which_others_agree(side: int) -> None:
    sizes = [Image.open(io.BytesIO(data)).size for data in probe_pictures(side)]
    surplus = {(int(side * max(size) / min(size)) - side) % 4 for size in sizes}
    assert surplus == {0, 1, 2}


def test_a_picture_is_prepared_otherwise_only_as_it_is_said(model: Model) -> None:
    others = [shifted_picture(32), large_jpeg(32)]
    seen = {other.data: other.seen for other in others}
    notes = prove_others(model, lambda d: model.embed_images([seen[data] for data in d]), others)
    assert "theirs are cut one pixel beside; cosine 0." in notes[0]
    assert "decoded at a fraction of their size; cosine " in notes[1]
    with pytest.raises(CheckpointError, match="one pixel beside"):
        prove_others(model, model.embed_images, others[:1])
