"""In-process embedding, ours beside open_clip's, on the same weights and the same pictures.

    python -m benchmarks.embedding [--architecture ViT-B-32] [--out FILE.json]

Random weights, JPEG bytes of 640x480 in, unit vectors out: decoding, resizing and the towers. Ours
as `clipserve.load` serves it, and in int8 on a CPU that can; open_clip as its documentation shows
it, and with bf16 autocast. The variants take turns, several rounds, and the median counts. The
vectors are compared, too.
"""

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

import clipserve
from clipserve import checkpoint
from clipserve.embed import describe_precision
from clipserve.model import Model, create
from clipserve.packed import multiplies_int8

PACKAGES = ("torch", "open_clip_torch", "pillow", "numpy")
Embed = Callable[[list[Any]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedding.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        torch.manual_seed(0)
        checkpoint.save(create(arguments.architecture), directory, name="random")
        ours = clipserve.load(directory)
        image_variants, text_variants = build_variants(ours, directory)
        results = {
            "clipserve": describe_precision(ours),
            "pictures": measure(image_variants, pictures(), arguments),
            "texts": measure(text_variants, texts(), arguments),
        }
    report = {
        "benchmark": "embedding",
        "architecture": arguments.architecture,
        "unit": "items per second, median of rounds",
        "rounds": arguments.rounds,
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        },
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        **results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def build_variants(ours: Model, directory: Path) -> tuple[dict[str, Embed], dict[str, Embed]]:
    """Functions from a list of items to unit vectors, by name; ours first."""
    our_images, our_texts = {"clipserve": ours.embed_images}, {"clipserve": ours.embed_texts}
    if ours.device.type == "cpu" and multiplies_int8():
        rounded = clipserve.load(directory, "cpu", "int8")
        our_images["clipserve int8"] = rounded.embed_images
        our_texts["clipserve int8"] = rounded.embed_texts
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    model = model.eval().to(ours.device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")

    def their_images(items: list[bytes]) -> np.ndarray:
        opened = [preprocess(Image.open(io.BytesIO(item))) for item in items]
        with torch.no_grad():
            features = model.encode_image(torch.stack(opened).to(ours.device), normalize=True)
        return np.asarray(features.float().cpu())

    def their_texts(items: list[str]) -> np.ndarray:
        with torch.no_grad():
            features = model.encode_text(tokenizer(items).to(ours.device), normalize=True)
        return np.asarray(features.float().cpu())

    def under_autocast(embed: Embed) -> Embed:
        def wrapped(items: list[Any]) -> np.ndarray:
            with torch.autocast(ours.device.type, dtype=torch.bfloat16):
                return embed(items)

        return wrapped

    return (
        {
            **our_images,
            "open_clip fp32": their_images,
            "open_clip bf16 autocast": under_autocast(their_images),
        },
        {
            **our_texts,
            "open_clip fp32": their_texts,
            "open_clip bf16 autocast": under_autocast(their_texts),
        },
    )


def measure(
    variants: dict[str, Embed], items: list[Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Items per second by batch size and variant; the least cosine of ours to open_clip fp32."""
    found: dict[str, Any] = {}
    expected = variants["open_clip fp32"](items[:32])
    for name in ("clipserve", "clipserve int8"):
        if name in variants:
            cosine = (variants[name](items[:32]) * expected).sum(axis=1)
            found[f"least cosine of {name} to open_clip fp32"] = round(float(cosine.min()), 6)
    for batch in arguments.batches:
        times: dict[str, list[float]] = {name: [] for name in variants}
        for embed in variants.values():
            embed(items[:batch])  # first-time work
        for _ in range(arguments.rounds):
            for name, embed in variants.items():
                started = time.perf_counter()
                embed(items[:batch])
                times[name].append(time.perf_counter() - started)
        found[f"batch {batch}"] = {
            name: round(batch / statistics.median(seconds), 1) for name, seconds in times.items()
        }
    return found


def pictures(count: int = 32) -> list[bytes]:
    """JPEG files of smooth 640x480 pictures."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def texts(count: int = 32) -> list[str]:
    """Sentences of the usual length of a caption, about ten words."""
    words = ["a", "red", "blue", "small", "large", "dog", "cat", "house", "tree", "with", "on"]
    random = np.random.default_rng(0)
    return [" ".join(random.choice(words, size=int(random.integers(6, 14)))) for _ in range(count)]


def processor() -> str:
    """Its name, and which units for bf16 it has: virtual machines of one name differ in that."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capabilities = torch.cpu.get_capabilities()
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if capabilities.get(unit)]
    return ", ".join([names[0] if names else platform.processor(), *units])


if __name__ == "__main__":
    main()
