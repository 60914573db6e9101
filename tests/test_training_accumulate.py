"""Micro-batches with cached features: what the whole batch gives, random layers included."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accumulated
import pytest
import ranks
import torch
import torch.nn.functional as F
from accumulated import CASES, FREQUENCIES, ROWS, SOME, Found, measure
from safetensors.torch import load_file
from small_runs import SMALL
from torch import Tensor, nn

from clipserve.config import load_config
from clipserve.errors import ConfigError, TrainingError
from training.accumulate import MicroBatches, check_separable
from training.distributed import ALONE
from training.loop import train
from training.shards import PackOptions, pack
from training.step import train_step

SCRIPT = Path(accumulated.__file__)
CHECKPOINTED = ["contrastive", "CoCa", "ALBEF", "ALBEF with timm's tower"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary and a teacher."""
    folder = tmp_path_factory.mktemp("furnished")
    ranks.furnish(folder)
    return folder


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """By number of processes: what each case gave in each number of micro-batches."""
    folder, kept = tmp_path_factory.mktemp("spread"), dict[int, Found]()

    def run(size: int) -> Found:
        if size not in kept:
            subprocess.run(
                [sys.executable, str(SCRIPT), str(folder / str(size)), str(size)],
                check=True,
                cwd=SCRIPT.parent.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
                timeout=600,
            )
            kept[size] = torch.load(folder / str(size) / "found.pt")
        return kept[size]

    return run


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=atol), name


# ---- the same step


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(name: str, folder: Path) -> None:
    """Losses, all gradients, the next weights and the queue, with dropout and patch dropout."""
    whole = measure(CASES[name], ALONE, folder, ROWS)
    for number in FREQUENCIES[1:]:
        assert_same(measure(CASES[name], ALONE, folder, ROWS, accum_freq=number), whole)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_in_micro_batches_are_two_processes(
    name: str, spread: Callable[[int], Found]
) -> None:
    found = spread(2)[name]
    assert sorted(found) == list(FREQUENCIES)
    for number in FREQUENCIES[1:]:
        assert_same(found[number], found[1])


@pytest.mark.parametrize("name", SOME)
def test_a_process_without_rows_takes_part(name: str, spread: Callable[[int], Found]) -> None:
    """Three rows over four processes."""
    found = spread(4)[name]
    assert_same(found[2], found[1])


@pytest.mark.parametrize("name", CASES)
def test_the_cases_depend_on_what_is_drawn(name: str, folder: Path) -> None:
    first, second = (measure(CASES[name], ALONE, folder, 5, draw=draw)["loss"] for draw in (1, 2))
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize("rows", [5, 3])
def test_micro_batches_need_not_divide_the_rows_nor_be_fewer(rows: int, folder: Path) -> None:
    """As an epoch's short last batch has them."""
    for name in SOME:
        whole = measure(CASES[name], ALONE, folder, rows)
        for number in (2, 64):
            assert_same(measure(CASES[name], ALONE, folder, rows, accum_freq=number), whole)


@pytest.mark.parametrize("name", SOME)
def test_bf16_loses_no_gradient(name: str, folder: Path) -> None:
    """Autocast keeps weights that were cast without a graph, and would use them with one."""
    whole, parts = (
        measure(
            accumulated.plain(CASES[name]), ALONE, folder, 8, precision="bf16", accum_freq=number
        )
        for number in (1, 4)
    )
    gradients = [name for name in whole if name.startswith("gradient")]
    assert {name for name in parts if name.startswith("gradient")} == set(gradients)
    for name in gradients:
        assert (parts[name] - whole[name]).norm() <= 0.05 * whole[name].norm() + 1e-6, name


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_activations_change_nothing(name: str, folder: Path) -> None:
    """Alone and within micro-batches, where layers draw once more in backward."""
    whole = measure(CASES[name], ALONE, folder, 6)
    for number in (1, 3):
        found = measure(CASES[name], ALONE, folder, 6, accum_freq=number, grad_checkpointing=True)
        assert_same(found, whole)


def test_a_run_in_micro_batches_continues_exactly(captioned: Any, tmp_path: Path) -> None:
    pack(captioned(22), tmp_path / "shards", PackOptions(samples_per_shard=8))

    def run(out: str, steps: int) -> dict[str, Tensor]:
        settings = [
            f"out={tmp_path / out}",
            f"data.train={tmp_path / 'shards'}",
            *SMALL,
            "model.architecture.vision_cfg.patch_dropout=0.5",
            "optim.schedule=constant",
            "data.last_batch=keep",
            "train.accum_freq=3",
            f"train.steps={steps}",
        ]
        train(load_config(None, settings))
        return load_file(tmp_path / out / "latest" / "open_clip_model.safetensors")

    whole = run("whole", 4)
    run("resumed", 2)
    resumed = run("resumed", 4)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


# ---- memory


class Live:
    """The bytes that graphs hold, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(tensor, self)


class _Held:
    def __init__(self, tensor: Tensor, live: Live) -> None:
        self.tensor, self._live, self._size = tensor, live, tensor.nbytes
        live.now += self._size
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self._live.now -= self._size


def most_held(name: str, folder: Path, **settings: Any) -> int:
    run = ranks.make_run(CASES[name], ALONE, folder, **settings)
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        train_step(run, ranks.make_batch(run, 32), [32])
    return live.most


@pytest.mark.parametrize("name", ["contrastive", "SLIP", "CoCa", "ALBEF"])
def test_no_more_than_a_micro_batchs_graph_is_held(name: str, folder: Path) -> None:
    whole, parts = (most_held(name, folder, accum_freq=number) for number in (1, 8))
    assert 0.05 * whole < parts < 0.4 * whole


def test_checkpointing_holds_less(folder: Path) -> None:
    whole, less = (
        most_held("ALBEF", folder, grad_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert less < 0.7 * whole


# ---- draws

LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout of another layout": lambda x: F.dropout(x.transpose(1, 2), 0.5).transpose(1, 2),
    "dropout of every channel": lambda x: F.dropout1d(x, 0.5),
    "dropout after heads were put beside rows": lambda x: F.dropout(x.flatten(0, 1), 0.5).view_as(
        x
    ),
    "normal numbers": lambda x: x + torch.randn(len(x), 4, 1),
    "uniform numbers like it": lambda x: x + torch.empty_like(x).uniform_(),
    "depth": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "exponential": lambda x: F.gumbel_softmax(x),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.5)[:, 0],
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_gets_the_numbers_that_it_has_in_the_whole_batch(name: str) -> None:
    x = torch.randn(7, 4, 6)

    def layer(rows: slice, x: Tensor) -> tuple[Tensor, ...]:
        return (LAYERS[name](x[rows]),)

    found = []
    for parts in (MicroBatches(), MicroBatches(3, draws=True)):
        torch.manual_seed(5)
        found.append(parts(layer, 7, x)[0])
        found.append(torch.rand(3))  # what comes later draws the same too
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand(5),  # not of rows
        lambda x: x[torch.randperm(len(x))],
        lambda x: torch.bernoulli(x.sigmoid()),
    ],
)
def test_draws_that_are_not_of_rows_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TrainingError, match=r"use train\.accum_freq = 1"):
        MicroBatches(2, draws=True)(lambda rows, x: (draw(x[rows]),), 4, torch.zeros(4, 5))


def test_only_networks_that_draw_are_watched(folder: Path) -> None:
    """The others may be compiled, and use any kernel."""
    draws = {
        name: ranks.make_run(case, ALONE, folder, accum_freq=2).networks.parts.draws
        for name, case in {"with": CASES["ALBEF"], "without": ranks.CASES["ALBEF"]}.items()
    }
    assert draws == {"with": True, "without": False}


def test_compiled_layers_that_draw_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set train\.compile = off"):
        ranks.make_run(CASES["contrastive"], ALONE, folder, accum_freq=2, compile="on")


# ---- what cannot be taken apart


def test_batch_norm_of_the_whole_batch_is_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"1 is batch norm.*train\.accum_freq = 1"):
        check_separable(network, thaws=False)
    check_separable(network.eval(), thaws=False)  # frozen: by what it remembers
    with pytest.raises(ConfigError, match="batch norm"):
        check_separable(network, thaws=True)


def test_a_run_with_batch_norm_is_refused(captioned: Any, tmp_path: Path) -> None:
    settings = [
        f"out={tmp_path / 'run'}",
        f"data.train={captioned(8)}",
        *SMALL,
        "model.architecture.vision_cfg={image_size=32, width=8, layers=[1, 1, 1, 1]}",
        "train.steps=1",
        "train.accum_freq=2",
    ]
    with pytest.raises(ConfigError, match=r"bn1 is batch norm"):
        train(load_config(None, settings))
