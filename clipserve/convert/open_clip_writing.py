"""An open_clip directory, out: `open_clip.create_model_and_transforms("local-dir:OUT")`."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipserve import checkpoint
from clipserve.convert.proof import Proof, large_jpeg, prove, prove_others
from clipserve.errors import ConfigError
from clipserve.files import save_tensors
from clipserve.model import Model


def write_open_clip(model: Model, folder: Path) -> tuple[Proof, list[str]]:
    """Weights, configuration and, where it is not CLIP's own, the tokenizer."""
    if model.has_fusion:
        raise ConfigError(
            "open_clip has no counterpart of an ALBEF's fusion layers (fusion_cfg); export --to"
            " albef or onnx"
        )
    config = {"model_cfg": model.architecture, "preprocess_cfg": model.transform.to_open_clip()}
    text = json.dumps(config, indent=2) + "\n"
    (folder / checkpoint.OPEN_CLIP_CONFIG).write_text(text, encoding="utf-8")
    weights = model.network.state_dict()
    save_tensors(weights, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    model.tokenizer.save(folder)
    return _prove(model, folder)


def _prove(model: Model, folder: Path) -> tuple[Proof, list[str]]:
    import open_clip

    name = f"local-dir:{folder}"
    theirs, _, preprocess = open_clip.create_model_and_transforms(name)
    theirs.eval()
    tokenize = open_clip.get_tokenizer(name)

    def images(pictures: list[bytes]) -> np.ndarray:
        opened = (Image.open(io.BytesIO(data)) for data in pictures)
        features = theirs.encode_image(torch.stack([preprocess(picture) for picture in opened]))
        return np.asarray(features.numpy())

    def texts(captions: list[str]) -> np.ndarray:
        return np.asarray(theirs.encode_text(tokenize(captions)).numpy())

    others = [large_jpeg(model.transform.size[0])]
    return prove(model, images, texts), prove_others(model, images, others)
