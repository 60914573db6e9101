"""How near an export's vectors are to ours, over many sizes of pictures: transformers' processor.

    python -m benchmarks.export_sizes MODEL PICTURES.tar [--count 600] [--out FILE.json]

Each picture is stretched to a size drawn at random. Its surplus is what is cut off when its shorter
side has the network's size: of 3, 7, 11, ... pixels transformers cuts one pixel beside us, and
JPEGs of 512 pixels or more we decode at a fraction of their size.
"""

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.embedding import processor
from clipserve import checkpoint
from clipserve.console import print_line
from clipserve.convert import export_model

PACKAGES = ("torch", "transformers", "torchvision", "pillow")
LONGEST = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export_sizes.json"))
    arguments = parser.parse_args()
    model = checkpoint.load(arguments.model, "cpu", "fp32")
    cosines: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        export_model(arguments.model, Path(folder) / "theirs", "transformers")
        embed = build_theirs(Path(folder) / "theirs")
        random = np.random.default_rng(0)
        for picture in read_pictures(arguments.pictures, arguments.count):
            size = draw_size(random, model.transform.size[0])
            form = str(random.choice(["PNG", "JPEG"]))
            data = encode(picture.resize(size, Image.Resampling.LANCZOS), form)
            kind = kind_of(size, form, model.transform.size[0])
            cosine = float((model.embed_images([data]) @ embed(data).T).item())
            cosines.setdefault(kind, []).append(cosine)
    report = {
        "benchmark": "export_sizes",
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": {name: version(name) for name in PACKAGES},
        "architecture": model.architecture,
        "training": model.info.training,
        "results": {kind: summarise(found) for kind, found in sorted(cosines.items())},
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    for kind, numbers in report["results"].items():
        print_line(f"{kind}: {numbers}")


def build_theirs(folder: Path) -> Callable[[bytes], np.ndarray]:
    """The bytes of a picture -> (1, E), of unit length, as transformers' documentation shows it."""
    from transformers import AutoModel, AutoProcessor

    network = AutoModel.from_pretrained(str(folder)).eval()
    prepare = AutoProcessor.from_pretrained(str(folder))

    @torch.inference_mode()
    def embed(data: bytes) -> np.ndarray:
        inputs = prepare(images=[Image.open(io.BytesIO(data))], return_tensors="pt")
        features = network.get_image_features(**inputs).pooler_output
        return np.asarray(torch.nn.functional.normalize(features, dim=-1).numpy())

    return embed


def read_pictures(file: Path, count: int) -> list[Image.Image]:
    """The first pictures of a tar, in the order of their names."""
    with tarfile.open(file) as archive:
        names = sorted(n for n in archive.getnames() if n.endswith((".jpg", ".png", ".tif")))
        found = [archive.extractfile(name) for name in names[:count]]
        return [Image.open(io.BytesIO(f.read())).convert("RGB") for f in found if f is not None]


def draw_size(random: np.random.Generator, side: int) -> tuple[int, int]:
    """Width and height, the longer at most three times the shorter."""
    short = int(random.integers(side, LONGEST // 2))
    long = int(random.integers(short, min(3 * short, LONGEST)))
    return (long, short) if random.random() < 0.5 else (short, long)


def encode(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=95)
    return buffer.getvalue()


def kind_of(size: tuple[int, int], form: str, side: int) -> str:
    surplus = int(side * max(size) / min(size)) - side
    kind = "cut one pixel beside" if surplus % 4 == 3 else "cut alike"
    return f"{kind}, large JPEG" if form == "JPEG" and max(size) >= 512 else kind


def summarise(cosines: list[float]) -> dict[str, Any]:
    return {
        "pictures": len(cosines),
        "least": round(min(cosines), 6),
        "median": round(float(np.median(cosines)), 6),
    }


if __name__ == "__main__":
    main()
