"""One picture, one vector: trainer, Python, command line and HTTP agree."""

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import encode, make_picture
from fastapi.testclient import TestClient
from PIL import Image

import clipserve
from clipserve import checkpoint
from clipserve.shards import ShardSet
from index.collection import Collection
from service.app import create_app
from service.registry import Registry
from service.settings import load_settings
from training.evaluate.gallery import embed_shards
from training.shards import pack


def awkward_pictures() -> dict[str, bytes]:
    """What the four ways could treat differently: alpha, EXIF, palette, CMYK, 16 bit, shapes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = make_picture(60, 45, seed=1).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    deep = np.asarray(make_picture(50, 50, seed=2).convert("L")).astype(np.uint16) * 257
    return {
        "plain.png": encode(make_picture(70, 50)),
        "alpha.png": encode(clear),
        "turned.jpg": encode(make_picture(80, 40, seed=3), "JPEG", exif=exif, quality=90),
        "palette.gif": encode(make_picture(33, 65, seed=4), "GIF"),
        "print.jpg": encode(make_picture(64, 64, seed=5).convert("CMYK"), "JPEG", quality=90),
        "deep.png": encode(Image.fromarray(deep)),
        "long.webp": encode(make_picture(200, 20, seed=6), "WEBP", lossless=True),
    }


def test_trainer_python_command_line_and_http_give_the_same_vector(
    model_dir: Path, tmp_path: Path, picture: Callable[..., Image.Image]
) -> None:
    pictures = awkward_pictures()
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"{name},about {name}\n" for name in pictures))

    trained = checkpoint.load_for_training(model_dir)
    pack(table, tmp_path / "shards")
    trainer, _, _, _ = embed_shards(trained, ShardSet.open(tmp_path / "shards"))

    served = clipserve.load(model_dir)
    python = served.embed_images([tmp_path / name for name in pictures])

    command = [sys.executable, "-m", "clipserve", "embed", str(model_dir), str(table)]
    collection = tmp_path / "collection"
    subprocess.run([*command, "--collection", str(collection)], check=True, capture_output=True)
    with Collection.open(collection, read_only=True) as opened:
        rowids = opened.rowids()
        ids = opened.ids_of(rowids)
        vectors = opened.vectors_of(rowids)
        by_id = {ids[int(rowid)]: row for rowid, row in zip(rowids, vectors, strict=True)}
    line = np.stack([by_id[f"t/{i:09d}"] for i in range(len(pictures))])

    registry = Registry(load_settings())
    registry.add_model(served)
    items = [{"image": base64.b64encode(data).decode()} for data in pictures.values()]
    app = create_app(registry.settings, registry)
    with TestClient(app, base_url="http://localhost") as client:
        reply = client.post("/v1/embeddings", json={"input": items})
    registry.close()
    assert reply.status_code == 200, reply.text
    http = np.array([entry["embedding"] for entry in reply.json()["data"]])

    for name, other in (("python", python), ("command line", line), ("http", http)):
        cosine = (trainer * other).sum(axis=1)
        assert cosine.min() >= 0.9999, (name, dict(zip(pictures, cosine.tolist(), strict=True)))
