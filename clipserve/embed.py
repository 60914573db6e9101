"""Batches of pictures or texts -> unit vectors; the dtype and device policy in one place.

Start at `prepare`. Inference runs on weights cast to bf16, not under autocast: on a CPU autocast
copies the attention's input projection for every sample and is slower than fp32 (measured on a
2-core Xeon with AMX, ViT-B/32, batch 32: fp32 30, autocast 21, bf16 weights 131 pictures/s).
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipserve.errors import ConfigError
from clipserve.images import DEFAULT_LIMITS, ImageLimits, ImageSource, open_image

if TYPE_CHECKING:
    from clipserve.model import Model

logger = logging.getLogger(__name__)
T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    """ "auto" is bf16 where the hardware multiplies matrices in it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; use auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: Ampere and later, AMX or AVX512-BF16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def prepare(model: "Model", device: str = "auto", dtype: str = "auto") -> "Model":
    """Move to a device and dtype for inference, in place. Logit scale and bias stay precise."""
    where = resolve_device(device)
    towers = resolve_dtype(dtype, where)
    model.requires_grad_(False).eval().to(where)
    for name, parameter in model.network.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            parameter.data = parameter.data.to(towers)
    for module in model.network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name != "attn_mask":
                setattr(module, name, buffer.to(towers))
    return model


def embed_images(
    model: "Model",
    sources: Iterable[ImageSource],
    batch_size: int = 32,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """(N, E) float32 unit vectors. ImageError for the first bad picture, naming it."""
    vectors = [
        embed_pixels(model, [model.transform.resize(open_image(s, limits)) for s in batch])
        for batch in batched(sources, batch_size)
    ]
    return np.concatenate(vectors) if vectors else _no_vectors(model)


@torch.inference_mode()
def embed_pixels(model: "Model", pixels: Sequence[np.ndarray]) -> np.ndarray:
    """(N, E) float32 unit vectors of resized pictures (3, H, W) uint8, in one batch."""
    batch = torch.from_numpy(np.stack(pixels)).to(model.device)
    return to_numpy(model.encode_image(model.transform.normalize(batch)))


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
