"""Low-rank adapters: what they compute, what they leave alone, and that runs go on with them."""

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, config, run, weights
from test_training_continuation import check_same_but_for_rounding, read_trace, run_ranks
from test_training_continuation import run as run_alone
from test_training_fine_tuning import check_equal
from test_training_fine_tuning import data as data  # a fixture
from torch import nn
from torch.nn.utils import parametrize

from clipserve.config import Config, load_config
from clipserve.errors import CheckpointError, ConfigError, TrainingError
from clipserve.lora import LoraConfig
from clipserve.model import Model
from clipserve.towers import architecture_config, build_network
from training.lora import Adapter, Adapters, choose
from training.parts import find_weights
from training.state import seed_step

SETTINGS = LoraConfig(rank=2, alpha=3.0)


@pytest.fixture
def base(data: Path, tmp_path: Path) -> Path:
    """A model that was trained for a step."""
    run(config(data, tmp_path / "base", "train.steps=1"))
    return (tmp_path / "base" / "latest").resolve()


def tune(data: Path, base: Path, out: Path, *more: str) -> Config:
    sizes = [setting for setting in SMALL if not setting.startswith("model.")]
    given = [f"out={out}", f"data.train={data / 'train'}", f"model.pretrained={base}"]
    return load_config(None, [*given, *sizes, "lora.rank=2", "optim.lr=1e-2", *more])


def build(model: Model, settings: LoraConfig = SETTINGS) -> Adapters:
    """Adapters of the default targets."""
    return Adapters(choose(find_weights(model.network), settings)[0], settings)


def adapted(model: Model, settings: LoraConfig = SETTINGS) -> Adapters:
    """Those that already say something."""
    adapters = build(model, settings)
    for adapter in adapters:
        nn.init.normal_(adapter.up, std=0.1)
    adapters.merge()
    return adapters


class Added(nn.Module):
    """The definition: weight + scale * up @ down, with torch's own gradients."""

    def __init__(self, up: torch.Tensor, down: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Parameter(up), nn.Parameter(down), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * self.up @ self.down


def spread(model: Model) -> torch.Tensor:
    """A number that all weights of both towers have a part in."""
    torch.manual_seed(1)
    image = model.encode_image(torch.randn(3, 3, *model.transform.size))
    text = model.encode_text(model.tokenizer(["a red shoe", "a hat", "blue"]).ids)
    return (image @ text.T).square().sum()


def test_merged_weights_answer_and_learn_as_adapters_do(tiny_model: Model) -> None:
    plain = copy.deepcopy(tiny_model.network)
    adapters = adapted(tiny_model)
    defined: dict[str, Added] = {}
    for adapter in adapters:
        *path, name = adapter.target.name.replace("image.", "visual.").split(".")
        owner = plain.get_submodule(".".join(path).removeprefix("text."))
        rule = Added(adapter.up.detach().clone(), adapter.down.detach().clone(), 1.5)
        parametrize.register_parametrization(owner, name, rule)
        defined[adapter.target.name] = rule
    assert {name.split(".", 4)[-1] for name in defined} == {
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    own = Model(
        plain, tiny_model.architecture, tiny_model.transform, tiny_model.tokenizer, tiny_model.info
    )
    for _ in range(2):  # gradients add up, as they must for a batch in pieces
        merged, expected = spread(tiny_model), spread(own)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
        merged.backward()  # type: ignore[no-untyped-call]
        expected.backward()  # type: ignore[no-untyped-call]
    for adapter in adapters:
        rule = defined[adapter.target.name]
        torch.testing.assert_close(adapter.up.grad, rule.up.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.down.grad, rule.down.grad, rtol=1e-4, atol=1e-6)
        assert adapter.target.parameter.grad is None


def test_adapters_begin_as_the_model_itself(tiny_model: Model) -> None:
    before = copy.deepcopy(tiny_model.network.state_dict())
    adapters = build(tiny_model)
    adapters.merge()
    now = tiny_model.network.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_the_default_trains_less_than_three_percent_of_a_vit_b32() -> None:
    with torch.device("meta"):
        weights = find_weights(build_network(architecture_config("ViT-B-32")))
        adapters = Adapters(choose(weights, LoraConfig())[0], LoraConfig())
    share = sum(p.numel() for p in adapters.parameters()) / sum(
        weight.parameter.numel() for weight in weights
    )
    assert len(list(adapters)) == 2 * 12 * 4
    assert 0.01 < share < 0.03


def test_dropped_inputs_are_out_of_value_and_gradient_and_back_afterwards(
    tiny_model: Model,
) -> None:
    adapters = adapted(tiny_model, LoraConfig(rank=2, alpha=2.0, dropout=0.5))
    first = next(iter(adapters))
    whole = first.target.parameter.detach().clone()
    with contextlib.suppress(TrainingError), adapters.dropout(0, 1):
        spread(tiny_model).backward()  # type: ignore[no-untyped-call]
        left_out = (first.target.parameter == first.base).all(dim=0)
        raise TrainingError("a rank is gone")
    assert 0 < left_out.sum() < len(left_out)
    assert first.down.grad is not None
    assert torch.equal((first.down.grad == 0).all(dim=0), left_out)
    assert torch.equal(first.target.parameter, whole)


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(Adapter, "drop", 2 * 8 + 2), (torch.Tensor, "backward", 3)]
)
def test_a_step_without_memory_leaves_no_input_out_of_what_is_saved(
    owner: type,
    name: str,
    call: int,  # in step 3 of an epoch of 3
    data: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, merge, calls = getattr(owner, name), Adapter.merge, []

    def fail(*given: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    def fail_then(adapter: Adapter) -> None:
        if len(calls) == call:
            calls.append("merge")
            raise torch.OutOfMemoryError("CUDA out of memory")
        merge(adapter)

    settings = ("lora.dropout=0.5", "train.steps=3")
    often = ("train.checkpoint_every_steps=1", "train.keep_checkpoints=9")
    run(tune(data, base, tmp_path / "whole", *settings, *often))
    monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(Adapter, "merge", fail_then)
    with pytest.raises(torch.OutOfMemoryError):
        run(tune(data, base, tmp_path / "run", *settings))
    assert calls[-1] == "merge"
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    check_equal(saved, tmp_path / "whole" / "checkpoints" / "step-000000002")


def test_all_ranks_leave_out_the_same_inputs_and_others_in_each_step(tiny_model: Model) -> None:
    adapters = adapted(tiny_model, LoraConfig(rank=2, alpha=2.0, dropout=0.5))
    found = []
    for rank, step in ((0, 1), (1, 1), (0, 2)):
        seed_step(0, step, rank)
        with adapters.dropout(0, step):
            kept = [adapter.kept for adapter in adapters if adapter.kept is not None]
            assert len(kept) == len(list(adapters))
            found.append(torch.cat(kept))
    assert set(found[0].tolist()) == {0.0, 2.0}
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_only_adapters_learn_and_what_is_saved_is_merged(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "tuned"
    run(tune(data, base, out, "train.steps=3"))
    assert "trains 0.13% of 1633473 weights, 2048; the others are frozen" in caplog.text
    before, after = weights(base), weights(out / "latest")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    held = load_file(out / "latest" / "state" / "lora.safetensors")
    found = {key.removesuffix(".up") for key in held if key.endswith(".up")}
    ours = {name.replace("visual.", "image/") for name in changed}
    assert len(changed) == 8
    assert {name.replace(".", "/") for name in ours} == {
        name.removeprefix("text/") for name in found
    }
    for name in found:
        theirs = name.replace("image/", "visual/").removeprefix("text/").replace("/", ".")
        assert torch.equal(held[f"{name}.base"], before[theirs])
        merged = held[f"{name}.base"] + 8 * held[f"{name}.up"] @ held[f"{name}.down"]
        torch.testing.assert_close(after[theirs], merged, rtol=1e-5, atol=1e-5)


def test_a_run_with_adapters_goes_on_to_the_last_bit(
    data: Path, base: Path, tmp_path: Path
) -> None:
    more = [
        "train.steps=5",
        "train.ema=0.9",
        "lora.dropout=0.3",
        "lora.whole=['logit_scale']",
        "optim.freeze=['text.transformer.resblocks.0.mlp.*']",
        "optim.image.lr=3e-3",
        "optim.layer_decay=0.5",
        'objectives=[{name="contrastive"},{name="simclr",hidden_size=8,output_size=4}]',
        "train.keep_checkpoints=99",
        "train.checkpoint_every_steps=1",
    ]
    run(tune(data, base, tmp_path / "whole", *more))
    start = tmp_path / "whole" / "checkpoints" / "step-000000002"
    run(tune(data, base, tmp_path / "again", *more), resume=str(start))
    check_equal(tmp_path / "whole" / "latest", tmp_path / "again" / "latest")
    held = load_file(tmp_path / "again" / "latest" / "state" / "lora.safetensors")
    assert any(key.startswith("text/") for key in held)
    assert not any("text" in key and "mlp" in key for key in held)
    moments = load_file(tmp_path / "again" / "latest" / "state" / "optimizer.safetensors")
    learnt = {key.partition("/")[2] for key in moments}
    assert {name.split(".")[0] for name in learnt} == {"lora", "heads", "logit_scale"}


@pytest.mark.parametrize("change", ["lora.rank=3", "lora.alpha=4", "lora.targets=['image.*']"])
def test_a_run_does_not_go_on_with_other_adapters(
    change: str, data: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    run(tune(data, base, out, "train.steps=1"))
    with pytest.raises(CheckpointError, match=r"other objectives, sizes or adapters"):
        run(tune(data, base, out, "train.steps=2", change))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lora.targets=['imge.*']"], r"lora\.targets: 'imge\.\*' names no weight; did you mean"),
        (["lora.targets=['image.proj']"], r"lora\.targets: 'image\.proj' names no weight"),
        (["lora.whole=['logit']"], r"lora\.whole: 'logit' names no weight"),
        (
            ["lora.targets=['image.*']", "optim.freeze=['image.*']"],
            r"leaves nothing to adapt: all of it is frozen",
        ),
        (
            ["lora.whole=['image.proj']", "optim.freeze=['*.proj']"],
            r"image\.proj is in lora\.whole and in optim\.freeze; take it out of one",
        ),
        (["lora.rank=16"], r"lora\.rank = 16 gives image\..* an adapter no smaller than itself"),
        (["optim.fusion.lr=1"], r"optim\.fusion has no effect"),
    ],
)
def test_adapters_that_mean_nothing_are_refused(
    settings: list[str], words: str, data: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run(tune(data, base, tmp_path / "tuned", "train.steps=1", *settings))
    assert "\n" not in str(caught.value)


def test_default_targets_that_a_tower_lacks_are_not_blamed_on_a_pattern() -> None:
    weights = find_weights(build_network(architecture_config("RN50")))
    with pytest.raises(
        ConfigError, match=r"^lora: the image tower .* name others as lora\.targets"
    ):
        choose(weights, SETTINGS)
    targets, _ = choose(weights, LoraConfig(rank=2, targets=("text.*",)))
    assert {weight.part for weight in targets} == {"text"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lora.rank=4"], r"lora adapts a trained model; name it as model\.pretrained"),
        (
            [
                "model.pretrained=x",
                "lora.rank=4",
                "optim.freeze=['image.*']",
                "optim.unfreeze_after_steps=3",
            ],
            r"would train the weights that lora adapts",
        ),
        (["model.pretrained=x", "lora.targets=[]"], r"lora\.targets"),
    ],
)
def test_settings_that_contradict_adapters_are_refused(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["out=x", "data.train=x", "train.steps=1", *settings])


@pytest.mark.slow
def test_two_ranks_adapt_as_one_does(data: Path, tmp_path: Path) -> None:
    same = "model.architecture.vision_cfg.patch_dropout=0"  # each rank draws its own
    run(config(data, tmp_path / "base", "train.steps=1", same))
    start = (tmp_path / "base" / "latest").resolve()
    more = [same, f"model.pretrained={start}", "lora.rank=2", "optim.lr=1e-3", "train.steps=6"]
    shards = data / "train"
    run_alone(shards, tmp_path / "alone", more=more)
    run_ranks(shards, tmp_path / "two", 2, more)
    alone, two = read_trace(tmp_path / "alone"), read_trace(tmp_path / "two", ranks=2)
    check_same_but_for_rounding(two, alone)
