"""Checkpoints in the published layout are made here from the shapes in the public repository:
salesforce/ALBEF, models/model_pretrain.py, model_retrieval.py, vit.py and xbert.py."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from albefs import open_clip_vision, timm_vision, tiny_albef
from conftest import make_picture
from torch import Tensor
from transplants import shaken

import clipserve
from clipserve import checkpoint, wordpiece
from clipserve.albef import Albef
from clipserve.convert import export_checkpoint, import_model, read_model, write_albef
from clipserve.convert.albef import _is_momentum
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import save_tensors
from clipserve.model import Model
from clipserve.weights import interpolate_positions
from training.momentum import FeatureQueue, Twin
from training.state import State


@dataclass(frozen=True)
class Sizes:
    """Of a published checkpoint, scaled down."""

    width: int = 64
    image_width: int = 128
    intermediate: int = 96
    layers: int = 3
    fusion_layers: int = 2
    blocks: int = 2
    patch: int = 8
    grid: int = 4
    positions: int = 40
    vocab: int = 60
    embed: int = 16
    queue: int = 24


SMALL = Sizes()
PUBLISHED = Sizes(768, 768, 3072, 6, 6, 12, 16, 16, 512, 30522, 256, 65536)


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit(place: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    width = s.image_width
    shapes: dict[str, tuple[int, ...]] = {
        f"{place}.cls_token": (1, 1, width),
        f"{place}.pos_embed": (1, 1 + s.grid**2, width),
        f"{place}.patch_embed.proj.weight": (width, 3, s.patch, s.patch),
        f"{place}.patch_embed.proj.bias": (width,),
    }
    for block in (f"{place}.blocks.{n}" for n in range(s.blocks)):
        shapes |= norm(f"{block}.norm1", width) | linear(f"{block}.attn.qkv", 3 * width, width)
        shapes |= linear(f"{block}.attn.proj", width, width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width)
        shapes |= linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes | norm(f"{place}.norm", width)


def bert(place: str, s: Sizes) -> dict[str, tuple[int, ...]]:
    width = s.width
    shapes: dict[str, tuple[int, ...]] = {
        f"{place}.embeddings.word_embeddings.weight": (s.vocab, width),
        f"{place}.embeddings.position_embeddings.weight": (s.positions, width),
        f"{place}.embeddings.token_type_embeddings.weight": (2, width),
    }
    shapes |= norm(f"{place}.embeddings.LayerNorm", width)
    for number in range(s.layers + s.fusion_layers):
        layer = f"{place}.encoder.layer.{number}"
        kinds = ["attention"] if number < s.layers else ["attention", "crossattention"]
        for kind in kinds:
            source = s.image_width if kind == "crossattention" else width
            shapes |= linear(f"{layer}.{kind}.self.query", width, width)
            shapes |= linear(f"{layer}.{kind}.self.key", width, source)
            shapes |= linear(f"{layer}.{kind}.self.value", width, source)
            shapes |= linear(f"{layer}.{kind}.output.dense", width, width)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", width)
        shapes |= linear(f"{layer}.intermediate.dense", s.intermediate, width)
        shapes |= linear(f"{layer}.output.dense", width, s.intermediate)
        shapes |= norm(f"{layer}.output.LayerNorm", width)
    return shapes


def published(s: Sizes = SMALL, retrieval: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the published names, tied where they are tied there."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"temp": (), **linear("itm_head", 2, s.width)}
    for mark in ("", "_m"):
        shapes |= vit(f"visual_encoder{mark}", s)
        shapes |= linear(f"vision_proj{mark}", s.embed, s.image_width)
        shapes |= linear(f"text_proj{mark}", s.embed, s.width)
        encoder = f"text_encoder{mark}"
        shapes |= bert(encoder if retrieval else f"{encoder}.bert", s)
        if not retrieval:
            head = f"{encoder}.cls.predictions"
            shapes |= linear(f"{head}.transform.dense", s.width, s.width)
            shapes |= norm(f"{head}.transform.LayerNorm", s.width)
            shapes |= {f"{head}.bias": (s.vocab,)}
    tensors = {
        name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    tensors["temp"] = torch.tensor(0.0731)
    for mark in ("", "_m"):
        place = f"text_encoder{mark}" + ("" if retrieval else ".bert")
        tensors[f"{place}.embeddings.position_ids"] = torch.arange(s.positions).expand(1, -1)
        if not retrieval:
            head = f"text_encoder{mark}.cls.predictions"
            words = tensors[f"{place}.embeddings.word_embeddings.weight"]
            tensors[f"{head}.decoder.weight"] = words
            tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
    tensors["image_queue"] = torch.randn(s.embed, s.queue, generator=generator)
    tensors["text_queue"] = torch.randn(s.embed, s.queue, generator=generator)
    tensors["queue_ptr"] = torch.tensor([s.queue // 3])
    if retrieval:
        tensors["idx_queue"] = torch.randint(-100, 50, (1, s.queue), generator=generator)
    return tensors


def write(tensors: dict[str, Tensor], file: Path) -> Path:
    torch.save({"model": tensors, "epoch": 29}, file)
    return file


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return bert_folder(tmp_path / "bert", SMALL.vocab)


def bert_folder(folder: Path, size: int) -> Path:
    """A vocabulary of exactly so many tokens."""
    folder.mkdir()
    names = [*wordpiece.SPECIAL, *(f"w{number}" for number in range(size - 5))]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    return folder


def read_albef(
    file: Path, words: Path, image_size: int | None = None
) -> tuple[Model, dict[str, Tensor] | None]:
    read = read_model(file, tokenizer=words, image_size=image_size)
    return read.model, read.momentum


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def read_back(file: Path) -> dict[str, Tensor]:
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"model"}
    found: dict[str, Tensor] = content["model"]
    return found


@pytest.mark.parametrize("retrieval", [False, True])
def test_a_published_checkpoint_comes_back_bit_by_bit(
    retrieval: bool, words: Path, tmp_path: Path
) -> None:
    tensors = published(retrieval=retrieval)
    model, momentum = read_albef(write(tensors, tmp_path / "in.pth"), words)
    write_albef(model, momentum, tmp_path / "out.pth")
    assert_same(read_back(tmp_path / "out.pth"), tensors)


@pytest.mark.parametrize("retrieval", [False, True])
def test_it_comes_back_from_a_model_directory_too(
    retrieval: bool, words: Path, tmp_path: Path
) -> None:
    tensors = published(retrieval=retrieval)
    import_model(write(tensors, tmp_path / "in.pth"), tmp_path / "m", tokenizer=words)
    checkpoint.verify(tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    assert_same(read_back(tmp_path / "out.pth"), tensors)


@pytest.mark.slow
def test_the_published_sizes_come_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = published(PUBLISHED)
    folder = bert_folder(tmp_path / "bert", PUBLISHED.vocab)
    model, momentum = read_albef(write(tensors, tmp_path / "in.pth"), folder)
    (tmp_path / "in.pth").unlink()
    assert model.architecture == {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "image_size": 256,
            "patch_size": 16,
            "width": 768,
            "layers": 12,
            "head_width": 64,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {
            "context_length": 30,
            "vocab_size": 30522,
            "width": 768,
            "heads": 12,
            "layers": 6,
            "intermediate": 3072,
            "positions": 512,
            "tokenizer": "wordpiece",
        },
        "fusion_cfg": {"layers": 6, "token_head": True},
    }
    write_albef(model, momentum, tmp_path / "out.pth")
    assert_same(read_back(tmp_path / "out.pth"), tensors)


def test_the_sizes_are_those_of_the_tensors(words: Path, tmp_path: Path) -> None:
    model, momentum = read_albef(write(published(), tmp_path / "in.pth"), words)
    network = model.network
    assert isinstance(network, Albef)
    assert (len(network.text.layers), len(network.fusion)) == (3, 2)
    assert model.transform.size == (32, 32)
    assert model.transform.resize_mode == "squash"
    assert model.embed_dim == 16
    assert model.logit_scale.item() == pytest.approx(1 / 0.0731)
    assert momentum is not None
    assert momentum["queue.image"].shape == (24, 16)
    twin = {name.removeprefix("twin.") for name in momentum if name.startswith("twin.")}
    without = {"matching_head.weight", "matching_head.bias", "logit_scale"}
    assert twin == network.state_dict().keys() - without


def test_queues_are_turned_entry_by_entry(words: Path, tmp_path: Path) -> None:
    tensors = published(retrieval=True)
    _, momentum = read_albef(write(tensors, tmp_path / "in.pth"), words)
    assert momentum is not None
    assert torch.equal(momentum["queue.text"][5], tensors["text_queue"][:, 5])
    assert momentum["queue.pictures"][5] == tensors["idx_queue"][0, 5]
    assert momentum["queue.cursor"].item() == 8


def test_each_weight_arrives_where_it_belongs(words: Path, tmp_path: Path) -> None:
    """What the network computes is what the published tensors mean, spelled out for one text."""
    import torch.nn.functional as F

    tensors = published()
    model, _ = read_albef(write(tensors, tmp_path / "in.pth"), words)
    ids = torch.tensor([[2, 7, 9, 3]])
    place = "text_encoder.bert"

    def apply(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def normalise(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)

    def attend(name: str, x: Tensor, source: Tensor) -> Tensor:
        query, key, value = (
            apply(f"{name}.self.{part}", what)
            for part, what in (("query", x), ("key", source), ("value", source))
        )
        found = (query @ key.transpose(1, 2) / 8).softmax(-1) @ value  # one head of 64
        return normalise(f"{name}.output.LayerNorm", x + apply(f"{name}.output.dense", found))

    def embedding(name: str) -> Tensor:
        return tensors[f"{place}.embeddings.{name}_embeddings.weight"]

    x = embedding("word")[ids] + embedding("position")[:4] + embedding("token_type")[0]
    x = normalise(f"{place}.embeddings.LayerNorm", x)
    image = torch.randn(1, 17, 128)
    for number in range(5):
        layer = f"{place}.encoder.layer.{number}"
        if number == 3:
            states = x
        x = attend(f"{layer}.attention", x, x)
        if number >= 3:
            x = attend(f"{layer}.crossattention", x, image)
        inner = apply(f"{layer}.output.dense", F.gelu(apply(f"{layer}.intermediate.dense", x)))
        x = normalise(f"{layer}.output.LayerNorm", x + inner)
    network = model.network
    with torch.no_grad():
        found, features = network.encode_text_states(ids)
        fused = network.fuse(found, ids, image)
        assert torch.allclose(found, states, atol=1e-5)
        assert torch.allclose(features, apply("text_proj", states[:, 0]), atol=1e-5)
        assert torch.allclose(fused, x, atol=1e-5)
        assert torch.allclose(network.matching_logits(fused), apply("itm_head", x[:, 0]), atol=1e-5)


def test_an_imported_model_embeds_and_matches(words: Path, tmp_path: Path) -> None:
    file = write(published(), tmp_path / "in.pth")
    fingerprint, _ = import_model(file, tmp_path / "m", tokenizer=words)
    model = clipserve.load(tmp_path / "m", device="cpu", dtype="fp32")
    assert model.info.fingerprint == fingerprint
    assert model.embed_texts(["w1 w2"]).shape == (1, 16)
    assert np.isfinite(model.match([make_picture()], ["w1"])).all()


def test_without_momentum_only_the_weights_are_kept(words: Path, tmp_path: Path) -> None:
    tensors = published()
    online = {name: tensor for name, tensor in tensors.items() if not _is_momentum(name)}
    assert len(online) < len(tensors) / 2 + 10
    model, momentum = read_albef(write(online, tmp_path / "in.pth"), words)
    assert momentum is None
    write_albef(model, None, tmp_path / "out.pth")
    assert_same(read_back(tmp_path / "out.pth"), online)


def checkpoint_of_a_run(
    folder: Path, model: Model, pushed: int, queue_size: int = 6
) -> tuple[Twin, FeatureQueue]:
    """As training writes it; the momentum copy is not the model."""
    twin, queue = Twin(model.network), FeatureQueue(queue_size, model.embed_dim, num_groups=3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    for number in range(pushed):
        row = torch.full((1, model.embed_dim), float(number))
        queue.push(row, -row, torch.full((1, 3), number))
    checkpoint.save(model, folder, name="m")
    extras = {"momentum": twin, "queue": queue}
    State(model, torch.optim.AdamW(model.parameters()), {}, extras).save(folder)
    return twin, queue


@pytest.mark.parametrize("pushed", [6, 16])
def test_a_run_is_exported_with_its_own_momentum_copy_and_queue(
    pushed: int, words: Path, tmp_path: Path
) -> None:
    tensors = published()
    model, imported = read_albef(write(tensors, tmp_path / "in.pth"), words)
    twin, queue = checkpoint_of_a_run(tmp_path / "m", model, pushed)
    save_tensors(imported or {}, tmp_path / "m" / checkpoint.MOMENTUM)  # older: not the run's
    export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    found = read_back(tmp_path / "out.pth")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        if "_m." in name and not name.endswith("position_ids"):
            assert torch.equal(tensor, found[name.replace("_m.", ".")] + 1), name
    newest = list(range(pushed - 6, pushed))
    assert found["queue_ptr"].tolist() == [0]
    assert found["image_queue"].shape == (SMALL.embed, 6)
    assert found["image_queue"][0].tolist() == newest  # the oldest is written next
    assert torch.equal(found["text_queue"], -found["image_queue"])

    again, momentum = read_albef(tmp_path / "out.pth", words)
    assert momentum is not None
    for name, tensor in twin.state_dict().items():
        if f"twin.{name}" in momentum:
            assert torch.equal(momentum[f"twin.{name}"], tensor), name
    for name, tensor in model.network.state_dict().items():
        assert torch.allclose(again.network.state_dict()[name], tensor), name


@pytest.mark.parametrize(("pushed", "queue_size"), [(5, 6), (0, 6), (3, 0)])
def test_a_queue_that_is_not_full_is_left_out(
    pushed: int, queue_size: int, words: Path, tmp_path: Path
) -> None:
    model, _ = read_albef(write(published(), tmp_path / "in.pth"), words)
    checkpoint_of_a_run(tmp_path / "m", model, pushed, queue_size)
    export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    found = read_back(tmp_path / "out.pth")
    queues = {"image_queue", "text_queue", "queue_ptr"}
    assert found.keys() == published().keys() - queues
    bias = "text_proj_m.bias"
    assert torch.equal(found[bias], found["text_proj.bias"] + 1)
    again, momentum = read_albef(tmp_path / "out.pth", words)
    write_albef(again, momentum, tmp_path / "again.pth")
    assert_same(read_back(tmp_path / "again.pth"), found)


def test_a_model_without_momentum_is_exported_with_its_weights_as_copies(
    words: Path, tmp_path: Path
) -> None:
    """ALBEF's Retrieval.py reads visual_encoder_m.pos_embed of every checkpoint."""
    tensors = published()
    model, _ = read_albef(write(tensors, tmp_path / "in.pth"), words)
    checkpoint.save(model, tmp_path / "m", name="m")
    State(model, torch.optim.AdamW(model.parameters()), {}).save(tmp_path / "m")
    export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    found = read_back(tmp_path / "out.pth")
    assert found.keys() == tensors.keys() - {"image_queue", "text_queue", "queue_ptr"}
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name.replace("_m.", ".")]), name


def test_a_damaged_state_of_a_run_is_refused(words: Path, tmp_path: Path) -> None:
    model, _ = read_albef(write(published(), tmp_path / "in.pth"), words)
    twin, queue = checkpoint_of_a_run(tmp_path / "m", model, 9)
    state = tmp_path / "m" / "state"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(tmp_path / "m", tmp_path / "out.pth")

    few = {k: v for k, v in queue.state_dict().items() if k != "stored_text"}
    save_tensors(few, state / "queue.safetensors")
    refused(r"queue\.safetensors lacks stored_text")
    (state / "queue.safetensors").unlink()
    refused(r"queue\.safetensors cannot be read")
    weights = {k: v for k, v in twin.state_dict().items() if k != "fusion.1.mlp.up.bias"}
    save_tensors(queue.state_dict(), state / "queue.safetensors")
    save_tensors(weights, state / "momentum.safetensors")
    refused(r"momentum\.safetensors lacks fusion\.1\.mlp\.up\.bias")
    (state / "momentum.safetensors").write_bytes(b"nothing")
    refused(r"momentum\.safetensors cannot be read")
    assert not (tmp_path / "out.pth").exists()


def test_half_precision_is_widened_exactly(words: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in published().items()
    }
    model, momentum = read_albef(write(tensors, tmp_path / "in.pth"), words)
    write_albef(model, momentum, tmp_path / "out.pth")
    wide = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    assert_same(read_back(tmp_path / "out.pth"), wide)


def test_missing_and_left_over_tensors_are_named(words: Path, tmp_path: Path) -> None:
    def refused(tensors: dict[str, Tensor], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            read_albef(write(tensors, tmp_path / "in.pth"), words)

    for name in ("itm_head.bias", "visual_encoder.norm.bias", "vision_proj_m.weight", "text_queue"):
        refused({k: v for k, v in published().items() if k != name}, f"lacks {name}")
    cross = "text_encoder.bert.encoder.layer.4.crossattention.self.key.bias"
    refused({k: v for k, v in published().items() if k != cross}, f"lacks {cross}")
    refused(published() | {"caption_head.weight": torch.zeros(2)}, "caption_head.weight left over")
    refused(published() | {"text_proj_m.extra": torch.zeros(2)}, "text_proj_m.extra left over")
    few = {"visual_encoder.pos_embed": torch.zeros(1)}
    refused(few, "no published ALBEF checkpoint: it lacks")


def test_what_cannot_be_kept_is_refused(words: Path, tmp_path: Path) -> None:
    decoder = "text_encoder.cls.predictions.decoder.weight"
    cases = [
        ({decoder: torch.zeros(60, 64)}, "differs from"),
        ({"text_encoder.bert.embeddings.position_ids": torch.ones(1, 40)}, "not 0, 1, 2"),
        ({"temp": torch.tensor(-0.1)}, "temp is -0.1"),
        ({"itm_head.weight": torch.zeros(3, 64)}, "itm_head|matching_head"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            read_albef(write(published() | change, tmp_path / "in.pth"), words)
    odd = published(Sizes(width=48))
    with pytest.raises(CheckpointError, match="multiples of 64"):
        read_albef(write(odd, tmp_path / "in.pth"), words)


def test_a_file_that_would_execute_something_is_refused(words: Path, tmp_path: Path) -> None:
    torch.save({"model": published(), "config": Path("x")}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_albef(tmp_path / "in.pth", words)
    with pytest.raises(ConfigError, match=r"none\.pth' is not .* nor anything else that is there"):
        read_albef(tmp_path / "none.pth", words)


def test_the_vocabulary_must_be_named_and_be_the_same(words: Path, tmp_path: Path) -> None:
    file = write(published(), tmp_path / "in.pth")
    with pytest.raises(ConfigError, match="does not hold its vocabulary.*bert-base-uncased"):
        import_model(file, tmp_path / "m")
    for size in (SMALL.vocab - 1, SMALL.vocab + 1):
        other = bert_folder(tmp_path / f"bert{size}", size)
        with pytest.raises(ConfigError, match=f"has {size} tokens"):
            import_model(file, tmp_path / "m", tokenizer=other)
    assert not (tmp_path / "m").exists()


def test_a_model_that_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny_albef(tmp_path / "words", open_clip_vision())
    checkpoint.save(model, tmp_path / "m", name="m")
    with pytest.raises(ConfigError, match="timm ViT only.* --to onnx"):
        export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_what_is_written_is_read_again_and_held_against_the_model(
    words: Path, tmp_path: Path
) -> None:
    import_model(write(published(), tmp_path / "in.pth"), tmp_path / "m", tokenizer=words)
    proof, notes = export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    assert min(proof) > 0.999999
    assert notes == []


def test_heads_of_another_width_than_albefs_are_found_out(tmp_path: Path) -> None:
    """The file cannot say how many there are: the tensors of two heads are those of one."""
    model = tiny_albef(tmp_path / "words", timm_vision(), width=64, heads=2)
    checkpoint.save(shaken(model), tmp_path / "m", name="m")
    with pytest.raises(CheckpointError, match="does not embed as this model does.*texts"):
        export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_what_albefs_code_does_in_its_own_way_is_said(tmp_path: Path) -> None:
    model = tiny_albef(tmp_path / "words", timm_vision(), width=64, heads=1)
    checkpoint.save(shaken(model), tmp_path / "m", name="m")
    _, notes = export_checkpoint(tmp_path / "m", tmp_path / "out.pth")
    assert [note.split(":")[0] for note in notes] == ["pictures", "texts"]
    assert "resize_mode = shortest" in notes[0]
    assert "reads 12 tokens" in notes[1]


def test_a_change_of_size_is_a_line_of_the_import(words: Path, tmp_path: Path) -> None:
    file = write(published(), tmp_path / "in.pth")
    _, notes = import_model(file, tmp_path / "m", tokenizer=words, image_size=48)
    assert notes == ["image positions 4x4 -> 6x6: interpolated, bicubic"]


@pytest.mark.parametrize("image_size", [16, 48])
def test_a_directory_is_resized_as_its_file_is_and_keeps_its_momentum(
    image_size: int, words: Path, tmp_path: Path
) -> None:
    file = write(published(), tmp_path / "in.pth")
    first, _ = import_model(file, tmp_path / "at-once", tokenizer=words, image_size=image_size)
    import_model(file, tmp_path / "m", tokenizer=words)
    second, notes = import_model(tmp_path / "m", tmp_path / "later", image_size=image_size)
    assert first == second
    assert len(notes) == 1
    one, other = (checkpoint.load_momentum(tmp_path / name) for name in ("at-once", "later"))
    assert one is not None
    assert other is not None
    assert_same(other, one)
    told = checkpoint.read_description(tmp_path / "later")["training"]
    assert told["start_fingerprint"] == checkpoint.verify(tmp_path / "m")["fingerprint"]


def test_an_architecture_beside_an_albef_is_refused(words: Path, tmp_path: Path) -> None:
    file = write(published(), tmp_path / "in.pth")
    with pytest.raises(ConfigError, match="leave 'ViT-B-32' out"):
        read_model(file, architecture="ViT-B-32", tokenizer=words)
    with pytest.raises(
        ConfigError, match="context_length 64 is more than the 40 of text_cfg.positions"
    ):
        read_model(file, tokenizer=words, context_length=64)


def test_another_input_size_interpolates_both_position_tables(words: Path, tmp_path: Path) -> None:
    tensors = published()
    file = write(tensors, tmp_path / "in.pth")
    model, momentum = read_albef(file, words, image_size=48)
    assert momentum is not None
    own = model.network.visual.trunk.pos_embed
    assert torch.equal(own, interpolate_positions(tensors["visual_encoder.pos_embed"], 6))
    twin = momentum["twin.visual.trunk.pos_embed"]
    assert torch.equal(twin, interpolate_positions(tensors["visual_encoder_m.pos_embed"], 6))
    assert model.transform.size == (48, 48)
    assert model.architecture["vision_cfg"]["image_size"] == 48
    assert model.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 16)
    same, _ = read_albef(file, words, image_size=32)
    table = same.network.visual.trunk.pos_embed
    assert torch.equal(table, tensors["visual_encoder.pos_embed"])


def test_no_space_leaves_nothing(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(write(published(), tmp_path / "in.pth"), tmp_path / "m", tokenizer=words)
    out = tmp_path / "new" / "albef.pth"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(tmp_path / "m", out)
    assert list(out.parent.iterdir()) == []
