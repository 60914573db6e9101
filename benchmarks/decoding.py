"""Ways from the bytes of a JPEG to a random crop at the network's size: speed, and what it costs.

    python -m benchmarks.decoding [--rounds 7] [--out FILE.json]

Photo-like pictures, crops of 90-100 % of the area as in training, one thread, no loader. The ways
take turns, several rounds, and the median counts. Differences, in 8-bit levels over all pixels, are
to the exact path: Pillow decodes all of it, cuts, resizes. `decode_crop` is what training uses;
it alone also checks the header and draws the crop within the time measured.
"""

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from benchmarks.embedding import processor
from clipserve.images import Crop, ImageTransform, TrainTransform, decode_image
from training.decoding import decode_crop

PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "numpy")
SIZES = {(60, 80): 24, (640, 480): 8, (1920, 1080): 4}
"""width, height: number of pictures"""
TARGETS = (64, 224)
BICUBIC = Image.Resampling.BICUBIC

Way = Callable[[bytes, Crop, int], np.ndarray]
"""file, crop, side of the result -> (side, side, 3) uint8"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decoding.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for size, count in SIZES.items():
        files = [photo(*size, seed) for seed in range(count)]
        kilobytes = round(statistics.mean(map(len, files)) / 1000, 1)
        for target in TARGETS:
            name = f"{size[0]}x{size[1]} to {target}"
            results[name] = {
                "file_kb": kilobytes,
                "ways": measure(files, size, target, arguments.rounds),
            }
    report = {
        "benchmark": "decoding",
        "unit": "pictures per second on one thread, median of rounds; differences to the exact"
        " path in 8-bit levels",
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {"processor": processor(), "threads": 1},
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90 that costs a decoder what a photo costs: about 2 bits a pixel.

    Noise at several scales, the coarser the stronger, little of it coloured, and a sensor's noise.
    """
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 118, np.float32)
    for cell, strength in ((240, 90), (60, 40), (12, 18), (4, 8), (2, 5)):
        shape = (max(2, height // cell + 1), max(2, width // cell + 1))
        grey = random.normal(0, 1, shape)
        for channel in range(3):
            coarse = (grey + 0.3 * random.normal(0, 1, shape)).astype(np.float32)
            layer = Image.fromarray(coarse).resize((width, height), BICUBIC)
            pixels[..., channel] += strength * 0.6 * np.asarray(layer)
    pixels += random.normal(0, 3, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(
    files: list[bytes], size: tuple[int, int], target: int, rounds: int
) -> dict[str, dict[str, float]]:
    transform = TrainTransform(ImageTransform((target, target)), (0.9, 1.0), (0.75, 4 / 3))
    crops = [transform.draw_crop(size, np.random.default_rng(i)) for i in range(len(files))]
    # On every decoder's grid, so that all of them can cut at the same place.
    crops = [Crop(*(side // 8 * 8 for side in crop)) for crop in crops]
    ways = WAYS | {"decode_crop": whole_path(transform)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            for data, crop in zip(files, crops, strict=True):
                way(data, crop, target)
            if round:  # the first is to warm up
                seconds[name].append(time.perf_counter() - started)
    exact = [pillow(data, crop, target) for data, crop in zip(files, crops, strict=True)]
    table = {}
    for name, way in ways.items():
        made = [way(data, crop, target) for data, crop in zip(files, crops, strict=True)]
        if name == "decode_crop":  # its own crops
            exact = [
                transform.resize(decode_image(data), np.random.default_rng(0)).transpose(1, 2, 0)
                for data in files
            ]
        speed = len(files) / statistics.median(seconds[name])
        table[name] = {"pictures_per_s": float(f"{speed:.3g}")} | difference(made, exact)
    return table


def difference(made: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    levels = np.abs(np.stack(made).astype(int) - np.stack(exact))
    return {
        "max": int(levels.max()),
        "percentile_99.9": float(np.percentile(levels, 99.9)),
        "mean": round(float(levels.mean()), 3),
    }


def pillow(data: bytes, crop: Crop, target: int) -> np.ndarray:
    return _pillow_cut(decode_image(data), crop, target, 1)


def pillow_draft(data: bytes, crop: Crop, target: int, at_least: int) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    full_width = picture.width
    by = _reduction(crop, target, at_least)
    picture.draft("RGB", (-(-picture.width // by), -(-picture.height // by)))
    picture.load()
    return _pillow_cut(picture, crop, target, round(full_width / picture.width))


def torchvision(data: bytes, crop: Crop, target: int) -> np.ndarray:
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    left, top, width, height = crop
    part = v2.functional.crop(pixels, top, left, height, width)
    resized = v2.functional.resize(
        part, [target, target], v2.InterpolationMode.BICUBIC, antialias=True
    )
    return np.asarray(resized.permute(1, 2, 0))


def simple(
    data: bytes, crop: Crop, target: int, at_least: int = 0, torch_resize: bool = True
) -> np.ndarray:
    by = _reduction(crop, target, at_least)
    # libjpeg-turbo's header, not Pillow's: two microseconds.
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // by), min_width=-(-width // by))
    if torch_resize:
        return _torch_cut(pixels, crop, target, by)
    return _pillow_cut(Image.fromarray(pixels), crop, target, by)


def simple_careless(data: bytes, crop: Crop, target: int) -> np.ndarray:
    pixels = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    return _torch_cut(pixels, crop, target, 1)


def whole_path(transform: TrainTransform) -> Way:
    def way(data: bytes, crop: Crop, target: int) -> np.ndarray:
        return decode_crop(data, transform, np.random.default_rng(0)).transpose(1, 2, 0)

    return way


def _ways() -> dict[str, Way]:
    def of(function: Callable[..., np.ndarray], **options: Any) -> Way:
        return lambda data, crop, target: function(data, crop, target, **options)

    return {
        "pillow": pillow,
        "pillow draft >= 1x": of(pillow_draft, at_least=1),
        "pillow draft >= 2x": of(pillow_draft, at_least=2),
        "torchvision": torchvision,
        "simplejpeg + pillow": of(simple, torch_resize=False),
        "simplejpeg + torch": of(simple),
        "simplejpeg fastdct, fastupsample + torch": simple_careless,
        "simplejpeg >= 1x + torch": of(simple, at_least=1),
        "simplejpeg >= 2x + pillow": of(simple, at_least=2, torch_resize=False),
        "simplejpeg >= 2x + torch": of(simple, at_least=2),
    }


WAYS = _ways()


def _reduction(crop: Crop, target: int, at_least: int) -> int:
    """The largest that leaves the crop `at_least` times the target; 1 if that is 0."""
    if not at_least:
        return 1
    sides = (8, 4, 2)
    return next((by for by in sides if min(crop[2:]) >= at_least * target * by), 1)


def _pillow_cut(picture: Image.Image, crop: Crop, target: int, by: int) -> np.ndarray:
    left, top, width, height = (side // by for side in crop)
    part = picture.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((target, target), BICUBIC))


def _torch_cut(pixels: np.ndarray, crop: Crop, target: int, by: int) -> np.ndarray:
    left, top, width, height = (side // by for side in crop)
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    batch = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized = F.interpolate(batch, (target, target), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
