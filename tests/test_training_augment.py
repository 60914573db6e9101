"""Augmented views against torchvision, which draws its own numbers and is not used in training."""

import random as global_random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode, make_picture
from PIL import Image

from clipserve.errors import ImageError
from clipserve.images import ImageTransform, TrainTransform
from training.augment import ViewTransform, jitter_colours, turn_hue
from training.decoding import decode_crop

PICTURE = encode(make_picture(160, 120), "JPEG", quality=95)
NOTHING: dict[str, Any] = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}


def view(
    size: tuple[int, int] = (32, 32),
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    sigma: tuple[float, float] = (0.1, 2.0),
    **probabilities: float,
) -> ViewTransform:
    """Only what is named happens."""
    crop = TrainTransform(ImageTransform(size), (0.08, 1.0), (0.75, 1.33))
    return ViewTransform(crop, strengths=strengths, sigma=sigma, **NOTHING | probabilities)


def slip(size: tuple[int, int] = (32, 32)) -> ViewTransform:
    return ViewTransform(TrainTransform(ImageTransform(size), (0.08, 1.0), (0.75, 1.33)))


def cropped(how: ViewTransform, seed: int = 0) -> np.ndarray:
    return decode_crop(PICTURE, how.crop, np.random.default_rng(seed))


def test_one_generator_gives_one_view_and_another_gives_another() -> None:
    first, again, other = (slip()(PICTURE, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_two_views_from_one_generator_differ() -> None:
    random = np.random.default_rng(0)
    assert not np.array_equal(slip()(PICTURE, random), slip()(PICTURE, random))


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), global_random.getstate()
    slip()(PICTURE, np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert global_random.getstate() == before[1]


@pytest.mark.parametrize("size", [(32, 32), (48, 20)])
def test_a_view_is_uint8_of_the_networks_size(size: tuple[int, int]) -> None:
    for seed in range(20):
        found = slip(size)(PICTURE, np.random.default_rng(seed))
        assert found.dtype == np.uint8
        assert found.shape == (3, *size)
        assert found.flags.c_contiguous


def test_without_probabilities_a_view_is_the_crop() -> None:
    for seed in range(5):
        found = view()(PICTURE, np.random.default_rng(seed))
        assert np.array_equal(found, cropped(view(), seed))


def test_a_flip_mirrors_left_and_right() -> None:
    found = view(flip=1.0)(PICTURE, np.random.default_rng(0))
    assert np.array_equal(found, cropped(view())[:, :, ::-1])


def test_grey_is_torchvisions() -> None:
    from torchvision.transforms.v2 import functional as peer

    found = view(grey=1.0)(PICTURE, np.random.default_rng(0))
    picture = Image.fromarray(cropped(view()).transpose(1, 2, 0).copy())
    expected = peer.rgb_to_grayscale(picture, num_output_channels=3)
    assert np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur"])
def test_each_happens_as_often_as_said(name: str) -> None:
    chosen: dict[str, Any] = {name: 0.3}
    how = view((16, 16), sigma=(20.0, 30.0), **chosen)
    changed = [
        not np.array_equal(how(PICTURE, np.random.default_rng(seed)), cropped(how, seed))
        for seed in range(300)
    ]
    assert 0.2 < np.mean(changed) < 0.4


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.01, 0.05, 0.3, 0.5])
def test_hue_turns_as_torchvisions_bit_for_bit(turn: float) -> None:
    from torchvision.transforms.v2 import functional as peer

    picture = make_picture(64, 48, seed=3)
    expected = np.asarray(peer.adjust_hue(picture, turn))
    assert np.array_equal(np.asarray(turn_hue(picture, turn)), expected)


def test_a_turn_of_nothing_changes_nothing() -> None:
    picture = make_picture()
    assert np.array_equal(np.asarray(turn_hue(picture, 0.001)), np.asarray(picture))


def test_jitter_is_torchvisions_operations_in_the_drawn_order() -> None:
    from torchvision.transforms.v2 import functional as peer

    operations: list[Callable[[Image.Image, float], Image.Image]] = [
        peer.adjust_brightness,
        peer.adjust_contrast,
        peer.adjust_saturation,
        peer.adjust_hue,
    ]
    strengths = (0.4, 0.3, 0.2, 0.1)
    orders = set()
    for seed in range(30):
        expected, random = make_picture(seed=seed), np.random.default_rng(seed)
        order = random.permutation(4).tolist()
        for kind in order:
            middle = 0.0 if kind == 3 else 1.0
            change = random.uniform(middle - strengths[kind], middle + strengths[kind])
            if kind < 3 or abs(change) >= 1 / 255:  # less than a step of hue is left alone
                expected = operations[kind](expected, change)
        found = jitter_colours(make_picture(seed=seed), strengths, np.random.default_rng(seed))
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        orders.add(tuple(order))
    assert len(orders) > 10


def test_strengths_of_zero_change_no_colour() -> None:
    still = view(jitter=1.0, strengths=(0.0, 0.0, 0.0, 0.0))
    assert np.array_equal(still(PICTURE, np.random.default_rng(0)), cropped(still))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_torchvisions_gaussian_to_within_rounding(sigma: float) -> None:
    from torchvision.transforms.v2 import functional as peer

    how = view((224, 224), sigma=(sigma, sigma), blur=1.0)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "PNG")
    found = how(data, np.random.default_rng(0)).astype(int)
    sharp = decode_crop(data, how.crop, np.random.default_rng(0))
    expected = peer.gaussian_blur(torch.from_numpy(sharp), [23, 23], [sigma]).numpy().astype(int)
    assert np.abs(found - expected).mean() < 1.5
    assert np.abs(sharp - expected).mean() > 5 * np.abs(found - expected).mean()


def test_blur_is_in_proportion_to_the_picture() -> None:
    large, small = (view((side, side), sigma=(2.0, 2.0), blur=1.0) for side in (224, 56))
    half = Image.new("L", (448, 448))
    half.paste(255, (224, 0, 448, 448))
    data = encode(half.convert("RGB"), "PNG")
    widths = []
    for how in (large, small):
        whole = ViewTransform(
            TrainTransform(how.crop.inference, (1.0, 1.0), (1.0, 1.0)),
            sigma=how.sigma,
            **NOTHING | {"blur": 1.0},
        )
        row = whole(data, np.random.default_rng(0))[0, 8].astype(float) / 255
        widths.append((row * (1 - row)).sum() / how.crop.inference.size[1])
    assert widths[0] == pytest.approx(widths[1], rel=0.3)


def test_a_broken_picture_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        slip()(b"no picture", np.random.default_rng(0))
