"""fp16 learns what fp32 does: a loss scale loses nothing, and an overflow costs one step."""

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from small_runs import SMALL
from torch import Tensor

from clipserve.config import load_config
from clipserve.errors import ConfigError
from training.distributed import ALONE, World
from training.loop import train
from training.precision import LossScale, Precision, choose
from training.recipe import Run
from training.shards import PackOptions, pack
from training.state import Counters
from training.step import train_step

CPU = torch.device("cpu")
ROWS = 6
QUEUED = "momentum contrast of CLIP"
FITTING = 2.0**8
"""a loss scale at which the small networks of the cases do not overflow"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("precision")
    ranks.furnish(made)
    return made


def step(run: Run) -> dict[str, Tensor]:
    return train_step(run, ranks.make_batch(run, ROWS), [ROWS])


def gradients(run: Run) -> Tensor:
    return torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


@pytest.mark.parametrize("name", ["contrastive", QUEUED, "ALBEF", "CoCa", "SLIP"])
def test_fp16_has_the_gradients_of_fp32(name: str, folder: Path) -> None:
    exact, half = (
        ranks.make_run(ranks.CASES[name], ALONE, folder, precision, spike=0)
        for precision in ("fp32", "fp16")
    )
    half.state.counters.loss_scale = FITTING
    losses, expected = step(half), step(exact)
    assert "overflow/skipped" not in losses
    assert losses["loss"] == pytest.approx(expected["loss"].item(), rel=0.02)
    found, wanted = gradients(half), gradients(exact)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99
    assert found.norm() == pytest.approx(wanted.norm().item(), rel=0.05)


def test_the_scale_does_not_show_in_gradients_and_norm(folder: Path) -> None:
    runs = [ranks.make_run(ranks.CASES["contrastive"], ALONE, folder, "fp16") for _ in range(2)]
    for run, scale in zip(runs, (FITTING, FITTING / 16), strict=True):
        run.state.counters.loss_scale = scale
    norms = [step(run)["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1].item(), rel=1e-3)
    assert torch.allclose(gradients(runs[0]), gradients(runs[1]), rtol=1e-2, atol=1e-5)


def test_without_a_scale_small_gradients_are_lost_and_with_it_kept(folder: Path) -> None:
    case = ranks.CASES["contrastive"]
    weak = ranks.Case(case.table, [case.objectives[0] | {"weight": 1e-6}])
    lost, kept, exact = (
        ranks.make_run(weak, ALONE, folder, precision) for precision in ("fp16", "fp16", "fp32")
    )
    lost.state.counters.loss_scale = 1.0
    for run in (lost, kept, exact):
        step(run)
    found, wanted = gradients(kept), gradients(exact)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99
    assert torch.cosine_similarity(gradients(lost), wanted, dim=0) < 0.9


def test_an_overflow_changes_nothing_but_the_scale(folder: Path) -> None:
    run = ranks.make_run(ranks.CASES[QUEUED], ALONE, folder, "fp16")
    assert run.networks.queue is not None
    counters = run.state.counters
    counters.loss_scale = 2.0**40  # of no use: each gradient is infinite
    kept = {**run.state.model.network.state_dict(), **run.networks.queue.state_dict()}
    before = {name: value.clone() for name, value in kept.items()}
    losses = step(run)
    assert losses["overflow/skipped"] == 1
    assert "grad_norm" not in losses
    assert counters.loss_scale == 2.0**39
    assert counters.skipped == 0
    assert counters.losses == []
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_a_step_after_overflows_is_taken(folder: Path) -> None:
    run = ranks.make_run(ranks.CASES["contrastive"], ALONE, folder, "fp16")
    run.state.counters.loss_scale = 2.0**40
    taken = [("overflow/skipped" not in step(run)) for _ in range(40)]
    assert not taken[0]
    assert taken[-1]
    assert taken == sorted(taken)


def test_the_scale_falls_rises_and_keeps_to_its_limits() -> None:
    counters = Counters(loss_scale=4.0)
    scale = LossScale(counters, is_on=True)
    loss, sound, broken = torch.tensor(1.0), torch.tensor(3.0), torch.tensor(torch.inf)
    assert scale.overflows(broken, loss)
    assert scale.overflows(torch.tensor(torch.nan), loss)
    assert counters.loss_scale == 1
    assert not scale.overflows(broken, loss)  # no scale helps: the guard has to see it
    counters.steps_at_scale = 1998
    assert not scale.overflows(sound, loss)
    assert counters.loss_scale == 1
    assert not scale.overflows(sound, loss)
    assert (counters.loss_scale, counters.steps_at_scale) == (2, 0)
    counters.loss_scale, counters.steps_at_scale = 2.0**24, 1999
    assert not scale.overflows(sound, loss)
    assert counters.loss_scale == 2.0**24


def test_a_broken_loss_is_no_overflow() -> None:
    counters = Counters()
    assert not LossScale(counters, is_on=True).overflows(torch.tensor(1.0), torch.tensor(torch.nan))
    assert counters.loss_scale == 2.0**16


def test_without_fp16_nothing_is_scaled_or_counted() -> None:
    counters = Counters()
    scale = LossScale(counters, is_on=False)
    assert scale.factor == 1
    assert not scale.overflows(torch.tensor(torch.inf), torch.tensor(1.0))
    assert counters == Counters()


def test_a_continuation_has_the_scale_of_before(captioned: Any, tmp_path: Path) -> None:
    pack(captioned(40), tmp_path / "shards", PackOptions(samples_per_shard=20))

    def run(out: str, steps: int) -> list[Any]:
        sets = [f"out={tmp_path / out}", f"data.train={tmp_path / 'shards'}", *SMALL]
        more = [f"train.steps={steps}", "optim.schedule=constant", "train.precision=fp16"]
        train(load_config(None, [*sets, *more]))
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = run("whole", 6)
    run("parts", 3)
    state = tmp_path / "parts" / "latest" / "state" / "state.json"
    counters = json.loads(state.read_text())["counters"]
    assert counters["loss_scale"] < 2.0**16  # it fell, and has to begin there
    assert run("parts", 6) == whole


def test_auto_is_what_the_device_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for computes, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("training.precision.computes_bf16", lambda _, it=computes: it)
        assert choose("auto", CPU) == Precision(name)
    assert choose("fp32", CPU).autocast is None


def test_all_ranks_take_what_rank_0_finds_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.precision.computes_bf16", lambda _: True)
    monkeypatch.setattr(World, "tell", lambda self, own: "fp32")
    assert choose("auto", CPU, World(1, 2)) == Precision("fp32")


@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_a_slow_precision_is_named(
    wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("training.precision.computes_bf16", lambda _: False)
    assert choose(wanted, CPU) == Precision(wanted)
    assert f"train.precision = {wanted}" in caplog.text


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="tf32 needs a GPU .* not this cpu"):
        choose("tf32", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_fp32_and_tf32_are_what_they_say() -> None:
    gpu = torch.device("cuda")
    random = torch.Generator(gpu).manual_seed(0)
    left, right = torch.randn(2, 512, 512, device=gpu, generator=random)
    exact = left.double() @ right.double()
    errors = {}
    for wanted in ("fp32", "tf32"):
        assert choose(wanted, gpu) == Precision(wanted)
        errors[wanted] = (left @ right - exact).abs().max().item()
    choose("fp32", gpu)
    assert errors["fp32"] < 1e-3 < errors["tf32"]
