import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albefs import tiny_albef
from cocas import coca_architecture
from conftest import encode, make_picture
from PIL import Image
from transplants import (
    clip_table,
    cosines,
    register_siglip_towers,
    shaken,
    tiny_siglip,
    write_words,
)

from clipserve import checkpoint
from clipserve.convert import export_checkpoint, export_model, import_model, onnx_writing
from clipserve.convert.writing import Form
from clipserve.errors import CheckpointError, ConfigError
from clipserve.model import Model, create

TEXTS = [
    "A photo of a cat",
    "two dogs, in the rain!",
    "a dog\u2019s \u201cred\u201d &amp; \ufb01ne\uff0c \uff21 shoes\x07",
]
PICTURES = [
    encode(make_picture(*size), form)
    for size, form in (
        ((32, 32), "PNG"),
        ((64, 48), "PNG"),
        ((200, 150), "JPEG"),
        ((20, 28), "PNG"),
    )
]


def saved(model: Model, folder: Path) -> Path:
    checkpoint.save(model, folder, name="tiny")
    return folder


def clip(**text: Any) -> Model:
    torch.manual_seed(0)
    return shaken(create(clip_table(**text)))


def assert_same_model(a: Path, b: Path) -> None:
    """To the last bit, and so in everything that decides the vectors."""
    one, other = (checkpoint.load_for_training(path) for path in (a, b))
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.transform == other.transform
    assert torch.equal(one.tokenizer(TEXTS).ids, other.tokenizer(TEXTS).ids)


@pytest.mark.parametrize("quick", [False, True])
def test_clip_goes_to_transformers_and_back(quick: bool, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    model = shaken(create(clip_table() | ({"quick_gelu": True} if quick else {})))
    folder, out = saved(model, tmp_path / "model"), tmp_path / "out"
    proof, _ = export_model(folder, out, "transformers")
    assert min(proof) >= 0.99999
    theirs, processor = CLIPModel.from_pretrained(out).eval(), CLIPProcessor.from_pretrained(out)
    opened = [Image.open(io.BytesIO(data)) for data in PICTURES]
    inputs = processor(
        text=TEXTS, images=opened, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = theirs(**inputs)
    assert cosines(model.embed_images(PICTURES), found.image_embeds.numpy()).min() >= 0.99999
    assert cosines(model.embed_texts(TEXTS), found.text_embeds.numpy()).min() >= 0.99999
    logits = found.logits_per_image.numpy()
    expected = model.logit_scale.item() * model.embed_images(PICTURES) @ model.embed_texts(TEXTS).T
    assert np.allclose(logits, expected, atol=1e-2)
    _, notes = import_model(out, tmp_path / "back")
    assert notes == []
    assert_same_model(folder, tmp_path / "back")


def test_siglip_goes_to_transformers_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import SiglipModel, SiglipProcessor

    register_siglip_towers(monkeypatch)
    model = tiny_siglip(write_words(tmp_path / "words"))
    folder, out = saved(model, tmp_path / "model"), tmp_path / "out"
    export_model(folder, out, "transformers")
    theirs = SiglipModel.from_pretrained(out).eval()
    processor = SiglipProcessor.from_pretrained(out)
    opened = [Image.open(io.BytesIO(data)) for data in PICTURES]
    inputs = processor(text=TEXTS, images=opened, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs)
    assert cosines(model.embed_images(PICTURES), found.image_embeds.numpy()).min() >= 0.99999
    assert cosines(model.embed_texts(TEXTS), found.text_embeds.numpy()).min() >= 0.99999
    assert theirs.logit_bias.item() == model.logit_bias.item()  # type: ignore[union-attr]
    import_model(out, tmp_path / "back")
    assert_same_model(folder, tmp_path / "back")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_goes_to_open_clip_and_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_siglip_towers(monkeypatch)
    model = clip() if kind == "clip" else tiny_siglip(write_words(tmp_path / "words"))
    folder = saved(model, tmp_path / "model")
    proof, notes = export_model(folder, tmp_path / "out", "open_clip")
    assert min(proof) >= 0.99999
    assert len(notes) == 1
    assert "decoded at a fraction of their size" in notes[0]
    import_model(tmp_path / "out", tmp_path / "back")
    assert_same_model(folder, tmp_path / "back")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, list[str]]:
    """A model and what it was exported to; tracing takes seconds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    model = clip()
    _, notes = export_model(saved(model, folder / "model"), folder / "out", "onnx")
    return model, folder / "out", notes


def session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("count", [1, 3])
def test_onnx_embeds_batches_of_any_size_as_ours(
    onnx: tuple[Model, Path, list[str]], count: int
) -> None:
    model, out, _ = onnx
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in PICTURES[:count]]
    pixels = torch.stack([model.transform(picture) for picture in opened]).numpy()
    images = session(out / "image.onnx").run(None, {"pixels": pixels})[0]
    assert cosines(model.embed_images(PICTURES[:count]), images).min() >= 0.99999
    ids = model.tokenizer(TEXTS[:count]).ids.numpy()
    texts = session(out / "text.onnx").run(None, {"ids": ids})[0]
    assert cosines(model.embed_texts(TEXTS[:count]), texts).min() >= 0.99999
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


def test_an_onnx_directory_says_how_its_inputs_are_made(
    onnx: tuple[Model, Path, list[str]],
) -> None:
    from transformers import AutoTokenizer

    model, out, _ = onnx
    described = json.loads((out / "onnx.json").read_text())
    assert described["opset"] == 18
    assert described["image_transform"] == json.loads(json.dumps(model.transform.to_open_clip()))
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True)["input_ids"]
    texts = session(out / "text.onnx").run(None, {"ids": np.array(ids)})[0]
    assert np.array(ids).shape[1] == described["context_length"]
    assert cosines(model.embed_texts(TEXTS), texts).min() >= 0.99999


def coca() -> Model:
    torch.manual_seed(0)
    return shaken(create(coca_architecture()))


def two_way_clip() -> Model:
    """Which sees what a text is padded with."""
    return clip(no_causal_mask=True, pool_type="last")


@pytest.mark.parametrize("kind", ["albef", "siglip", "coca", "two-way clip"])
def test_towers_of_all_kinds_go_to_onnx(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    register_siglip_towers(monkeypatch)
    models = {
        "albef": lambda: shaken(tiny_albef(tmp_path / "words")),
        "siglip": lambda: tiny_siglip(write_words(tmp_path / "words")),
        "coca": coca,
        "two-way clip": two_way_clip,
    }
    model = models[kind]()
    proof, _ = export_model(saved(model, tmp_path / "model"), tmp_path / "out", "onnx")
    assert min(proof) >= 0.99999
    for count in (1, 3):  # ids as our own tokenizer pads them
        ids = model.tokenizer(TEXTS[:count]).ids.numpy()
        texts = session(tmp_path / "out" / "text.onnx").run(None, {"ids": ids})[0]
        assert cosines(model.embed_texts(TEXTS[:count]), texts).min() >= 0.99999


def test_what_torch_cannot_export_is_told_in_one_line(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand more")

    monkeypatch.setattr("torch.onnx.export", fail)
    with pytest.raises(CheckpointError, match=r"makes no ONNX of this pixels: no such operator$"):
        onnx_writing.write_onnx(tiny_model, tmp_path)


def test_what_onnxruntime_refuses_is_told_in_one_line(
    onnx: tuple[Model, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, _ = onnx
    longer = model.tokenizer(TEXTS).ids.numpy().repeat(2, axis=1)
    monkeypatch.setattr(onnx_writing, "_written_tokenizer", lambda *_: lambda texts: longer)
    with pytest.raises(CheckpointError, match="cannot be run by onnxruntime") as caught:
        onnx_writing._prove(model, out)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value = 0.1"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre = True"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask = True"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs"),
        ("vision_cfg", {"image_size": [32, 64]}, "which is no square"),
        (None, {"init_logit_bias": -10}, "logit_bias"),
    ],
)
def test_what_transformers_cannot_be_told_is_named(
    section: str | None, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    table = clip_table()
    table = table | change if section is None else table | {section: table[section] | change}
    folder = saved(create(table), tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        export_model(folder, tmp_path / "out", "transformers")
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_an_albef_has_no_counterpart(form: Form, tmp_path: Path) -> None:
    folder = saved(tiny_albef(tmp_path / "words"), tmp_path / "model")
    with pytest.raises(ConfigError, match="fusion_cfg"):
        export_model(folder, tmp_path / "out", form)


def test_a_copy_that_embeds_otherwise_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipserve.convert import transformers_writing

    folder = saved(clip(), tmp_path / "model")
    monkeypatch.setattr(transformers_writing, "_activation", lambda layer: "relu")
    with pytest.raises(CheckpointError, match=r"is removed: pictures, least cosine 0\."):
        export_model(folder, tmp_path / "out", "transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    folder = saved(clip(), tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_model(folder, tmp_path / "out", "open_clip")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "albef.pth").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(tmp_path / "model", tmp_path / "albef.pth")
    assert (tmp_path / "albef.pth").read_text() == "mine"


def test_pictures_that_are_cut_otherwise_are_said(tmp_path: Path) -> None:
    _, notes = export_model(saved(clip(), tmp_path / "model"), tmp_path / "out", "transformers")
    assert any("cut one pixel beside" in note for note in notes)
