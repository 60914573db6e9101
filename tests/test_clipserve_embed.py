import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode, make_picture

import clipserve
from clipserve.embed import resolve_device, resolve_dtype
from clipserve.errors import ConfigError, ImageError
from clipserve.model import Model


def test_paths_bytes_and_images_give_one_vector(tiny_model: Model, tmp_path: Path) -> None:
    image = make_picture()
    file = tmp_path / "a.png"
    file.write_bytes(encode(image))
    vectors = tiny_model.embed_images([file, str(file), encode(image), image])
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, vectors[0], atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_batch_size_does_not_matter(tiny_model: Model) -> None:
    pictures = [make_picture(seed=i) for i in range(7)]
    texts = [f"number {i}" * (i + 1) for i in range(7)]
    assert np.allclose(
        tiny_model.embed_images(pictures, 2), tiny_model.embed_images(pictures, 7), atol=1e-6
    )
    assert np.allclose(tiny_model.embed_texts(texts, 2), tiny_model.embed_texts(texts), atol=1e-6)


def test_nothing_in_nothing_out(tiny_model: Model) -> None:
    assert tiny_model.embed_images([]).shape == (0, 16)
    assert tiny_model.embed_texts([]).shape == (0, 16)


def test_a_bad_picture_is_named(tiny_model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        tiny_model.embed_images([make_picture(), tmp_path / "bad.jpg"])


def test_truncation_is_logged(tiny_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_model.embed_texts(["word " * 100, "short"])
    assert "1 texts were cut to the model's 16 tokens" in caplog.text


def test_bf16_agrees_with_fp32_and_keeps_the_temperature(model_dir: Path) -> None:
    full = clipserve.load(model_dir, device="cpu", dtype="fp32")
    half = clipserve.load(model_dir, device="cpu", dtype="bf16")
    assert half.dtype == torch.bfloat16
    pictures = [make_picture(seed=i) for i in range(4)]
    cosine = (full.embed_images(pictures) * half.embed_images(pictures)).sum(axis=1)
    assert cosine.min() > 0.9995
    assert half.logit_scale.item() == full.logit_scale.item()


def test_unknown_devices_and_dtypes_are_named() -> None:
    with pytest.raises(ConfigError, match="'gpu9'"):
        resolve_device("gpu9")
    with pytest.raises(ConfigError, match="cuda:99"):
        resolve_device("cuda:99")
    with pytest.raises(ConfigError, match="'int4'.*fp32 or bf16"):
        resolve_dtype("int4", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_gpu_agrees_with_the_cpu(model_dir: Path) -> None:
    cpu = clipserve.load(model_dir, device="cpu", dtype="fp32")
    for dtype, least in (("fp32", 0.99999), ("bf16", 0.9995)):
        gpu = clipserve.load(model_dir, device="cuda", dtype=dtype)
        pictures = [make_picture(seed=i) for i in range(4)]
        assert (cpu.embed_images(pictures) * gpu.embed_images(pictures)).sum(1).min() > least
        texts = ["a cat", "two dogs"]
        assert (cpu.embed_texts(texts) * gpu.embed_texts(texts)).sum(1).min() > least
