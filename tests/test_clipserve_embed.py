import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encode, make_picture, needs_int8

import clipserve
from clipserve import checkpoint, embed
from clipserve.embed import (
    describe_precision,
    precision,
    prepare,
    resolve_device,
    resolve_dtype,
)
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


def test_where_the_hardware_has_it_bf16_is_chosen_by_measuring(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "computes_bf16", lambda device: True)
    model = clipserve.load(model_dir, device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.fp32_cosine is not None
    assert 0.999 < model.fp32_cosine < 1
    assert describe_precision(model).startswith("bf16, cosine to fp32 at least 0.999")


def test_a_model_that_bf16_would_change_stays_in_fp32_and_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = clipserve.load(model_dir, device="cpu", dtype="fp32")
    monkeypatch.setattr(embed, "computes_bf16", lambda device: True)
    model = checkpoint.load_for_training(model_dir)
    with torch.no_grad():  # a few rows where the sum of large numbers is small
        model.network.visual.ln_post.bias += 1000.0
        model.network.visual.proj -= model.network.visual.proj.mean(dim=0)
    weights = model.network.visual.proj.clone()
    with caplog.at_level(logging.WARNING):
        prepare(model, "cpu")
    assert model.dtype == torch.float32
    assert torch.equal(model.network.visual.proj, weights)  # not what bf16 left of them
    assert model.fp32_cosine is not None
    assert "stays in fp32, for bf16 has a cosine to it of only" in caplog.text
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in exact.parameters()}
    assert [type(m) for m in model.network.modules()] == [type(m) for m in exact.network.modules()]


@pytest.mark.parametrize(
    ("capabilities", "computes"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_for_processors_that_are_faster_in_it(
    capabilities: dict[str, Any], computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert embed.computes_bf16(torch.device("cpu")) is computes


@needs_int8
def test_int8_is_measured_and_told(model_dir: Path) -> None:
    exact = clipserve.load(model_dir, device="cpu", dtype="fp32")
    model = clipserve.load(model_dir, device="cpu", dtype="int8")
    assert model.fp32_cosine is not None
    assert 0.99 < model.fp32_cosine < 1
    assert describe_precision(model) == f"int8, cosine to fp32 at least {model.fp32_cosine:.5f}"
    assert (precision(exact), precision(model)) == ("fp32", "int8")
    pictures = [make_picture(seed=i) for i in range(4)]
    cosine = (exact.embed_images(pictures) * model.embed_images(pictures)).sum(axis=1)
    assert 0.995 < cosine.min() < 1


@needs_int8
def test_a_model_that_int8_would_change_is_refused(model_dir: Path) -> None:
    model = checkpoint.load_for_training(model_dir)
    with torch.no_grad():  # one number of each row so large that the others round to nothing
        for block in model.network.transformer.resblocks:
            block.ln_1.bias[0] = block.ln_2.bias[0] = 1e5
            block.attn.in_proj_weight[:, 0] = block.mlp.c_fc.weight[:, 0] = 0
    with pytest.raises(ConfigError, match="int8 changes the vectors of model .* too much"):
        prepare(model, "cpu", "int8")


@needs_int8
def test_a_model_without_layers_for_int8_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipserve.packed._BLOCK", "no.such.block")
    monkeypatch.setattr("clipserve.packed._is_patches", lambda _: False)
    with pytest.raises(ConfigError, match="has no layers for int8"):
        clipserve.load(model_dir, device="cpu", dtype="int8")


def test_int8_is_refused_where_its_sums_would_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    with pytest.raises(ConfigError, match="int8 is for CPUs with VNNI"):
        resolve_dtype("int8", torch.device("cpu"))
    with pytest.raises(ConfigError, match="int8 is for CPUs, not for cuda; use device cpu"):
        resolve_dtype("int8", torch.device("cuda"))


def test_texts_are_the_same_in_any_layout(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)  # where nothing can be packed
    usual = checkpoint.load_for_training(model_dir)  # as open_clip runs it
    ours = clipserve.load(model_dir, device="cpu", dtype="fp32")
    assert ours.network.transformer.batch_first is False
    texts = ["a cat", "two red shoes on a table", "x " * 50]
    np.testing.assert_allclose(ours.embed_texts(texts), usual.embed_texts(texts), atol=1e-6)
    ids = ours.tokenizer(texts).ids
    with torch.no_grad():
        uncut = ours.encode_text(ids).numpy()
    np.testing.assert_allclose(uncut, usual.embed_texts(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("content", "threads"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("", 4)]
)
def test_threads_are_bounded_by_what_the_container_may_use(
    content: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(embed.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(embed, "_CPU_QUOTA", tmp_path / "cpu.max")
    if content:
        (tmp_path / "cpu.max").write_text(content + "\n")
    embed.limit_threads()
    assert [*asked, 4][0] == threads


def test_unknown_devices_and_dtypes_are_named() -> None:
    with pytest.raises(ConfigError, match="'gpu9'"):
        resolve_device("gpu9")
    with pytest.raises(ConfigError, match="cuda:99"):
        resolve_device("cuda:99")
    with pytest.raises(ConfigError, match="'int4'.*fp32, bf16 or int8"):
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
