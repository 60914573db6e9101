"""Models of other programs, tiny, for the tests of import and export."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import _create_vision_transformer

from clipserve.convert import transformers_reading
from clipserve.images import ImageTransform
from clipserve.model import Model, create

WORDS = ["a", "photo", "of", "cat", "dog", "two", "red", "leather", "shoes", "in", "the", "rain"]


def shaken(model: Any) -> Any:
    """With every parameter away from its start, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip_table(**text: Any) -> dict[str, Any]:
    """Two layers a tower, of unequal widths; what differs from open_clip's defaults is stated."""
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 48,
            "layers": 2,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        }
        | text,
    }


def siglip_tower(size: int) -> Any:
    """What timm calls to build a tower; its names end in the size of the pictures."""

    def build(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"img_size": size, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
        fixed = sizes | {"class_token": False, "global_pool": "map"}
        return _create_vision_transformer("tiny", pretrained=pretrained, **fixed | options)

    return build


def register_siglip_towers(monkeypatch: Any) -> None:
    """tiny_siglip_32 and tiny_siglip_64, which timm and our table know for the time of a test."""
    for size in (32, 64):
        entry = (f"tiny_siglip_{size}", siglip_tower(size))
        monkeypatch.setitem(timm.models._registry._model_entrypoints, *entry)
    monkeypatch.setitem(transformers_reading.SIGLIP_TOWERS, (32, 2, 2, 128, 16), "tiny_siglip")


def write_words(folder: Path) -> Path:
    """A transformers tokenizer of words, lower case and without punctuation."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(["</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(str(folder))
    return folder


def tiny_siglip(words: Path) -> Model:
    """As open_clip's SigLIP, with a tower of `register_siglip_towers`."""
    text = {
        "context_length": 12,
        "vocab_size": 20,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "hf_tokenizer_name": str(words),
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    vision = {
        "image_size": 32,
        "timm_model_name": "tiny_siglip_32",
        "timm_pool": "map",
        "timm_proj": "none",
    }
    half = (0.5, 0.5, 0.5)
    table = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True}
    model = create(
        table | {"vision_cfg": vision, "text_cfg": text},
        ImageTransform((32, 32), mean=half, std=half, resize_mode="squash"),
    )
    return shaken(model)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) of two (N, E)."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a.astype(float) * b).sum(axis=1) / lengths)
