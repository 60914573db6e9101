"""transformers' CLIPModel and SiglipModel, out: model, tokenizer, processor.

What has no counterpart there is refused by its name. The processor resizes and cuts as ours does,
but for one thing: of an odd surplus, transformers rounds the middle down, open_clip and we to the
even number. So where 3, 7, 11, ... pixels are cut off, theirs lies one pixel beside ours.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipserve.architecture import TRAINING
from clipserve.convert.names import clip_moves, siglip_moves, to_theirs
from clipserve.convert.proof import Proof, large_jpeg, prove, prove_others, shifted_picture
from clipserve.convert.tokenizers_writing import UNREPAIRED, to_transformers
from clipserve.errors import ConfigError
from clipserve.model import Model
from clipserve.weights import shorten

_PADDING = {"clip": True, "siglip": "max_length"}
"""SigLIP reads the text from its last position, CLIP from the end token"""
_FREE = {
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
"""what transformers' CLIP has with any value"""
_IDLE = {"pad_id", "eos_id", "timm_model_pretrained", "hf_model_pretrained"}.union(
    *TRAINING.values()
)
"""what changes no vector"""
_LOADED = {"norm_kwargs", "act_kwargs", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}
"""what is looked at elsewhere"""
_SIGLIP: dict[str, dict[str, Any]] = {
    "vision_cfg": {"timm_model_name": None, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}
"""what makes a SigLIP of open_clip's; None: any"""


def write_transformers(model: Model, folder: Path) -> tuple[Proof, list[str]]:
    """Model, tokenizer and processor, loaded again and held against ours on picture bytes."""
    kind = "siglip" if "timm_model_name" in model.architecture["vision_cfg"] else "clip"
    _refuse(model, kind)
    tokenizer = to_transformers(model)
    with _no_progress_bars():
        _network(model, kind, tokenizer).save_pretrained(str(folder))
        _processor(model, kind, tokenizer).save_pretrained(str(folder))
        proof, notes = _prove(model, kind, folder)
    return proof, [UNREPAIRED, *notes]


def _refuse(model: Model, kind: str) -> None:
    """ConfigError that names what transformers' CLIP or SigLIP cannot be told."""
    found = [*_unknown_settings(model, kind), *_unknown_parts(model, kind)]
    if found:
        name = "SiglipModel" if kind == "siglip" else "CLIPModel"
        others = "onnx" if model.has_fusion else "open_clip or onnx"
        raise ConfigError(
            f"transformers' {name} has no counterpart of {', '.join(found)}; export --to {others}"
        )


def _unknown_parts(model: Model, kind: str) -> list[str]:
    table = model.architecture
    height, width = model.transform.size
    has_bias = model.network.logit_bias is not None
    checks = {
        "fusion_cfg (an ALBEF)": model.has_fusion,
        "multimodal_cfg (a CoCa)": model.has_decoder,
        "a missing logit_bias": kind == "siglip" and not has_bias,
        "logit_bias": kind == "clip" and has_bias,
        "text.* (custom_text)": kind == "clip" and bool(table.get("custom_text")),
        "quick_gelu beside a timm tower": kind == "siglip" and bool(table.get("quick_gelu")),
        f"an input of {width}x{height}, which is no square": height != width,
        "resize_mode = longest": model.transform.resize_mode == "longest",
    }
    return [name for name, is_there in checks.items() if is_there]


def _unknown_settings(model: Model, kind: str) -> list[str]:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    found = []
    for section, defaults in (("vision_cfg", CLIPVisionCfg()), ("text_cfg", CLIPTextCfg())):
        wanted = _SIGLIP[section] if kind == "siglip" else {}
        given = model.architecture[section]
        for key in sorted(given.keys() | wanted.keys()):
            expected = wanted.get(key, getattr(defaults, key, None))
            value = given.get(key, getattr(defaults, key, None))
            is_free = key in _FREE[section] | _IDLE | _LOADED
            is_any = key in wanted and expected is None
            is_list = isinstance(value, list)
            if (not is_free and not is_any and value != expected) or is_list:
                found.append(f"{section}.{key} = {value!r}")
        for key, known in (("norm_kwargs", {"eps"}), ("act_kwargs", {"approximate"})):
            extra = (given.get(key) or {}).keys() - known
            found += [f"{section}.{key}.{name}" for name in sorted(extra)]
    return found


def _network(model: Model, kind: str, tokenizer: Any) -> Any:
    """Their network with our weights."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    weights = model.network.state_dict()
    if kind == "clip":
        image, text = _clip_image(model), _text_config(model, model.network, tokenizer)
        network: Any = CLIPModel(
            CLIPConfig(vision_config=image, text_config=text, projection_dim=model.embed_dim)
        )
        moves = clip_moves(image["num_hidden_layers"], text["num_hidden_layers"])
    else:
        image, text = _siglip_image(model), _text_config(model, model.network.text, tokenizer)
        text["projection_size"] = model.embed_dim
        network = SiglipModel(SiglipConfig(vision_config=image, text_config=text))
        moves = siglip_moves(image["num_hidden_layers"], text["num_hidden_layers"])
    if unmatched := weights.keys() ^ {name for move in moves for name in move.ours}:
        raise ConfigError(f"transformers' {kind} has no counterpart of {shorten(unmatched)}")
    network.load_state_dict(to_theirs(moves, weights, network.state_dict()))
    return network.eval()


def _clip_image(model: Model) -> dict[str, Any]:
    tower = model.network.visual
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": tower.transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.transform.size[0],
        "patch_size": tower.patch_size[0],
        "projection_dim": model.embed_dim,
        "layer_norm_eps": block.ln_1.eps,
        "hidden_act": _activation(block.mlp.gelu),
    }


def _siglip_image(model: Model) -> dict[str, Any]:
    trunk = model.network.visual.trunk
    block = trunk.blocks[0]
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.transform.size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _activation(block.mlp.act),
    }


def _text_config(model: Model, tower: Any, tokenizer: Any) -> dict[str, Any]:
    block = tower.transformer.resblocks[0]
    return {
        "vocab_size": tower.token_embedding.num_embeddings,
        "hidden_size": tower.transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": model.context_length,
        "projection_dim": model.embed_dim,
        "layer_norm_eps": block.ln_1.eps,
        "hidden_act": _activation(block.mlp.gelu),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _activation(layer: Any) -> str:
    """By transformers' name."""
    if type(layer).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(layer).__name__ == "GELUTanh" or getattr(layer, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    if type(layer).__name__ == "GELU":
        return "gelu"
    raise ConfigError(f"activation {type(layer).__name__} has no counterpart in transformers")


def _processor(model: Model, kind: str, tokenizer: Any) -> Any:
    from transformers import (
        CLIPImageProcessor,
        CLIPProcessor,
        SiglipImageProcessor,
        SiglipProcessor,
    )

    transform = model.transform
    height, width = transform.size
    is_squashed = transform.resize_mode == "squash"
    crop = {} if is_squashed else {"crop_size": {"height": height, "width": width}}
    images = (SiglipImageProcessor if kind == "siglip" else CLIPImageProcessor)(
        size={"height": height, "width": width} if is_squashed else {"shortest_edge": width},
        do_center_crop=not is_squashed,
        resample=Image.Resampling[transform.interpolation.upper()],
        image_mean=list(transform.mean),
        image_std=list(transform.std),
        **crop,
    )
    whole = SiglipProcessor if kind == "siglip" else CLIPProcessor
    return whole(image_processor=images, tokenizer=tokenizer)


def _prove(model: Model, kind: str, folder: Path) -> tuple[Proof, list[str]]:
    """The proof, and a line for each kind of picture that is prepared otherwise there."""
    from transformers import AutoModel, AutoProcessor

    theirs = AutoModel.from_pretrained(str(folder)).eval()
    processor = AutoProcessor.from_pretrained(str(folder))

    def images(pictures: list[bytes]) -> np.ndarray:
        opened = [Image.open(io.BytesIO(data)) for data in pictures]
        inputs = processor(images=opened, return_tensors="pt")
        return np.asarray(theirs.get_image_features(**inputs).pooler_output.numpy())

    def texts(captions: list[str]) -> np.ndarray:
        options = {"padding": _PADDING[kind], "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=captions, **options)
        return np.asarray(theirs.get_text_features(**inputs).pooler_output.numpy())

    side = model.transform.size[0]
    others = [large_jpeg(side)]
    if model.transform.resize_mode == "shortest":
        others.append(shifted_picture(side))
    return prove(model, images, texts), prove_others(model, images, others)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
