from dataclasses import replace

import pytest
import torch
from conftest import tiny_architecture

from clipserve.model import Model, create
from training.clock import Clock
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
        assert find_peak(gpu, True, None) == peak
        assert find_peak(gpu, False, None) is None  # the data sheet's is for bf16
    assert find_peak(gpu, True, 5.0) == 5e12
    assert find_peak(torch.device("cpu"), True, None) is None


def test_the_log_says_how_much_was_computed_and_how_often_captions_repeat() -> None:
    work = Work(image=1e12, text=0.0, context=8, peak=1e12)
    clock = Clock(work)
    captions = ["a", "b", "a", "a"]
    batch = Batch(torch.empty(0), torch.zeros(4, 8), [0, 1, 2, 3], 0, torch.empty(0), captions)
    clock.count(4, batch)
    lap = clock.lap()
    assert lap["repeated_captions"] == 0.5
    assert lap["mfu"] == pytest.approx(lap["tflops"])
    assert lap["tflops"] == pytest.approx(lap["samples_per_second"])
    assert lap["memory_gb"] > 0.05
    assert "mfu" not in Clock(replace(work, peak=None)).lap()
