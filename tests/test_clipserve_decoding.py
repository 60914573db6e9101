"""What inference reads against the exact path: Pillow decodes it all, and resizes."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from conftest import encode
from PIL import Image
from test_training_decoding import photo

import clipserve
from clipserve.decoding import decode, open_decoded
from clipserve.embed import embed_pixels
from clipserve.errors import ImageError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, decode_image, make_thumbnail
from clipserve.transforms import ImageTransform

TRANSFORM = ImageTransform((64, 64))


def fast(data: bytes, transform: ImageTransform = TRANSFORM) -> np.ndarray:
    return transform.resize(decode(data, transform))


def exact(data: bytes, transform: ImageTransform = TRANSFORM) -> np.ndarray:
    return transform.resize(decode_image(data))


def assert_close(data: bytes, transform: ImageTransform = TRANSFORM) -> None:
    """The tolerance stated in clipserve/decoding.py."""
    assert decode(data, transform).reduction > 1
    ours, theirs = fast(data, transform), exact(data, transform)
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() <= 1
    assert np.percentile(difference, 99.9) <= 8
    assert difference.max() <= 24


@cache
def jpeg(width: int, height: int, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(width, height), "JPEG", **{"quality": 90, "exif": exif} | options)


@pytest.mark.parametrize("size", [(1100, 1031), (1031, 1601), (2049, 301), (2048, 1536)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("to", [(64, 64), (48, 96)])
def test_a_large_jpeg_is_reduced_within_the_tolerance(
    size: tuple[int, int], mode: Any, to: tuple[int, int]
) -> None:
    assert_close(jpeg(*size), ImageTransform(to, resize_mode=mode))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1104, 1040), (1106, 1042)])
def test_exif_orientation_is_applied_to_what_was_reduced(
    size: tuple[int, int], orientation: int
) -> None:
    assert_close(jpeg(*size, orientation))


def test_a_turned_picture_with_parts_of_pixels_at_its_edge_is_not_reduced() -> None:
    data = jpeg(1103, 1041, 6)
    assert decode(data, TRANSFORM).reduction == 1
    assert np.array_equal(fast(data), exact(data))


def test_what_is_left_is_twice_the_result_and_twice_a_thumbnail() -> None:
    assert ImageTransform((224, 224)).reduction((4000, 3000)) == 4
    assert ImageTransform((224, 224)).reduction((1920, 896)) == 2
    assert ImageTransform((224, 224)).reduction((1920, 895)) == 1
    assert ImageTransform((32, 32)).reduction((4096, 3000)) == 8
    assert ImageTransform((32, 32)).reduction((1023, 1000)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"progressive": True},
        {"keep_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("grey", [False, True])
def test_a_jpeg_that_is_not_reduced_has_the_exact_pixels(
    options: dict[str, Any], grey: bool
) -> None:
    picture = photo(333, 251).convert("L" if grey else "RGB")
    data = encode(picture, "JPEG", **{} if grey else options)
    assert np.array_equal(np.asarray(decode(data, TRANSFORM).picture), decode_image(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "CMYK"])
def test_all_other_pictures_have_the_exact_pixels(format: str) -> None:
    picture = photo(1100, 1030)
    data = encode(picture.convert("CMYK"), "JPEG") if format == "CMYK" else encode(picture, format)
    assert np.array_equal(fast(data), exact(data))


def test_the_first_of_several_pictures_in_a_phones_file_counts() -> None:
    buffer = io.BytesIO()
    photo(1100, 1030).save(buffer, "MPO", save_all=True, append_images=[photo(200, 150, 1)])
    assert_close(buffer.getvalue())


def test_vectors_are_those_of_the_whole_picture_within_the_tolerance(model_dir: Path) -> None:
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    for data in (jpeg(1600, 1200), jpeg(2049, 1153)):
        ours, theirs = (
            embed_pixels(model, [fast(data, model.transform)])[0],
            exact(data, model.transform),
        )
        assert ours @ embed_pixels(model, [theirs])[0] >= 0.9999


def test_a_path_and_its_bytes_give_the_same_vector(model_dir: Path, tmp_path: Path) -> None:
    data = jpeg(1600, 1200)
    (tmp_path / "a.jpg").write_bytes(data)
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    of_path, of_bytes = model.embed_images([tmp_path / "a.jpg", data])
    assert np.array_equal(of_path, of_bytes)
    pixels = fast(data, model.transform)
    assert np.array_equal(of_path, embed_pixels(model, [pixels, pixels])[0])


def test_a_thumbnail_of_a_reduced_picture_is_as_large_and_looks_the_same() -> None:
    data = jpeg(1600, 1200)
    decoded = decode(data, ImageTransform((32, 32)))
    assert decoded.reduction == 2
    small, whole = (
        Image.open(io.BytesIO(make_thumbnail(picture)))
        for picture in (decoded.picture, decode_image(data))
    )
    assert small.size == whole.size == (256, 192)
    assert np.abs(np.asarray(small, float) - np.asarray(whole, float)).mean() < 2


@pytest.mark.parametrize(
    "limits",
    [ImageLimits(max_pixels=9_999), ImageLimits(max_bytes=100), ImageLimits(max_aspect=1.1)],
)
def test_limits_are_held_before_a_pixel_is_decoded(
    limits: ImageLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(200, 100)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    with pytest.raises(ImageError, match="at most"):
        decode(data, TRANSFORM, limits)


def error(read: Any, data: bytes) -> str | None:
    try:
        read(data)
    except ImageError as caught:
        return str(caught)
    return None


@pytest.mark.parametrize("progressive", [False, True])
def test_cut_and_damaged_files_raise_what_the_exact_path_raises(progressive: bool) -> None:
    data = jpeg(300, 280, 6, progressive=progressive)
    files = [data[:length] for length in range(0, len(data), len(data) // 40)]
    random = np.random.default_rng(1)
    for i in range(100):
        damaged = bytearray(data)
        for place in random.integers(0, 700 if i % 2 else len(data), 3):
            damaged[place] ^= 1 << int(random.integers(8))
        files.append(bytes(damaged))
    errors = [error(decode_image, file) for file in files]
    assert [error(fast, file) for file in files] == errors
    assert errors.count(None) > 5
    assert len(set(errors)) > 3


def test_a_path_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(200, 100)[:900])
    with pytest.raises(ImageError, match=r"a\.jpg: damaged or truncated JPEG picture"):
        open_decoded(tmp_path / "a.jpg", TRANSFORM, DEFAULT_LIMITS)
