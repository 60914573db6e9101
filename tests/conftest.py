"""What many tests share: a two-layer model, saved once, and pictures made on the spot."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipserve import checkpoint
from clipserve.model import Model, create
from clipserve.packed import multiplies_int8

needs_int8 = pytest.mark.skipif(not multiplies_int8(), reason="a CPU without VNNI and AMX")


def tiny_architecture() -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "width": 32,
            "layers": 1,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fetched shards and kept scans of a test are its own, those of its subprocesses too."""
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def architecture() -> dict[str, Any]:
    return tiny_architecture()


@pytest.fixture
def tiny_model() -> Model:
    torch.manual_seed(0)
    return create(tiny_architecture()).eval()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model directory; tests must not write into it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(create(tiny_architecture()), folder, name="tiny", objective=("contrastive",))
    return folder


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """picture(width, height, seed) -> a smooth RGB picture, different for each seed."""
    return make_picture


def make_picture(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """encoded(picture, format, **options) -> the bytes of the file."""
    return encode


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def captioned(tmp_path: Path) -> Callable[..., Path]:
    """captioned(n) -> a CSV of n pictures with captions, in a folder of its own."""

    def make(count: int, name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = ["image,caption,colour"]
        for i in range(count):
            (folder / f"{i}.png").write_bytes(encode(make_picture(seed=i)))
            lines.append(f"{i}.png,picture number {i},{'red' if i % 2 else 'blue'}")
        table = folder / "captions.csv"
        table.write_text("\n".join(lines) + "\n")
        return table

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, or the test is skipped."""
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The web page at the module's `address`, once it shows what is in the collection."""
    from browsing import open_page, see

    with open_page(browser, address) as page:
        see(page, "#search-status", "Some of what is in toys")
        yield page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Any]:
    """A service that the tests of a module share; none may change it."""
    from served import serving

    from service.settings import load_settings

    settings = load_settings(decode_threads=2, max_body_bytes=4 * 2**20)
    with serving(tmp_path_factory.mktemp("service"), model_dir, settings) as shared:
        yield shared


@pytest.fixture
def own_world(tmp_path: Path, model_dir: Path) -> Iterator[Any]:
    """A service that a test may change: collections below `tmp_path`, jobs in `tmp_path/jobs`."""
    from served import serving

    from service.settings import load_settings

    settings = load_settings(collections_root=tmp_path, jobs_dir=tmp_path / "jobs")
    with serving(tmp_path, model_dir, settings) as own:
        yield own


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server on a socket, in a thread; a test may parametrize it with settings."""
    from listening import Running

    from service.settings import load_settings

    made = Running(load_settings(**getattr(request, "param", {})))
    made.start()
    yield made
    made.stop()
