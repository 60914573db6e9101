from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_architecture
from small_runs import SMALL

from clipserve.config import load_config
from clipserve.errors import ConfigError
from clipserve.model import Model, create
from training.clock import Clock
from training.data import open_data
from training.distributed import ALONE
from training.precision import Precision
from training.recipe import Run, prepare
from training.run_directory import RunDirectory
from training.shards import pack
from training.streaming import Batch
from training.work import Work, find_peak, measure


@pytest.fixture
def model() -> Model:
    return create(tiny_architecture()).train()


# One layer of width 32: 12 * 32 * 32 weights; a projection of 32 * 16; two FLOPs for each weight
# and token, in each of three passes. Attention: 4 T T D, and two and a half times that backward.
LAYER, PROJECTION = 2 * 12 * 32 * 32, 2 * 32 * 16
PATCHES = 2 * (3 * 16 * 16) * 32 * 4  # of 4; pixels need no gradient, which leaves two passes


def attention(tokens: int) -> int:
    return 4 * tokens * tokens * 32


def test_what_is_counted_is_what_the_tower_needs(model: Model) -> None:
    work = measure(model)
    assert work.image == 3 * (5 * LAYER + PROJECTION) + 2 * PATCHES + 3.5 * attention(5)
    assert work.text == 3 * (16 * LAYER + PROJECTION) + 3.5 * attention(16)
    assert (work.context, work.peak) == (16, None)


def test_what_is_frozen_costs_only_its_forward_pass(model: Model) -> None:
    model.network.visual.requires_grad_(False)
    assert measure(model).image == 5 * LAYER + PROJECTION + PATCHES + attention(5)


@pytest.fixture
def prepared(captioned: Any, tmp_path: Path) -> Any:
    """prepared(SETTING, ...) -> what the loop would work on."""
    pack(captioned(9), tmp_path / "shards")

    def make(*more: str) -> Run:
        given = [f"out={tmp_path / 'run'}", f"data.train={tmp_path / 'shards'}", "train.steps=9"]
        still = "model.architecture.vision_cfg.patch_dropout=0"
        config = load_config(None, [*given, *SMALL, still, *more])
        return prepare(config, open_data(config, RunDirectory(tmp_path / "run", 1)), ALONE)

    return make


def test_a_run_counts_what_it_trains_and_nothing_twice(prepared: Any) -> None:
    """A frozen tower once, one that thaws as if it were trained, checkpointed activations once."""
    whole = prepared().work
    assert whole.image == 3 * (5 * LAYER + PROJECTION) + 2 * PATCHES + 3.5 * attention(5)
    locked = prepared("optim.freeze=['image.*']").work
    assert locked.image == 5 * LAYER + PROJECTION + PATCHES + attention(5)
    assert locked.text == whole.text
    late = prepared("optim.freeze=['image.*']", "optim.unfreeze_after_steps=3").work
    assert late == prepared("train.grad_checkpointing=true").work == whole


def test_a_frozen_tower_draws_nothing_so_the_other_is_compiled(prepared: Any) -> None:
    """Patch dropout is off there, also in micro-batches."""
    drops = "model.architecture.vision_cfg.patch_dropout=0.5"
    more = ["train.accum_freq=2", "train.compile=on", drops, "optim.freeze=['image.*']"]
    networks = prepared(*more).networks
    assert networks.forward is not networks.model
    assert not networks.parts.draws
    with pytest.raises(ConfigError, match=r"set train\.compile = off"):
        prepared(*more, "optim.unfreeze_after_steps=3")


def test_measuring_leaves_no_gradient_and_no_trace_in_statistics(model: Model) -> None:
    model.network.visual.register_buffer("seen", torch.ones(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_of_short_texts_costs_less() -> None:
    work = Work(image=100.0, text=10.0, context=8)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    batch = Batch(torch.empty(0), ids, [0, 1, 2], 0, groups=torch.empty(0))
    assert work.of(batch) == 3 * (100 + 5)


def test_the_peak_is_what_was_given_or_that_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names = {"NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert find_peak(gpu, Precision("bf16"), None) == peak
        assert find_peak(gpu, Precision(), None) is None  # the data sheet's is for bf16
    assert find_peak(gpu, Precision("bf16"), 5.0) == 5e12
    assert find_peak(torch.device("cpu"), Precision("bf16"), None) is None


def test_the_log_says_how_much_was_computed() -> None:
    work = Work(image=1e12, text=0.0, context=8, peak=1e12)
    clock = Clock(work)
    batch = Batch(torch.empty(0), torch.zeros(4, 8), [0, 1, 2, 3], 0, torch.empty(0))
    clock.count(4, batch)
    lap = clock.lap()
    assert lap["mfu"] == pytest.approx(lap["tflops"])
    assert lap["tflops"] == pytest.approx(lap["samples_per_second"])
    assert lap["memory_gb"] > 0.05
    assert "mfu" not in Clock(replace(work, peak=None)).lap()
