"""Both towers as ONNX, out: image.onnx, text.onnx, onnx.json and what prepares their inputs.

    image.onnx       pixels (B, 3, H, W) float32 -> embeddings (B, E) float32 of unit length
    text.onnx        ids (B, T) int64 -> embeddings (B, E) float32 of unit length
    onnx.json        the image transform, the context length T, logit scale and bias, the opset
    tokenizer/       for transformers' AutoTokenizer, or the tokenizers package

B is any number, T always the context length; ids of CLIP's tokenizer may be padded by 0, as ours
does, or by the end token, as transformers does. Fusion layers and decoders stay behind.
"""

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipserve.convert.proof import Proof, prove
from clipserve.convert.tokenizers_writing import write_tokenizer
from clipserve.decoding import open_decoded
from clipserve.errors import CheckpointError, ConfigError, first_line
from clipserve.model import Model

OPSET = 18
_EXAMPLES = 2
"""rows to trace with: a batch of one would be taken for the only size"""


def write_onnx(model: Model, folder: Path) -> tuple[Proof, list[str]]:
    """Two networks, checked with onnxruntime."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    model.requires_grad_(False).eval()
    height, width = model.transform.size
    pixels = torch.zeros(_EXAMPLES, 3, height, width)
    ids = model.tokenizer(["a cat"] * _EXAMPLES).ids
    _export(_ImageTower(model), pixels, "pixels", folder / "image.onnx")
    _export(_TextTower(model), ids, "ids", folder / "text.onnx")
    bias = model.logit_bias
    description = {
        "opset": OPSET,
        "context_length": model.context_length,
        "embed_dim": model.embed_dim,
        "fingerprint": model.info.fingerprint,
        "image_transform": model.transform.to_open_clip(),
        "logit_scale": model.logit_scale.item(),
        "logit_bias": None if bias is None else bias.item(),
    }
    (folder / "onnx.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    notes = write_tokenizer(model, folder / "tokenizer")
    if model.has_fusion or model.has_decoder:
        notes.append("only the two towers were written, not what reads picture and text together")
    return _prove(model, folder), notes


class _ImageTower(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class _TextTower(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.end_id = _end_that_fills(model)

    def forward(self, ids: Tensor) -> Tensor:
        if self.end_id is not None:
            ids = _padded_as_ours(ids, self.end_id)
        return self.model.encode_text(ids)


def _end_that_fills(model: Model) -> int | None:
    """CLIP's end token, with which the written tokenizer pads, where the model sees padding.

    That tokenizer cannot pad with 0: a text's "!" would then be taken for padding.
    """
    text = model.architecture["text_cfg"]
    is_clips = not text.get("hf_tokenizer_name") and text.get("tokenizer") != "wordpiece"
    return model.tokenizer.special_ids[-1] if is_clips and not model.can_cut_text else None


def _padded_as_ours(ids: Tensor, end_id: int) -> Tensor:
    """(B, T) with 0 in place of all but the first of the end tokens that a row ends with."""
    others = (ids != end_id).long().flip(1).cumsum(1).flip(1)  # from each place on
    return torch.cat([ids[:, :1], ids[:, 1:] * (others[:, :-1] > 0)], dim=1)


def _export(tower: nn.Module, example: Tensor, name: str, file: Path) -> None:
    try:
        program = torch.onnx.export(
            tower.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=["embeddings"],
            dynamic_shapes={name: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise CheckpointError(f"torch makes no ONNX of this {name}: {first_line(error)}") from error
    assert program is not None
    program.save(str(file))


@contextlib.contextmanager
def _telling_runtime_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):  # its errors have no other family
            raise
        raise CheckpointError(
            f"what was written cannot be run by onnxruntime, and is removed: {first_line(error)}"
        ) from error


@_telling_runtime_errors()
def _prove(model: Model, folder: Path) -> Proof:
    image, text = (_session(folder / name) for name in ("image.onnx", "text.onnx"))

    def images(pictures: list[bytes]) -> np.ndarray:
        transform = model.transform
        resized = np.stack([transform.resize(open_decoded(data, transform)) for data in pictures])
        pixels = transform.normalize(torch.from_numpy(resized)).numpy()
        return np.asarray(image.run(None, {"pixels": pixels})[0])

    tokenize = _written_tokenizer(model, folder / "tokenizer")

    def texts(captions: list[str]) -> np.ndarray:
        return np.asarray(text.run(None, {"ids": tokenize(captions)})[0])

    return prove(model, images, texts)


def _written_tokenizer(model: Model, folder: Path) -> Callable[[list[str]], np.ndarray]:
    """(N, T) ids by the files that were written; a vocabulary alone is read by our own code."""
    if model.architecture["text_cfg"].get("tokenizer") == "wordpiece":
        return lambda captions: np.asarray(model.tokenizer(captions).ids.numpy())
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(str(folder))
    options = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    return lambda captions: np.asarray(words(captions, **options)["input_ids"])


def _session(file: Path) -> Any:
    runtime = _require("onnxruntime")
    return runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"ONNX needs the package {package}: install clipserve with the extra `onnx`"
        ) from None
