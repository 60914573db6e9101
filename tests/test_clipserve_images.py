import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode, make_picture
from PIL import Image

from clipserve.errors import ConfigError, ImageError
from clipserve.images import (
    ImageLimits,
    ImageTransform,
    TrainTransform,
    check_image,
    decode_image,
    open_image,
    read_limited,
)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_decodes_to_rgb(format: str) -> None:
    picture = decode_image(encode(make_picture(), format))
    assert picture.mode == "RGB"
    assert picture.size == (48, 40)
    assert check_image(encode(make_picture(), format)) == format


@pytest.mark.parametrize("format", ["PPM", "ICO", "EPS"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(ImageError, match="supported format"):
        decode_image(encode(make_picture(), format))


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    decoded = decode_image(encode(half))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((1, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    decoded = decode_image(encode(palette, transparency=0))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (200, 100, 50)


def test_grey_with_alpha_is_laid_over_white() -> None:
    assert decode_image(encode(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255,) * 3


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    top_red = Image.new("RGB", (40, 20), (0, 0, 255))
    top_red.paste((255, 0, 0), (0, 0, 40, 10))
    decoded = decode_image(encode(top_red, "JPEG", exif=exif, quality=95))
    assert decoded.size == (20, 40)
    red, _, blue = decoded.getpixel((17, 20))
    assert red > 200 > blue  # the top is now on the right


def test_cmyk_becomes_rgb() -> None:
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = decoded.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    decoded = decode_image(encode(deep))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_a_deep_picture_of_many_rows_is_scaled_as_a_whole() -> None:
    """It is done a few rows at a time, which nobody can see."""
    values = np.random.default_rng(0).normal(size=(600, 7)).astype(np.float32)
    values[5, 5] = np.nan
    low, high = np.nanmin(values), np.nanmax(values)
    expected = np.nan_to_num((values - low) * (255 / (high - low))).round()
    for mode in ("F", "I;16"):
        if mode == "F":
            deep = Image.fromarray(values)
        else:
            whole = np.linspace(0, 65535, 4200).round().astype(np.uint16).reshape(600, 7)
            deep, expected = Image.fromarray(whole), (whole / 257).round()
        found = np.asarray(decode_image(encode(deep, "TIFF")))[..., 0]
        assert np.abs(found - expected).max() <= 1


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_too_large_is_refused_from_its_header() -> None:
    with pytest.raises(ImageError, match="9000x9000 pixels; at most 64000000"):
        decode_image(png_header(9000, 9000))
    with pytest.raises(ImageError, match=r"over \d+ pixels; at most 64000000"):
        decode_image(png_header(20_000, 20_000))


def test_a_thin_picture_is_refused_from_its_header() -> None:
    with pytest.raises(ImageError, match="3x3000 pixels; the longer side"):
        decode_image(png_header(3, 3000))


def scans(size: tuple[int, int], more: int) -> bytes:
    """A progressive JPEG whose last scan comes `more` times again."""
    data = encode(Image.new("RGB", size), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + more * last + data[-2:]


def test_a_jpeg_of_a_thousand_scans_is_refused_from_its_header() -> None:
    """Each may have a few bytes, and the whole picture is gone over for it."""
    assert decode_image(scans((64, 48), 80)).size == (64, 48)
    with pytest.raises(ImageError, match="64x48 pixels in 1010 scans; at most 100 are allowed"):
        decode_image(scans((64, 48), 1000))
    small = ImageLimits(max_pixels=64 * 48)
    with pytest.raises(ImageError, match="in 30 scans; at most 24 are allowed at this size"):
        decode_image(scans((64, 48), 20), small)


def test_what_lies_within_a_jpeg_or_behind_it_is_no_scan_of_it() -> None:
    """Phones put thumbnails into one and films behind it, in which any bytes may come."""
    scan = b"\xff\xda\xff\xd9" * 400
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + scan
    data = encode(make_picture(), "JPEG", exif=exif, comment=scan)
    assert data.count(b"\xff\xda") > 800
    assert decode_image(data + scan).size == make_picture().size
    for hidden in (b"\xff\xfe\0\x04\xff\xd9", b"\xff\xfe\0\0", b"\xff\xff\xff"):
        bomb = scans((64, 48), 1000).replace(b"\xff\xda", hidden + b"\xff\xda")
        with pytest.raises(ImageError, match="in 1010 scans"):
            decode_image(bomb)


def test_limits_are_inclusive() -> None:
    data = encode(make_picture(40, 20))
    decode_image(data, ImageLimits(len(data), 800, 2.0))
    for limits in (
        ImageLimits(len(data) - 1),
        ImageLimits(max_pixels=799),
        ImageLimits(max_aspect=1.9),
    ):
        with pytest.raises(ImageError):
            decode_image(data, limits)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_every_truncation_is_an_image_error_or_a_whole_picture(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(ImageError):
        decode_image(data[: len(data) // 2])
    messages = []
    for length in range(0, len(data), max(len(data) // 40, 1)):
        try:
            decode_image(data[:length])
        except ImageError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("0x" in message for message in messages)  # no address, CVE-2026-22778


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_flipped_bytes_never_raise_anything_but_image_error(format: str) -> None:
    data = bytearray(encode(make_picture(), format))
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 4):
            damaged[place] ^= 1 << int(random.integers(8))
        try:
            decode_image(bytes(damaged), ImageLimits(max_pixels=100_000))
        except ImageError:
            continue


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"<html></html>", b"\xff\xd8\xff"])
def test_what_is_no_picture_is_an_image_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert "hello" not in str(caught.value)


def test_a_path_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(ImageError, match=r"a\.jpg: not a picture"):
        open_image(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"b\.jpg: No such file"):
        open_image(tmp_path / "b.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_limited(tmp_path / "pipe", 100)


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (200, 31), (31, 200), (32, 32), (333, 250)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_inference_pixels_equal_open_clips(
    size: tuple[int, int], mode: str, interpolation: str
) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    ours = ImageTransform((32, 32), interpolation=interpolation, resize_mode=mode)  # type: ignore[arg-type]
    theirs = image_transform_v2(PreprocessCfg(**ours.to_open_clip()), is_train=False)
    image = make_picture(*size, seed=3)
    assert torch.equal(ours(image), theirs(image))


def test_a_non_square_input_equals_open_clips() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    ours = ImageTransform((24, 40))
    theirs = image_transform_v2(PreprocessCfg(**ours.to_open_clip()), is_train=False)
    for size in ((90, 70), (70, 90)):
        assert torch.equal(ours(make_picture(*size)), theirs(make_picture(*size)))


def test_transform_survives_open_clips_configuration() -> None:
    transform = ImageTransform((24, 40), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash", 7)
    assert ImageTransform.from_open_clip(transform.to_open_clip()) == transform
    with pytest.raises(ConfigError, match="sharpen"):
        ImageTransform.from_open_clip({"size": 32, "sharpen": True})


def test_training_without_augmentation_gives_the_inference_pixels() -> None:
    inference = ImageTransform((32, 32))
    train = TrainTransform(inference, (1.0, 1.0), (0.75, 1.33))
    image = make_picture(50, 70)
    assert np.array_equal(train.resize(image, np.random.default_rng(0)), inference.resize(image))


def test_crops_are_within_scale_and_ratio_and_follow_the_generator() -> None:
    train = TrainTransform(ImageTransform((32, 32)), (0.3, 0.8), (0.5, 2.0))
    boxes = []
    for seed in range(200):
        left, top, width, height = train.draw_crop((120, 90), np.random.default_rng(seed))
        assert left >= 0
        assert top >= 0
        assert left + width <= 120
        assert top + height <= 90
        assert 0.28 < width * height / (120 * 90) < 0.82
        assert 0.48 < width / height < 2.05
        boxes.append((left, top, width, height))
    assert len(set(boxes)) > 150
    assert boxes[7] == train.draw_crop((120, 90), np.random.default_rng(7))


def test_a_picture_too_thin_for_any_crop_gives_the_centre() -> None:
    train = TrainTransform(ImageTransform((32, 32)), (0.9, 1.0), (0.75, 1.33))
    left, _, width, height = train.draw_crop((400, 10), np.random.default_rng(0))
    assert height == 10
    assert 12 <= width <= 14
    assert abs(left - (400 - width) / 2) <= 1


def test_a_pil_image_is_treated_as_its_file_would_be() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(make_picture(40, 20), "JPEG", exif=exif)
    assert open_image(Image.open(io.BytesIO(data))).size == open_image(data).size == (20, 40)
    with pytest.raises(ImageError, match="truncated"):
        open_image(Image.open(io.BytesIO(encode(make_picture(), "PNG")[:-40])))


def test_the_longest_mode_leaves_a_row_of_a_thin_picture() -> None:
    assert ImageTransform((32, 32), resize_mode="longest")(make_picture(3000, 31)).shape[1] == 32


def test_decoding_leaves_the_users_image_alone() -> None:
    image = make_picture().convert("RGBA")
    open_image(image)
    assert image.mode == "RGBA"
