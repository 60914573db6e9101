import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_architecture
from small_runs import SMALL

from clipserve.config import load_config
from clipserve.model import create
from training.frozen import Frozen, choose
from training.momentum import FeatureQueue
from training.objectives.sigmoid import sigmoid_ring_loss
from training.optim import build_optimizer
from training.parts import find_weights
from training.sanity import Sanity, sigmoid_chance
from training.work import Work

QUIET = {
    "loss": 2.0,
    "loss/contrastive": 2.0,
    "logit_scale": 14.0,
    "repeated_captions": 0.0,
    "data_wait_fraction": 0.1,
}


def make(step: int = 10, bias: float | None = None, *more: str) -> Sanity:
    given = ["out=nowhere", "data.train=nowhere", "train.steps=9", *SMALL, *more]
    model = create(tiny_architecture() | ({} if bias is None else {"init_logit_bias": bias}))
    config = load_config(None, given)
    weights = find_weights(model.network)
    frozen = Frozen(choose(weights, config.optim.freeze))
    queue = FeatureQueue(100, 16)
    queue.push(torch.zeros(24, 16), torch.zeros(24, 16), torch.zeros(24, 1))
    run: Any = SimpleNamespace(
        config=config,
        total_steps=config.train.steps,
        work=Work(2e9, 1e9, 77, 989e12),
        networks=SimpleNamespace(queue=queue),
        max_logit_scale=math.log(100),
        state=SimpleNamespace(
            model=model,
            counters=SimpleNamespace(step=step),
            optimizer=build_optimizer(model, config.optim, weights, frozen),
        ),
    )
    return Sanity(run)


def test_the_expected_first_loss_and_the_assumed_peak_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    make().begin()
    assert "has loss/contrastive 2.079 = ln 8" in caplog.text
    assert "a sample takes 3 GFLOP" in caplog.text
    assert "assumed peak of the device: 989 TFLOP/s" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_siglips_first_loss_is_that_of_vectors_which_are_alike_in_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    image, text = torch.eye(16)[:8], torch.eye(16)[8:]
    loss = sigmoid_ring_loss(
        image,
        [(slice(0, 8), text)],
        torch.tensor(10.0),
        torch.tensor(-10.0),
        own=slice(0, 8),
        total=8,
    )
    assert sigmoid_chance(8, -10.0) == pytest.approx(loss.item(), rel=1e-6)
    assert F.softplus(torch.tensor(10.0)).item() == pytest.approx(sigmoid_chance(1, -10.0))
    caplog.set_level(logging.INFO)
    make(1, -10.0, "objectives=[{name='sigmoid'}]").begin()
    assert "has loss/sigmoid 10.000" in caplog.text


def test_a_queue_makes_more_wrong_answers(caplog: pytest.LogCaptureFixture) -> None:
    momentum = "objectives=[{name='momentum_contrast'}]"
    caplog.set_level(logging.INFO)
    sanity = make(1, None, momentum)
    sanity.begin()
    assert f"has loss/momentum_contrast {math.log(32):.3f} = ln 32" in caplog.text
    sanity.look(QUIET | {"loss/momentum_contrast": 9.0})
    assert "the first loss/momentum_contrast is 9, where" in caplog.text


@pytest.mark.parametrize(("objective", "is_warned"), [("contrastive", True), ("sigmoid", False)])
def test_a_bias_that_no_objective_uses_is_told(
    objective: str, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make(1, -10.0, f"objectives=[{{name='{objective}'}}]").begin()
    assert ("none of the objectives uses" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], None),
        (["optim.warmup_steps=9"], None),
        (["optim.warmup_steps=36"], "the run has 9 for it and ends at 25% of the learning rate"),
        (
            ["optim.warmup_steps=6", "optim.freeze=['image.*']", "optim.unfreeze_after_steps=6"],
            "of what is unfrozen, takes 6 steps (optim.warmup_steps), but the run has 3 for",
        ),
    ],
)
def test_a_warm_up_that_does_not_end_is_told(
    more: list[str], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    make(1, None, *more).begin()
    assert (words or "") in caplog.text
    assert ("warm-up" in caplog.text) == (words is not None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logit_scale": 100.0}, "logit scale is at its limit"),
        ({"repeated_captions": 0.2}, "20% of a batch's captions"),
        ({"data_wait_fraction": 0.6}, "60% of the time is spent waiting for data"),
    ],
)
def test_each_warning_comes_once(
    change: dict[str, float], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    sanity = make()
    sanity.look(QUIET)
    assert not caplog.records
    for _ in range(3):
        sanity.look(QUIET | change)
    assert [words in record.message for record in caplog.records] == [True]


def test_a_first_loss_far_above_chance_is_told_and_a_later_one_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(step=50).look(QUIET | {"loss/contrastive": 9.0})
    assert not caplog.records
    make(step=1).look(QUIET | {"loss/contrastive": 9.0})
    assert "the first loss/contrastive is 9, where" in caplog.text


def test_waiting_while_the_workers_start_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    make().look(QUIET | {"data_wait_fraction": 0.9})
    assert not caplog.records


def test_repeated_captions_that_count_as_right_are_no_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    positives = "objectives=[{name='contrastive', positives=['caption']}]"
    make(1, None, positives).look(QUIET | {"repeated_captions": 0.9})
    assert not caplog.records


@pytest.mark.parametrize(
    ("more", "is_warned"),
    [
        (["model.pretrained=x", "optim.lr=5e-4"], True),
        (["model.pretrained=x", "optim.lr=1e-5"], False),
        (["model.pretrained=x", "optim.lr=1e-5", "optim.text.lr=1e-2"], True),
        (["model.pretrained=x", "optim.lr=5e-4", "optim.freeze=['logit_scale']"], True),
        (["model.pretrained=x", "optim.lr=5e-4", "optim.freeze=['*', '!*proj*']"], False),
        (["model.pretrained=x", "optim.image.lr=1e-5", "optim.text.lr=1e-5"], False),
        (["optim.lr=5e-4"], False),
    ],
)
def test_a_learning_rate_for_new_weights_is_told_when_fine_tuning(
    more: list[str], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make(1, None, *more).begin()
    assert ("a high rate for fine-tuning" in caplog.text) == is_warned
