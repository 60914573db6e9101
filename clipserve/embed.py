"""Batches of pictures or texts -> unit vectors; the dtype and device policy in one place.

Start at `prepare`, which measures whether a model may have bf16, or int8. Inference in bf16 runs on
weights cast to it, not under autocast: on a CPU autocast copies the attention's input projection
for every sample and is slower than fp32 (measured on a 2-core Xeon with AMX, ViT-B/32, batch 32:
fp32 30, autocast 21, bf16 weights 131 pictures/s).
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clipserve.decoding import open_decoded
from clipserve.errors import ConfigError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource
from clipserve.packed import Packed, is_packed, is_quantized, multiplies_int8, pack, unpack

if TYPE_CHECKING:
    from clipserve.model import Model

logger = logging.getLogger(__name__)
T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INT8 = "int8"
"""products in int8, all else in fp32; never chosen, only asked for"""

LEAST_COSINE = 0.999
"""of bf16 vectors to fp32 ones, or a model that may choose stays in fp32"""
LEAST_INT8_COSINE = 0.99
"""of int8 vectors to fp32 ones, or the model is refused"""

_SAMPLE_TEXTS = ["a photo of a cat", "two red shoes on a wooden table, seen from above", "7"]
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def resolve_device(name: str) -> torch.device:
    """ "auto" is a CUDA GPU if there is one. ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What weights are held in: "auto" is bf16 where the hardware multiplies matrices faster in it,
    else fp32, as "int8" is. ConfigError for a name that is none, or that the device cannot do."""
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name == INT8:
        if device.type != "cpu":
            raise ConfigError(f"dtype int8 is for CPUs, not for {device}; use device cpu, or auto")
        if not multiplies_int8():
            raise ConfigError(
                "dtype int8 is for CPUs with VNNI (AVX512-VNNI, AVX-VNNI) or AMX, and this is none;"
                " use auto"
            )
        return torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)} or {INT8}")
    return DTYPES[name]


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices faster in bf16: Ampere and later, AMX, or
    AVX512-BF16, but not Intel's (a Xeon whose AMX is hidden from a virtual machine is half as fast
    in it as in fp32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    is_intel = "Intel" in str(capabilities.get("cpu_name"))
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not is_intel))


def prepare(model: "Model", device: str = "auto", dtype: str = "auto") -> "Model":
    """Move to a device and dtype for inference, in place. Logit scale and bias stay precise.

    "auto" takes bf16 only after comparing it with fp32 on a few pictures and texts; the least
    cosine is in `model.fp32_cosine`, and below LEAST_COSINE the model stays in fp32. "int8" is
    compared as well, and a ConfigError below LEAST_INT8_COSINE. On a CPU the weights are laid out
    anew: such a model can be neither saved, copied nor prepared again.
    """
    if is_packed(model.network):
        raise ValueError("the model was prepared for a CPU already; load it again for another use")
    where = resolve_device(device)
    towers = resolve_dtype(dtype, where)
    model.requires_grad_(False).eval().to(where)
    _keep_no_activations(model.network)
    if dtype == "auto" and towers == torch.bfloat16:
        _cast_if_faithful(model, towers)
    elif dtype == INT8:
        _cast(model, towers)
        _quantize(model)
    else:
        _cast(model, towers)
        _pack(model)
    if where.type == "cpu":
        _leave_file(model.network)
    if where.type == "cpu" and model.dtype == torch.float32:
        _put_tokens_first(model)
    return model


def describe_precision(model: "Model") -> str:
    """What the vectors are computed in, and what was measured to choose it."""
    name, cosine = precision(model), model.fp32_cosine
    if cosine is None:
        return name
    if name != "fp32":
        return f"{name}, cosine to fp32 at least {cosine:.5f}"
    return f"fp32, for bf16 has a cosine to it of only {cosine:.5f}"


def precision(model: "Model") -> str:
    """What the vectors are computed in: fp32, bf16 or int8."""
    if is_quantized(model.network):
        return INT8
    return next(name for name, dtype in DTYPES.items() if dtype == model.dtype)


def count_processors() -> int:
    """Of the machine, but no more than the container may use."""
    processors = os.cpu_count() or 1
    quota, _, period = _read(_CPU_QUOTA).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        processors = min(processors, max(1, math.ceil(int(quota) / int(period))))
    return processors


def limit_threads() -> None:
    """No more of torch's threads than processors; they would wait for each other."""
    torch.set_num_threads(min(torch.get_num_threads(), count_processors()))


def embed_images(
    model: "Model",
    sources: Iterable[ImageSource],
    batch_size: int = 32,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """(N, E) float32 unit vectors. ImageError for the first bad picture, naming it."""
    transform = model.transform
    vectors = [
        embed_pixels(model, [transform.resize(open_decoded(s, transform, limits)) for s in batch])
        for batch in batched(sources, batch_size)
    ]
    return np.concatenate(vectors) if vectors else _no_vectors(model)


def embed_pixels(model: "Model", pixels: Sequence[np.ndarray]) -> np.ndarray:
    """(N, E) float32 unit vectors of resized pictures (3, H, W) uint8, in one batch."""
    return embed_staged(model, torch.from_numpy(np.stack(pixels)).to(model.device))


def stage(model: "Model", pixels: np.ndarray) -> Tensor:
    """A resized picture (3, H, W) uint8 on its way to the model's device, which is not waited for:
    the copy to a GPU runs from pinned memory, beside the batch that is being computed."""
    tensor = torch.from_numpy(pixels)
    if model.device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(model.device, non_blocking=True)


@torch.inference_mode()
def embed_staged(model: "Model", pixels: Tensor) -> np.ndarray:
    """(N, E) float32 unit vectors of pictures (N, 3, H, W) uint8 on the model's device."""
    return to_numpy(model.encode_image(model.transform.normalize(pixels)))


def embed_texts(model: "Model", texts: Iterable[str], batch_size: int = 256) -> np.ndarray:
    """(N, E) float32 unit vectors. Truncation is logged as a warning with the number of texts."""
    vectors = []
    num_truncated = 0
    for batch in batched(texts, batch_size):
        tokens = model.tokenizer(batch)
        num_truncated += sum(tokens.truncated)
        vectors.append(embed_ids(model, tokens.cut() if model.can_cut_text else tokens.ids))
    if num_truncated:
        logger.warning(
            "%d texts were cut to the model's %d tokens", num_truncated, model.context_length
        )
    return np.concatenate(vectors) if vectors else _no_vectors(model)


@torch.inference_mode()
def embed_ids(model: "Model", ids: Tensor) -> np.ndarray:
    """(N, E) float32 unit vectors of token ids (N, T), in one batch."""
    return to_numpy(model.encode_text(ids.to(model.device)))


def to_numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _no_vectors(model: "Model") -> np.ndarray:
    return np.zeros((0, model.embed_dim), dtype=np.float32)


def _put_tokens_first(model: "Model") -> None:
    """Run a text transformer of open_clip's that is not packed on (T, B, D): the same answers.

    On (B, T, D) torch's masked attention makes a strided view of it, whose product is slow on a CPU
    (ViT-B/32 in fp32, 8 texts of 16 tokens, processor time: 0.29 s -> 0.17 s). Unmasked attention,
    the image tower's, has a kernel of its own.
    """
    tower = getattr(model.network, "text", model.network)
    transformer: Any = getattr(tower, "transformer", None)
    if getattr(transformer, "batch_first", False) and hasattr(transformer, "resblocks"):
        attentions = [getattr(block, "attn", None) for block in transformer.resblocks]
        if all(type(one) is nn.MultiheadAttention for one in attentions):
            for part in (transformer, *attentions):
                part.batch_first = False


def _keep_no_activations(network: nn.Module) -> None:
    """Training may have asked for checkpoints of them, which open_clip makes here too."""
    module: Any
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False


def _leave_file(network: nn.Module) -> None:
    """What was loaded still lies in the mapped file: all of it would count as memory for the few
    tensors that are not packed, and change with the file."""
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


def _pack(model: "Model") -> list[Packed]:
    return pack(model.network) if model.device.type == "cpu" else []


def _cast(model: "Model", dtype: torch.dtype) -> None:
    for module, name, tensor in _castable(model):
        _replace(module, name, tensor.to(dtype))


def _cast_if_faithful(model: "Model", dtype: torch.dtype) -> None:
    exact = _embed_samples(model)
    saved = list(_castable(model))
    _cast(model, dtype)
    replaced = _pack(model)
    model.fp32_cosine = float((exact * _embed_samples(model)).sum(axis=1).min())
    if not model.fp32_cosine >= LEAST_COSINE:  # nor if it is NaN
        unpack(replaced)
        for module, name, tensor in saved:
            _replace(module, name, tensor)
        _pack(model)
        logger.warning("model %r stays in %s", model.info.name, describe_precision(model))


def _quantize(model: "Model") -> None:
    exact = _embed_samples(model)
    pack(model.network, int8=True)
    if not is_quantized(model.network):
        raise ConfigError(f"model {model.info.name!r} has no layers for int8; use dtype auto")
    model.fp32_cosine = float((exact * _embed_samples(model)).sum(axis=1).min())
    if not model.fp32_cosine >= LEAST_INT8_COSINE:  # nor if it is NaN
        raise ConfigError(
            f"int8 changes the vectors of model {model.info.name!r} too much: their cosine to fp32"
            f" is {model.fp32_cosine:.4f}, and at least {LEAST_INT8_COSINE} is asked for; use dtype"
            " auto"
        )


def _castable(model: "Model") -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters and buffers that follow the dtype, each with its module and name."""
    for module in model.network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name not in ("logit_scale", "logit_bias"):
                yield module, name, parameter.data
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name != "attn_mask":
                yield module, name, buffer


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        old.data = tensor
    else:
        setattr(module, name, tensor)


def _embed_samples(model: "Model") -> np.ndarray:
    """(N, E) vectors of some pictures (noise, a slope, an edge) and texts, always the same."""
    height, width = model.transform.size
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    slope = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), noise.shape)
    edge = np.where(slope > 127, np.uint8(230), np.uint8(20))
    tokens = model.tokenizer(_SAMPLE_TEXTS)
    ids = tokens.cut() if model.can_cut_text else tokens.ids
    return np.concatenate([embed_pixels(model, [noise, slope, edge]), embed_ids(model, ids)])


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
