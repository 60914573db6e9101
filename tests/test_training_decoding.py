"""decode_crop against the exact path: Pillow decodes it all, cuts, and resizes."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import encode
from PIL import Image, ImageFile

from clipserve.errors import ImageError
from clipserve.images import ImageLimits, ImageTransform, TrainTransform, decode_image
from training.decoding import decode_crop

DATA = Path(__file__).parents[2] / "shared" / "data"


def transform(
    size: int | tuple[int, int] = 64, scale: tuple[float, float] = (0.5, 1.0), mode: Any = "bicubic"
) -> TrainTransform:
    sides = (size, size) if isinstance(size, int) else size
    return TrainTransform(ImageTransform(sides, interpolation=mode), scale, (0.75, 1.33))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth areas, some detail, some noise, and another corner for each orientation."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 118.0)
    for cell, strength in ((120, 60), (30, 25), (4, 8)):
        coarse = random.normal(128, strength, (height // cell + 2, width // cell + 2, 3))
        layer = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        pixels += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), float) - 128
    pixels += random.normal(0, 2, (height, width, 1))
    pixels[: height // 3, : width // 3] += 80
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def exact(data: bytes, how: TrainTransform, seed: int = 0) -> np.ndarray:
    return how.resize(decode_image(data), np.random.default_rng(seed))


def fast(data: bytes, how: TrainTransform, seed: int = 0) -> np.ndarray:
    return decode_crop(data, how, np.random.default_rng(seed))


def assert_close(data: bytes, how: TrainTransform, seeds: range = range(4)) -> None:
    """The tolerance stated in training/decoding.py for photos."""
    for seed in seeds:
        ours, theirs = fast(data, how, seed), exact(data, how, seed)
        assert ours.shape == theirs.shape
        assert ours.dtype == np.uint8
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.mean() <= 1
        assert np.percentile(difference, 99.9) <= 5
        assert difference.max() <= 24


@pytest.mark.parametrize("size", [(60, 80), (256, 256), (640, 480), (1023, 701), (1920, 1080)])
@pytest.mark.parametrize("to", [32, 64, 224])
def test_pixels_equal_the_exact_path_to_within_the_tolerance(
    size: tuple[int, int], to: int
) -> None:
    assert_close(encode(photo(*size), "JPEG", quality=90), transform(to))


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"progressive": True},
        {"quality": 30, "optimize": True},
        {"restart_marker_blocks": 3},
        {"keep_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(75, 61), (777, 601)])
def test_every_kind_of_jpeg_is_within_the_tolerance(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    data = encode(photo(*size), "JPEG", **{"quality": 90} | options)
    assert_close(data, transform())


def test_greyscale_is_within_the_tolerance() -> None:
    data = encode(photo(640, 480).convert("L"), "JPEG")
    assert_close(data, transform())
    red, green, blue = fast(data, transform())
    assert np.array_equal(red, green)
    assert np.array_equal(red, blue)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_non_square_result_is_within_the_tolerance(mode: str) -> None:
    data = encode(photo(640, 480), "JPEG")
    assert fast(data, transform((24, 40), mode=mode)).shape == (3, 24, 40)
    assert_close(data, transform((24, 40), mode=mode))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("size", [(80, 60), (640, 480), (645, 483)])
def test_exif_orientation_is_applied(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(*size), "JPEG", quality=90, exif=exif)
    assert_close(data, transform(32), range(3))


@pytest.mark.parametrize("folder", ["ucm/images.tar", "fashion/train-00000.tar"])
def test_real_pictures_are_within_the_tolerance(folder: str) -> None:
    if not (DATA / folder).exists():
        pytest.skip(f"needs the test data {folder}")
    with tarfile.open(DATA / folder) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][::50][:20]
        files = [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    assert len(files) == 20
    for data in files:
        assert_close(data, transform(32), range(2))
        assert_close(data, transform(64), range(2))


def test_hard_edges_differ_no_more_than_stated() -> None:
    cells = np.random.default_rng(0).integers(0, 2, (100, 120)).astype(np.uint8) * 255
    lines = Image.fromarray(cells).convert("RGB").resize((960, 800), Image.Resampling.NEAREST)
    data = encode(lines, "JPEG", quality=90)
    for to in (64, 128, 224):
        difference = np.abs(fast(data, transform(to)).astype(int) - exact(data, transform(to)))
        assert difference.max() <= 48
        assert difference.mean() <= 4


def test_a_crop_that_is_drawn_far_from_the_corner_is_at_the_same_place() -> None:
    how = transform(32, scale=(0.08, 0.1))
    data = encode(photo(1601, 1203), "JPEG", quality=90)
    assert_close(data, how, range(12))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_take_the_exact_path(format: str) -> None:
    data = encode(photo(200, 150), format)
    assert np.array_equal(fast(data, transform(), 3), exact(data, transform(), 3))


def test_cmyk_takes_the_exact_path() -> None:
    data = encode(photo(200, 150).convert("CMYK"), "JPEG")
    assert np.array_equal(fast(data, transform(), 3), exact(data, transform(), 3))


def test_the_first_of_several_pictures_in_one_file_is_within_the_tolerance() -> None:
    buffer = io.BytesIO()
    photo(200, 150).save(buffer, "MPO", save_all=True, append_images=[photo(200, 150, 1)])
    assert_close(buffer.getvalue(), transform())


def test_without_augmentation_the_pixels_are_those_of_inference() -> None:
    data = encode(photo(300, 200), "JPEG")
    how = transform(scale=(1.0, 1.0))
    assert np.array_equal(fast(data, how), how.inference.resize(decode_image(data)))


def test_both_paths_draw_the_same_random_numbers() -> None:
    for data in (encode(photo(300, 200), "JPEG"), encode(photo(300, 200), "PNG")):
        ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
        decode_crop(data, transform(), ours)
        transform().resize(decode_image(data), theirs)
        assert ours.random() == theirs.random()


def test_the_same_seed_gives_the_same_pixels_on_any_number_of_threads() -> None:
    data = encode(photo(640, 480), "JPEG")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(fast(data, transform(), 7))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], fast(data, transform(), 8))


def test_the_result_owns_its_memory() -> None:
    pixels = fast(encode(photo(64, 64), "JPEG"), transform(64, scale=(0.99, 1.0)))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize(
    "limits",
    [ImageLimits(max_pixels=59_999), ImageLimits(max_bytes=100), ImageLimits(max_aspect=1.1)],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_limits_are_held_before_a_pixel_is_decoded(
    limits: ImageLimits, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    data = encode(photo(300, 200), format)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    with pytest.raises(ImageError, match="at most"):
        decode_crop(data, transform(), np.random.default_rng(0), limits)


@pytest.mark.parametrize("data", [b"", b"no picture", b"<html></html>", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        fast(data, transform())


def fails(decode: Any, data: bytes) -> bool:
    try:
        decode(data, transform(32))
    except ImageError:
        return True
    return False


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(60, 50), (300, 280)])
def test_cut_files_fail_exactly_where_the_exact_path_does(
    size: tuple[int, int], progressive: bool
) -> None:
    data = encode(photo(*size), "JPEG", progressive=progressive)
    lengths = [*range(0, len(data), max(len(data) // 60, 1)), *range(len(data) - 6, len(data))]
    results = [fails(fast, data[:length]) for length in lengths]
    assert results == [fails(exact, data[:length]) for length in lengths]
    assert sum(results) > 50


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(60, 50), (300, 280)])
def test_damaged_files_fail_exactly_where_the_exact_path_does(
    size: tuple[int, int], progressive: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(*size), "JPEG", progressive=progressive, exif=exif)
    random = np.random.default_rng(1)
    outcomes = set()
    for i in range(150):
        damaged = bytearray(data)
        # Half of the damage in the headers, where there is most to go wrong.
        for place in random.integers(0, 700 if i % 2 else len(data), 3):
            damaged[place] ^= 1 << int(random.integers(8))
        outcome = fails(fast, bytes(damaged))
        assert outcome == fails(exact, bytes(damaged)), f"case {i}"
        outcomes.add(outcome)
    assert outcomes == {True, False}


def test_what_libjpeg_warns_of_is_decoded_exactly() -> None:
    whole = encode(photo(300, 280), "JPEG")
    odd = whole[:-2] + bytes(10) + whole[-2:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd, strict=True)
    assert np.array_equal(fast(odd, transform()), exact(odd, transform()))


def test_bytes_behind_the_picture_do_no_harm() -> None:
    data = encode(photo(300, 280), "JPEG")
    assert np.array_equal(fast(data + b"\0" * 100, transform()), fast(data, transform()))


def test_a_header_that_lies_about_the_height_is_taken_as_the_exact_path_takes_it() -> None:
    data = bytearray(encode(photo(64, 64), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 7] = (4000).to_bytes(2, "big")
    assert np.array_equal(fast(bytes(data), transform()), exact(bytes(data), transform()))
