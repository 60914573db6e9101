"""The published ALBEF checkpoints, in and out (github.com/salesforce/ALBEF, models/).

Such a file is `torch.save({"model": tensors, ...})` with the weights, their momentum copies (`_m`)
and the queues. Read and written again it is the same, tensor by tensor, bit by bit. Pre-trained
ones hold a whole BertForMaskedLM; those fine-tuned for retrieval a BertModel, without a head for
masked words, and a queue of picture ids. Start at `find_albef` and `export_checkpoint`.

Legend: E embedding, K queue length, G patches along a side, D width.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from clipserve import checkpoint, wordpiece
from clipserve.albef import Albef, TimmTower
from clipserve.convert.found import Found, count_parts, refuse_existing
from clipserve.convert.proof import Proof, prove
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import new_file
from clipserve.images import ImageTransform
from clipserve.model import Model, ModelInfo
from clipserve.towers import build_network
from clipserve.weights import bert_names, check_names, read_tensors

_HEAD_WIDTH = 64
"""of BERT's and DeiT's attention; the one size that cannot be read from the weights"""
_CONTEXT_LENGTH = 30
"""what the published models were fine-tuned and tested with; not in the file"""
_TOWERS = {
    "visual.trunk.": "visual_encoder",
    "visual.projection.": "vision_proj",
    "text_projection.": "text_proj",
}
_QUEUE = {
    "queue.image": "image_queue",
    "queue.text": "text_queue",
    "queue.cursor": "queue_ptr",
    "queue.pictures": "idx_queue",
}
_RUN_QUEUE = {"stored_image", "stored_text", "stored_groups", "_extra_state"}
"""what a training run saves of its queue; the last is how many pairs were ever pushed"""
_SCALE_ROUNDING = 1e-6
"""what float32 leaves of a float64 temperature; all else comes back to the last bit"""
_WORDS, _DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def is_albef(tensors: Iterable[str]) -> bool:
    """Whether they are what ALBEF publishes, by their names."""
    return any(name.startswith("visual_encoder.") for name in tensors)


def find_albef(tensors: Mapping[str, Tensor], file: Path, tokenizer: Path | None) -> Found:
    """The model of a published checkpoint, which holds `tensors`.

    Sizes and numbers of layers are the tensors'; heads are 64 wide. Half-precision tensors become
    float32, which is exact. `momentum` holds `twin.NAME` for each parameter of the network that has
    a momentum copy, and `queue.image` and `queue.text` (K, E), `queue.cursor` (1,),
    `queue.pictures` (K,) if there is one; it is None for a file without. Raises CheckpointError,
    naming tensors that are missing or left over; ConfigError for another vocabulary.
    """
    if tokenizer is None:
        raise ConfigError(
            f"{file} is an ALBEF's checkpoint, which does not hold its vocabulary; name the folder"
            " of a local bert-base-uncased (its vocab.txt or tokenizer.json) as `clipserve import"
            " --tokenizer`"
        )
    table, network, weights, momentum = _read(tensors, file)
    _check_vocabulary(tokenizer, table["text_cfg"]["vocab_size"], file)
    size = table["vision_cfg"]["image_size"]
    words = () if network.token_head is None else ("masked_language",)
    return Found(
        tensors=weights,
        architecture=table,
        transform=ImageTransform((size, size), resize_mode="squash"),
        tokenizer=tokenizer,
        info=ModelInfo(file.stem, objective=("momentum_contrast", "matching", *words)),
        momentum=momentum,
    )


def export_checkpoint(source: Path, out: Path) -> tuple[Proof, list[str]]:
    """Write the model of a directory as ALBEF's file, and hold what is read of it against it.

    ALBEF's own code wants momentum copies in every file. They are those of the training run, if
    `source` is a checkpoint of one that had them; else those that the model was imported with; else
    the weights themselves. The queue comes with the copies. One of a run is left out while it is
    not full, which ALBEF's cannot say; and so are the numbers of its pictures, which mean nothing
    beside other data. Returns the least cosines, and a line for each thing that is otherwise there.
    Raises ConfigError for a model that the layout cannot hold and for a file that is there,
    CheckpointError for a damaged directory, and for a file that embeds otherwise; it is not left.
    """
    refuse_existing(out)
    source = checkpoint.pin(source)
    model = checkpoint.load_for_training(source)
    weights = model.network.state_dict()
    momentum = _read_run(source / "state", weights.keys()) or checkpoint.load_momentum(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as stream:
        write_albef(model, momentum or _as_twin(weights), stream)
        stream.flush()
        return _prove(model, Path(stream.name)), _differences(model)


def write_albef(model: Model, momentum: Mapping[str, Tensor] | None, file: Path | BinaryIO) -> None:
    """Write the published layout, float32; the inverse of `find_albef`.

    `momentum` as that finds it; None leaves momentum copies and queues out. Raises ConfigError for
    a model that the layout cannot hold.
    """
    network = model.network
    if not isinstance(network, Albef) or not isinstance(network.visual, TimmTower):
        raise ConfigError(
            "ALBEF's format holds models with fusion_cfg and a timm ViT only; this one can be"
            f" exported --to {'onnx' if model.has_fusion else 'open_clip, transformers or onnx'}"
        )
    tensors = _to_published(network.state_dict(), _names(network, momentum=False))
    if momentum is not None:
        twin = {k.removeprefix("twin."): v for k, v in momentum.items() if k.startswith("twin.")}
        tensors |= _to_published(twin, _names(network, momentum=True))
        tensors |= {
            theirs: _turn(ours, momentum[ours])
            for ours, theirs in _QUEUE.items()
            if ours in momentum
        }
    torch.save({"model": tensors}, file)


def _read(
    tensors: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, Any], Albef, dict[str, Tensor], dict[str, Tensor] | None]:
    """Its architecture, a network of that with fresh weights, the weights, and the momentum."""
    wide = {name: _widen(tensor) for name, tensor in tensors.items()}
    online = {name: tensor for name, tensor in wide.items() if not _is_momentum(name)}
    kept = {name: tensor for name, tensor in wide.items() if name not in online}
    table = _architecture(online, file)
    network = build_network(table)
    assert isinstance(network, Albef)
    weights = _from_published(online, _names(network, momentum=False), file)
    return table, network, weights, _read_momentum(kept, network, file) if kept else None


def _prove(model: Model, file: Path) -> Proof:
    """What the file does not hold, how pictures are prepared and texts are read, is as in ours."""
    table, network, weights, _ = _read(read_tensors(file), file)
    for name, tensor in model.network.state_dict().items():
        allowed = _SCALE_ROUNDING if name == "logit_scale" else 0
        if not torch.allclose(weights[name], tensor.to(weights[name]), rtol=0, atol=allowed):
            raise CheckpointError(f"{name} comes back otherwise from what was written")
    network.load_state_dict(weights)
    again = Model(network.eval(), table, model.transform, model.tokenizer, model.info)
    return prove(
        model,
        again.embed_images,
        lambda texts: again.encode_text(again.tokenizer(texts).ids).numpy(),
    )


def _differences(model: Model) -> list[str]:
    """What the file does not say, and ALBEF's code does in its own way."""
    notes = []
    squashed = ImageTransform(model.transform.size, resize_mode="squash")
    if model.transform != squashed:
        notes.append(
            "pictures: ALBEF's code squashes them to the input's size, and normalises them as CLIP;"
            f" this model has resize_mode = {model.transform.resize_mode}"
        )
    if model.context_length != _CONTEXT_LENGTH:
        notes.append(
            f"texts: ALBEF's code cuts them at its max_words; this model reads"
            f" {model.context_length} tokens"
        )
    return notes


def _check_vocabulary(tokenizer: Path, size: int, file: Path) -> None:
    found = wordpiece.load(tokenizer).vocab_size
    if found != size:
        raise ConfigError(
            f"{tokenizer} has {found} tokens, {file} was trained with {size}: it is another"
            " vocabulary"
        )


def _names(network: Albef, momentum: bool) -> dict[str, str]:
    """Our name -> the published one, for all weights, or for all that have a momentum copy."""
    mark = "_m" if momentum else ""
    has_head = network.token_head is not None
    names = {
        ours: f"text_encoder{mark}.{theirs}"
        for ours, theirs in bert_names(
            len(network.text.layers), len(network.fusion), has_head
        ).items()
    }
    for name in network.state_dict():
        for ours, theirs in _TOWERS.items():
            if name.startswith(ours):
                names[name] = f"{theirs}{mark}.{name.removeprefix(ours)}"
    if not momentum:
        heads = ("matching_head.weight", "matching_head.bias")
        names |= {name: name.replace("matching_head", "itm_head") for name in heads}
        names["logit_scale"] = "temp"
    return names


def _copies(names: Iterable[str]) -> dict[str, str]:
    """Published names under which a tensor is stored a second time -> the first."""
    found = {}
    for name in names:
        for first, second in ((_WORDS, _DECODER), (_BIAS, _DECODER_BIAS)):
            if name.endswith(f".{first}"):
                found[f"{name.removesuffix(first)}{second}"] = name
    has_decoder = any(name.endswith(_BIAS) for name in names)
    return found if has_decoder else {}


def _from_published(
    tensors: dict[str, Tensor], names: dict[str, str], file: Path
) -> dict[str, Tensor]:
    """Tensors under our names; CheckpointError for any that is missing, left over or untied."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".embeddings.position_ids"):
            found[name] = tensor
        elif not torch.equal(tensor.flatten(), torch.arange(tensor.numel())):
            raise CheckpointError(f"{file}: {name} is not 0, 1, 2, ...")
    copies = _copies(names.values())
    check_names(file, found, [*names.values(), *copies])
    for second, first in copies.items():
        if not torch.equal(found[first], found[second]):
            raise CheckpointError(f"{file}: {second} differs from {first}, to which it is tied")
    weights = {ours: found[theirs] for ours, theirs in names.items()}
    if "logit_scale" in weights:
        if not 0 < weights["logit_scale"] < math.inf:
            raise CheckpointError(f"{file}: temp is {weights['logit_scale'].item()}")
        weights["logit_scale"] = -weights["logit_scale"].double().log()
    return weights


def _to_published(weights: Mapping[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    tensors = {theirs: weights[ours].detach().cpu() for ours, theirs in names.items()}
    if "temp" in tensors:
        tensors["temp"] = tensors["temp"].neg().exp()  # in float64, then rounded once
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors |= {second: tensors[first] for second, first in _copies(tensors).items()}
    for name in [name for name in tensors if name.endswith(".position_embeddings.weight")]:
        place = name.removesuffix("position_embeddings.weight")
        tensors[f"{place}position_ids"] = torch.arange(len(tensors[name]))[None]
    return tensors


def _is_momentum(name: str) -> bool:
    return name in _QUEUE.values() or name.split(".")[0].endswith("_m")


def _read_momentum(tensors: dict[str, Tensor], network: Albef, file: Path) -> dict[str, Tensor]:
    queues = set(_QUEUE.values())
    twin = {name: tensor for name, tensor in tensors.items() if name not in queues}
    weights = _from_published(twin, _names(network, momentum=True), file)
    queue = {
        ours: _turn(ours, tensors[theirs]) for ours, theirs in _QUEUE.items() if theirs in tensors
    }
    if queue:
        check_names(file, {_QUEUE[name] for name in queue} | {"idx_queue"}, queues)
    return _as_twin(weights) | queue


def _read_run(state: Path, names: Iterable[str]) -> dict[str, Tensor] | None:
    """What a run remembers, as `read_albef` gives it; None if it has no momentum copy.

    `names` are the network's. The n-th pair that was pushed lies in slot n mod K there.
    """
    file, queue_file = state / "momentum.safetensors", state / "queue.safetensors"
    if not file.is_file():
        return None
    weights, queue = read_tensors(file), read_tensors(queue_file)
    check_names(file, weights, names)
    check_names(queue_file, queue, _RUN_QUEUE)
    found = _as_twin(weights)
    size, pushed = len(queue["stored_image"]), int(queue["_extra_state"])
    if 0 < size <= pushed:  # the oldest first: ALBEF's cursor must be a multiple of its batch
        for name in ("image", "text"):
            found[f"queue.{name}"] = queue[f"stored_{name}"].roll(-(pushed % size), dims=0)
        found["queue.cursor"] = torch.tensor([0])
    return found


def _as_twin(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"twin.{name}": tensor for name, tensor in weights.items()}


def _turn(name: str, queue: Tensor) -> Tensor:
    """Theirs holds an entry in each column, ours in each row; and the way back."""
    if name == "queue.cursor":
        return queue
    if name == "queue.pictures":  # (1, K) <-> (K,)
        return queue[0] if queue.ndim == 2 else queue[None]
    return queue.T.contiguous()  # (E, K) <-> (K, E)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _architecture(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """The table of an ALBEF with tensors of these shapes."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{file} is no published ALBEF checkpoint: it lacks {name}")
        return tuple(tensors[name].shape)

    has_head = f"text_encoder.{_BIAS}" in tensors
    bert = "text_encoder.bert" if has_head else "text_encoder"
    vocab_size, width = shape(f"{bert}.embeddings.word_embeddings.weight")
    positions, _ = shape(f"{bert}.embeddings.position_embeddings.weight")
    layers = count_parts(tensors, f"{bert}.encoder.layer.")
    fusion_layers = sum(
        f"{bert}.encoder.layer.{number}.crossattention.self.query.weight" in tensors
        for number in range(layers)
    )
    image_width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
    _, rows, _ = shape("visual_encoder.pos_embed")
    if width % _HEAD_WIDTH or image_width % _HEAD_WIDTH:
        raise CheckpointError(
            f"{file} has widths {width} and {image_width}; ALBEF's are multiples of {_HEAD_WIDTH}"
        )
    return {
        "embed_dim": shape("vision_proj.weight")[0],
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "image_size": math.isqrt(rows - 1) * patch,
            "patch_size": patch,
            "width": image_width,
            "layers": count_parts(tensors, "visual_encoder.blocks."),
            "head_width": _HEAD_WIDTH,
            "mlp_ratio": shape("visual_encoder.blocks.0.mlp.fc1.weight")[0] / image_width,
        },
        "text_cfg": {
            "context_length": min(_CONTEXT_LENGTH, positions),
            "vocab_size": vocab_size,
            "width": width,
            "heads": width // _HEAD_WIDTH,
            "layers": layers - fusion_layers,
            "intermediate": shape(f"{bert}.encoder.layer.0.intermediate.dense.weight")[0],
            "positions": positions,
            "tokenizer": "wordpiece",
        },
        "fusion_cfg": {"layers": fusion_layers, "token_head": has_head},
    }
