"""transformers' CLIP and SigLIP directories, in: config.json, weights, tokenizer, processor."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from clipserve.convert.found import Found
from clipserve.convert.names import Move, clip_moves, siglip_moves, to_ours
from clipserve.errors import CheckpointError, ConfigError
from clipserve.images import ImageTransform
from clipserve.model import ModelInfo
from clipserve.text import Tokenizer
from clipserve.towers import build_network
from clipserve.weights import check_names, read_tensors

_EPS = 1e-5
"""of open_clip's layer norms, unless the table says otherwise"""
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers"""
_RESCALE = 1 / 255
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PROBES = ["a photo of a cat", "Two dogs, 3 birds & a fish's pond!", "na\u00efve caf\u00e9"]

SIGLIP_TOWERS = {
    (768, 12, 12, 3072, 16): "vit_base_patch16_siglip",
    (768, 12, 12, 3072, 32): "vit_base_patch32_siglip",
    (1024, 24, 16, 4096, 16): "vit_large_patch16_siglip",
    (1152, 27, 16, 4304, 14): "vit_so400m_patch14_siglip",
    (1152, 27, 16, 4304, 16): "vit_so400m_patch16_siglip",
    (1536, 40, 16, 6144, 16): "vit_giantopt_patch16_siglip",
}
"""width, layers, heads, width of the MLP and patch size -> timm's name, before the image size"""


def read_transformers(directory: Path, tokenizer: Path | None = None) -> Found:
    """A directory that CLIPModel or SiglipModel, and their processor, were saved to.

    Raises ConfigError for a model or a tokenizer without a counterpart.
    """
    config = _read_config(directory)
    notes: list[str] = []
    if config.model_type == "clip":
        table = _clip_table(config)
        moves = clip_moves(config.vision_config.num_hidden_layers, _text_layers(config))
        words = None
        _check_clip_tokenizer(tokenizer or directory)
    else:
        table = _siglip_table(config, tokenizer or directory)
        moves = siglip_moves(config.vision_config.num_hidden_layers, _text_layers(config))
        words = tokenizer or directory
        if config.vision_config.hidden_act != "gelu":
            notes.append(
                f"the image tower computes GELU exactly, not as {config.vision_config.hidden_act}"
            )
    return Found(
        tensors=_read_weights(directory, table, moves),
        architecture=table,
        transform=_read_transform(directory, int(config.vision_config.image_size)),
        tokenizer=words,
        info=ModelInfo(directory.name),
        notes=notes,
    )


def _read_config(directory: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPConfig, SiglipConfig

    content = _read_json(directory / "config.json")
    kinds: dict[str, Any] = {"clip": CLIPConfig, "siglip": SiglipConfig}
    kind = content.get("model_type")
    if kind not in kinds:
        raise ConfigError(
            f"{directory} holds a transformers model of type {kind!r}; clip and siglip can be read"
        )
    try:
        return kinds[kind].from_dict(content)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / 'config.json'} is no {kind}'s: {reason}") from None


def _text_layers(config: Any) -> int:
    return int(config.text_config.num_hidden_layers)


def _clip_table(config: Any) -> dict[str, Any]:
    image, text = config.vision_config, config.text_config
    is_quick = {part.hidden_act == "quick_gelu" for part in (image, text)}
    if len(is_quick) > 1:
        raise ConfigError(
            f"activations {image.hidden_act} of the image tower and {text.hidden_act} of the text"
            " tower have no common counterpart in open_clip"
        )
    quick = {"quick_gelu": True} if is_quick == {True} else {}
    return {
        "embed_dim": config.projection_dim,
        **quick,
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "width": image.hidden_size,
            "layers": image.num_hidden_layers,
            "head_width": image.hidden_size // image.num_attention_heads,
            **_block_options(image),
        },
        "text_cfg": _text_table(text),
    }


def _siglip_table(config: Any, tokenizer: Path) -> dict[str, Any]:
    import timm

    image, text = config.vision_config, config.text_config
    sizes = (
        image.hidden_size,
        image.num_hidden_layers,
        image.num_attention_heads,
        image.intermediate_size,
        image.patch_size,
    )
    name = f"{SIGLIP_TOWERS.get(sizes)}_{image.image_size}"
    if not image.vision_use_head or not timm.is_model(name):
        raise ConfigError(
            "timm has no SigLIP tower of width, layers, heads, MLP, patch and image size"
            f" {(*sizes, image.image_size)} with its pooling"
        )
    return {
        "embed_dim": text.projection_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": image.image_size,
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": _text_table(text)
        | {
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "hf_tokenizer_name": "tokenizer",
            "tokenizer_kwargs": {"clean": _cleaning(tokenizer)},
        },
    }


def _text_table(text: Any) -> dict[str, Any]:
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_block_options(text),
    }


def _block_options(tower: Any) -> dict[str, Any]:
    """What of a tower's layers is not open_clip's default."""
    options: dict[str, Any] = {}
    if tower.intermediate_size != 4 * tower.hidden_size:
        options["mlp_ratio"] = tower.intermediate_size / tower.hidden_size
    if tower.layer_norm_eps != _EPS:
        options["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if tower.hidden_act == "gelu_pytorch_tanh":
        options["act_kwargs"] = {"approximate": "tanh"}
    elif tower.hidden_act not in ("gelu", "quick_gelu"):
        raise ConfigError(f"activation {tower.hidden_act!r} has no counterpart in open_clip")
    return options


def _cleaning(folder: Path) -> str:
    """What the tokenizer's class does to a text before its files come in, in open_clip's words."""
    name = str(_read_json(folder / "tokenizer_config.json").get("tokenizer_class"))
    return {"SiglipTokenizer": "canonicalize", "Siglip2Tokenizer": "lower"}.get(name, "whitespace")


def _check_clip_tokenizer(folder: Path) -> None:
    """ConfigError unless it is CLIP's own, which a model directory does not hold."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of a tokenizer")
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} holds no tokenizer that can be read: {first}") from None
    ours = Tokenizer({"context_length": 77})
    for text, ids, length in zip(
        _PROBES, ours(_PROBES).ids.tolist(), ours(_PROBES).lengths, strict=True
    ):
        if theirs(text)["input_ids"] != ids[:length]:
            raise ConfigError(
                f"the tokenizer of {folder} is not CLIP's: it reads {text!r} otherwise"
            )


def _read_weights(directory: Path, table: dict[str, Any], moves: list[Move]) -> dict[str, Tensor]:
    tensors = {n: t for file in _weight_files(directory) for n, t in read_tensors(file).items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".position_ids")}
    check_names(directory, tensors, {name for move in moves for name in move.theirs})
    like = build_network(table).state_dict()
    try:
        return to_ours(moves, tensors, like)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: weights do not fit config.json: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    """In the order of transformers: whole or in parts, safetensors first."""
    for name in _WEIGHTS:
        file, index = directory / name, directory / f"{name}.index.json"
        if index.is_file():
            found = _read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise CheckpointError(f"{index} names no files of weights")
            return [directory / Path(str(name)).name for name in sorted({*found.values()})]
        if file.is_file():
            return [file]
    raise CheckpointError(f"{directory} holds neither {' nor '.join(_WEIGHTS)}, whole or in parts")


def _read_transform(directory: Path, image_size: int) -> ImageTransform:
    """Of processor_config.json, as transformers 5 writes it, or preprocessor_config.json."""
    whole = directory / "processor_config.json"
    found = _read_json(whole).get("image_processor") if whole.is_file() else None
    found = found or _read_json(directory / "preprocessor_config.json")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if found.get(step, True) is not True:
            raise ConfigError(
                f"the image processor of {directory} has {step} = {found[step]}; ours always does"
                " it: set it to true if the model was trained so, else it cannot be read"
            )
    interpolation = _INTERPOLATIONS.get(found.get("resample", 3))
    if interpolation is None:
        raise ConfigError(f"resample {found['resample']} of {directory} is no bicubic or bilinear")
    if abs(found.get("rescale_factor", _RESCALE) - _RESCALE) > 1e-9:
        raise ConfigError(f"rescale_factor {found['rescale_factor']} of {directory} is not 1/255")
    size, crops = found.get("size", image_size), found.get("do_center_crop", False)
    sides = {"shortest_edge": size} if isinstance(size, int) else size
    is_short = crops and isinstance(sides, dict) and sides.keys() == {"shortest_edge"}
    is_squashed = isinstance(sides, dict) and sides.keys() == {"height", "width"}
    crop = found.get("crop_size", image_size) if crops else image_size
    cut = {"edge": crop} if isinstance(crop, int) else crop
    fits = is_short or is_squashed
    if not fits or {*sides.values(), *cut.values()} != {image_size}:
        raise ConfigError(
            f"the image processor of {directory} resizes to {size} and cuts {crop if crops else 0};"
            f" ours can do both to {image_size} only, the network's input"
        )
    return ImageTransform.from_open_clip(
        {
            "size": image_size,
            "mean": found.get("image_mean", ()),
            "std": found.get("image_std", ()),
            "interpolation": interpolation,
            "resize_mode": "shortest" if is_short else "squash",
        }
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no table")
    return content
