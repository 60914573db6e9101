"""The composed step: its terms, its gradients over several processes, and what it leaves behind."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import test_training_albef_step as albef_step
import torch
from conftest import tiny_architecture
from ranks import (
    ALBEF,
    CASES,
    CONTRASTIVE,
    MATCHING,
    MOMENTUM,
    RUNS,
    Case,
    make_batch,
    make_run,
    measure,
)
from safetensors.torch import load_file
from torch import Tensor

import training.step
from clipserve import albef
from clipserve.config import Config, load_config
from clipserve.errors import TrainingError
from clipserve.images import ImageTransform
from clipserve.model import Model, ModelInfo
from training import forward, loop
from training.distributed import ALONE, World
from training.momentum import FeatureQueue, Twin
from training.networks import build
from training.order import Purpose
from training.precision import Precision
from training.recipe import Run
from training.state import State, step_generator
from training.step import train_step
from training.streaming import Batch

SCRIPT = Path(ranks.__file__)
Found = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ranks` wrote: what each case gave, by processes and rows."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        check=True,
        cwd=SCRIPT.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        timeout=600,
    )
    return folder


@pytest.fixture(scope="module")
def found(measured: Path) -> dict[tuple[int, int], Found]:
    return {(size, rows): torch.load(measured / f"{size}-{rows}.pt") for size, rows in RUNS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary and a teacher."""
    folder = tmp_path_factory.mktemp("furnished")
    ranks.furnish(folder)
    return folder


@pytest.mark.parametrize(("size", "rows"), [run for run in RUNS if run[0] > 1])
@pytest.mark.parametrize("name", CASES)
def test_processes_together_equal_one(
    found: dict[tuple[int, int], Found], name: str, size: int, rows: int
) -> None:
    """Every term, every report, the gradient of every parameter, and the queue."""
    expected, together = found[1, rows][name], found[size, rows][name]
    assert together.keys() == expected.keys()
    # Some gradients are 0 but for rounding: of a bias before batch norm, of an attention's key.
    noise = 1e-6 * max(v.abs().max().item() for k, v in expected.items() if "gradient" in k)
    # Three rows through batch norm twice, divided by their deviation once more: rounding grows.
    relative = 1e-4 if name == "Barlow Twins" else 1e-5
    for key, value in expected.items():
        largest = value.abs().max().item()
        assert torch.allclose(together[key], value, rtol=0, atol=relative * largest + noise), key


@pytest.mark.parametrize("name", CASES)
def test_every_weight_that_a_term_knows_gets_a_gradient(
    found: dict[tuple[int, int], Found], name: str
) -> None:
    measured = found[1, 5][name]
    idle = {key for key, value in measured.items() if "gradient" in key and not value.any()}
    unused = {  # heads that ALBEF has, and these objectives do not want
        "matching": {"token_head"},
        "matching without groups": {"token_head"},
        "masked language": {"matching_head"},
    }
    for part in unused.get(name, set()):
        idle = {key for key in idle if part not in key}
    assert not idle


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_weighted_sum_of_its_terms(
    found: dict[tuple[int, int], Found], name: str
) -> None:
    measured = found[1, 5][name]
    weighted = [
        o.get("weight", 1.0) * measured[f"loss/{o['name']}"].item() for o in CASES[name].objectives
    ]
    assert measured["loss"].item() == pytest.approx(sum(weighted), rel=1e-6)


def test_exchange_and_chunks_change_nothing(found: dict[tuple[int, int], Found]) -> None:
    whole = found[2, 5]["sigmoid"]["loss"].item()
    for name in ("sigmoid in chunks", "sigmoid in a ring"):
        assert found[2, 5][name]["loss"].item() == pytest.approx(whole, rel=1e-6)


def test_positives_change_the_loss(folder: Path) -> None:
    """Groups reach each objective that has them, by the columns that it names."""
    for kind, table in (
        (CONTRASTIVE, ranks.clip_table()),
        (ranks.MOMENTUM, ranks.clip_table()),
        ({"name": "sigmoid"}, ranks.siglip_table()),
    ):
        losses = {
            columns: one_loss(table, [{**kind, "positives": columns}], folder)
            for columns in ((), ("picture",), ("caption",), ("label",), ("picture", "label"))
        }
        assert len(set(losses.values())) == len(losses), kind["name"]


def one_loss(table: dict[str, Any], objectives: list[dict[str, Any]], folder: Path) -> float:
    return measure(Case(table, objectives), 5, ALONE, folder)["loss"].item()


def test_alone_negatives_of_the_process_are_those_of_the_batch(folder: Path) -> None:
    both = [
        measure(Case(ALBEF, [CONTRASTIVE, MATCHING | {"negatives": where}]), 5, ALONE, folder)
        for where in ("process", "batch")
    ]
    assert both[0].keys() == both[1].keys()
    for key, value in both[0].items():
        assert torch.equal(value, both[1][key]), key


@pytest.mark.parametrize("size", ranks.WITHIN_SIZES)
def test_negatives_of_the_process_come_from_its_own_rows(
    measured: Path, folder: Path, size: int
) -> None:
    """As in one process where any two rows of different processes are positives of each other.

    Of five rows on five processes none has a negative, and matching is skipped on all.
    """
    case = Case(ALBEF, [CONTRASTIVE, MATCHING | {"positives": ranks.EVERY}])
    # On two processes rows 0 and 1 are together, and share a number with each of 2, 3 and 4.
    two = [[0, 10, 20], [1, 11, 21], [0, 12, 21], [1, 10, 22], [2, 11, 20]]
    groups = torch.tensor(two if size == 2 else [[0, 0, 0]] * 5)
    run = make_run(case, ALONE, folder)
    expected = train_step(run, replace(make_batch(run, 5), groups=groups), [5])
    together = torch.load(measured / f"within-{size}.pt")
    assert expected["matching/skipped"] == (size == 5)
    for name in (name for name in expected if "matching" in name):
        assert together[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    for name, parameter in run.state.model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        largest = gradient.abs().max().item()
        found = together[f"gradient of {name}"]
        assert torch.allclose(found, gradient, rtol=0, atol=1e-5 * largest + 1e-6), name


@pytest.mark.parametrize("negatives", ["process", "batch"])
def test_matching_is_skipped_and_counted_when_nothing_is_a_negative(
    folder: Path, negatives: str
) -> None:
    run = make_run(Case(ALBEF, [CONTRASTIVE, MATCHING | {"negatives": negatives}]), ALONE, folder)
    batch = make_batch(run, 3)
    batch = replace(batch, groups=batch.groups * torch.tensor([0, 1, 1]))
    losses = train_step(run, batch, [3])
    assert losses["matching/skipped"] == 1
    assert losses["loss/matching"] == 0
    assert losses["loss"].item() == pytest.approx(0.7 * losses["loss/contrastive"].item())
    head = run.state.model.network.matching_head
    assert head.weight.grad is None or not head.weight.grad.any()
    assert all(p.isfinite().all() for p in run.parameters)


def test_matching_works_with_two_rows(folder: Path) -> None:
    measured = measure(Case(ALBEF, [CONTRASTIVE, MATCHING]), 2, ALONE, folder)
    assert measured["matching/skipped"] == 0
    assert 0.1 < measured["loss/matching"] < 5
    # six rows are judged: two pairs, and a negative of each picture and of each caption
    assert (measured["matching/accuracy"] * 6).item() == pytest.approx(
        round(measured["matching/accuracy"].item() * 6), abs=1e-5
    )
    assert measured["gradient of network.matching_head.weight"].any()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_the_steepest_temperature_stays_finite(name: str, precision: str, folder: Path) -> None:
    run = make_run(CASES[name], ALONE, folder, precision=precision)
    run.state.counters.loss_scale = 2.0**6  # so that these small networks' gradients fit into fp16
    with torch.no_grad():
        run.state.model.network.logit_scale.fill_(math.log(100))
    losses = train_step(run, make_batch(run, 5), [5])
    assert "overflow/skipped" not in losses
    assert all(value.isfinite() for value in losses.values()), losses
    named = [*run.state.model.named_parameters(), *run.networks.heads.named_parameters()]
    for key, parameter in named:
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
        assert parameter.isfinite().all(), key


def test_three_steps_of_the_loop_equal_albef_restated() -> None:
    """Terms, gradients, momentum copy and queue; see test_training_albef_step.py for the latter."""
    torch.manual_seed(0)
    network = albef.build(albef_step.TABLE).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2 * (parameter.ndim > 0))
    restated = albef_step.Restated(network)
    run = albef_run(network)
    for step in range(3):
        pictures = albef_step.KNOWN_PICTURES[step]
        batch, scripted = albef_batch(run, step, pictures)
        run.state.counters.step = step
        losses = train_step(run, batch, [albef_step.BATCH])
        expected = restated.step(scripted, albef_step.ALPHA * min(1, step / 2))
        terms = ("momentum_contrast", "matching", "masked_language")
        found = [losses[f"loss/{name}"].item() for name in terms]
        assert found == pytest.approx(list(expected.values()), abs=2e-6)
        named = zip(network.named_parameters(), restated.gradients, strict=True)
        for (name, parameter), gradient in named:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradient, atol=1e-5), name
    twin, queue = run.networks.twin, run.networks.queue
    assert twin is not None
    assert queue is not None
    kept, online = (dict(n.named_parameters()) for n in (restated.momentum, restated.online))
    for name, parameter in twin.network.named_parameters():
        # The loop's copy follows at the end of a step, ALBEF's at the beginning of the next one.
        followed = torch.lerp(kept[name], online[name], 1 - albef_step.MOMENTUM)
        assert torch.allclose(parameter, followed, atol=1e-6), name
    for number, slot in restated.queue.items():
        assert queue.groups[number, 0] == slot.picture
        assert torch.allclose(queue.image[number].double(), slot.image, atol=1e-5)
        assert torch.allclose(queue.text[number].double(), slot.text, atol=1e-5)


def albef_run(network: albef.Albef) -> Run:
    """The loop's things around the network of test_training_albef_step.py."""
    words: Any = SimpleNamespace(
        special_ids=albef_step.SPECIAL, mask_id=albef_step.MASK, vocab_size=30, context_length=7
    )
    model = Model(network, albef_step.TABLE, ImageTransform((16, 16)), words, ModelInfo())
    momentum = {
        "name": "momentum_contrast",
        "queue_size": albef_step.QUEUE,
        "momentum": albef_step.MOMENTUM,
        "alpha": albef_step.ALPHA,
        "positives": ["picture"],
    }
    config = Config.model_validate(
        {
            "out": "nowhere",
            "model": {"architecture": albef_step.TABLE},
            "data": {"train": "not read"},
            "objectives": [
                momentum,
                {"name": "matching", "positives": ["picture"]},
                {"name": "masked_language", "alpha": albef_step.ALPHA},
            ],
            "train": {"steps": 3, "seed": 2},
        }
    )
    epoch: Any = SimpleNamespace(order=SimpleNamespace(batches_per_epoch=2))
    return Run(
        config=config,
        state=State(model, torch.optim.SGD(model.parameters(), albef_step.LR), {}),
        stream=epoch,
        val=None,
        networks=build(config, model, ALONE),
        device=torch.device("cpu"),
        precision=Precision(),
        total_steps=3,
        world=ALONE,
    )


def albef_batch(run: Run, step: int, pictures: list[int]) -> tuple[Batch, albef_step.Batch]:
    """The same rows for the loop, and with the loop's own random numbers for the restatement."""
    rows, text = albef_step.BATCH, run.networks.model.context_length
    scripted = albef_step.draw_batch(step, pictures)
    random = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (rows, 3, 16, 16), generator=random, dtype=torch.uint8)
    groups = torch.tensor(pictures)[:, None].repeat(1, 3)
    draws = step_generator(torch.device("cpu"), Purpose.DRAWS, run.config.train.seed, step)
    scripted.pixels = run.networks.model.transform.normalize(pixels).double()
    scripted.picture_noise = torch.rand(rows, rows, generator=draws)
    scripted.text_noise = torch.rand(rows, rows, generator=draws)
    scripted.word_noise = torch.rand(rows, text, 3, generator=draws)
    return Batch(pixels, scripted.ids, list(range(rows)), 0, groups), scripted


ALBEF_SMALL = [
    "model.preset=albef_tiny",
    "model.architecture.embed_dim=16",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.patch_size=16",
    "model.architecture.vision_cfg.width=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.vision_cfg.head_width=16",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.heads=2",
    "model.architecture.text_cfg.layers=1",
    "model.architecture.text_cfg.vocab_size=100",
    "model.architecture.text_cfg.context_length=12",
    "model.architecture.fusion_cfg.layers=1",
    "objectives=[{name='momentum_contrast', queue_size=7, momentum=0.9},"
    " {name='matching'}, {name='masked_language'}]",
    "optim.warmup_steps=2",
    "data.batch_size=4",
    "data.workers=0",
    "train.precision=fp32",
    "train.compile=off",
    "train.log_every=1",
]


class Trace:
    """What the loop did, in order; the weights after each step, and what was pushed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.first: dict[str, Tensor] = {}
        self.weights: list[dict[str, Tensor]] = []
        self.pushed: list[list[Tensor]] = []
        for owner, name, event in (
            (Twin, "update", self._keep_weights),
            (forward, "_remember", lambda *_: None),
            (torch.Tensor, "backward", lambda *_: None),
            (torch.optim.AdamW, "step", lambda *_: None),
            (training.step, "clamp_logit_scale", lambda *_: None),
            (FeatureQueue, "push", self._keep_rows),
        ):
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), name, event))

    def _wrap(self, real: Any, name: str, note: Callable[..., None]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.events.append(name)
            note(*arguments)
            return real(*arguments, **named)

        return call

    def _keep_weights(self, twin: Twin, network: torch.nn.Module) -> None:
        if not self.first:
            self.first = {n: p.clone() for n, p in twin.state_dict().items()}
        self.weights.append({n: p.detach().clone() for n, p in network.state_dict().items()})

    def _keep_rows(self, queue: FeatureQueue, *rows: Tensor) -> None:
        self.pushed.append([part.clone() for part in rows])


def test_the_loop_owns_momentum_copy_and_queue(
    captioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "run", 5
    trace = Trace(monkeypatch)
    given = [f"out={out}", f"data.train={captioned(10)}", f"train.steps={steps}"]
    loop.train(load_config(None, [*given, *ALBEF_SMALL]))
    assert trace.events == steps * [
        "_remember",
        "backward",
        "step",
        "clamp_logit_scale",
        "update",
        "push",
    ]
    state = out / "latest" / "state"
    twin = load_file(state / "momentum.safetensors")
    for name, saved in twin.items():
        expected = trace.first[name].double()
        for weights in trace.weights:
            expected = 0.9 * expected + 0.1 * weights[name].double()
        assert torch.allclose(saved.double(), expected, atol=1e-6), name
    assert not torch.equal(twin["logit_scale"], trace.weights[-1]["logit_scale"])
    slots: dict[int, list[Tensor]] = {}
    rows = [row for batch in trace.pushed for row in zip(*batch, strict=True)]
    for number, row in enumerate(rows):
        slots[number % 7] = list(row)
    assert len(rows) == steps * 4
    queue = load_file(state / "queue.safetensors")
    for slot, (image, text, groups) in slots.items():
        assert torch.equal(queue["stored_image"][slot], image)
        assert torch.equal(queue["stored_text"][slot], text)
        assert torch.equal(queue["stored_groups"][slot], groups)
        assert image.norm().item() == pytest.approx(1, abs=1e-5)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = {"momentum_contrast", "matching", "masked_language"}
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss/{name}"] for name in wanted), rel=1e-5)
        assert {"matching/accuracy", "matching/skipped", "masked_language/accuracy"} <= set(line)


def test_clip_towers_take_a_momentum_copy_too(captioned: Any, tmp_path: Path) -> None:
    architecture = json.dumps(tiny_architecture()).replace(":", " =")
    given = [
        f"out={tmp_path / 'run'}",
        f"data.train={captioned(8)}",
        f"model.architecture={architecture}",
        "objectives=[{name='momentum_contrast', queue_size=5, alpha=0}]",
        "data.batch_size=4",
        "data.workers=0",
        "train.precision=fp32",
        "train.steps=3",
    ]
    result = loop.train(load_config(None, given))
    saved = load_file(result.best / "state" / "queue.safetensors")
    assert saved["stored_image"].norm(dim=1).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("place", ["look", "total"])
def test_a_rank_that_dies_in_a_step_leaves_the_state_of_the_step_before(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Case(ALBEF, [CONTRASTIVE, MOMENTUM]), ALONE, folder)

    def fail(*_: Any, **__: Any) -> None:
        raise TrainingError("another process of this run is gone")

    def content() -> dict[str, Tensor]:
        modules = {"model": run.state.model.network, **run.state.extras}
        named = {f"{m}.{n}": t for m in modules for n, t in modules[m].state_dict().items()}
        return {name: tensor.clone() for name, tensor in named.items()}

    train_step(run, make_batch(run, 4), [4])
    before = content()
    owner: Any = training.step if place == "look" else World
    monkeypatch.setattr(owner, place, fail)
    with pytest.raises(TrainingError):
        train_step(run, make_batch(run, 4), [4])
    after = content()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_skipped_matchings_are_counted_since_the_last_line(captioned: Any, tmp_path: Path) -> None:
    table = captioned(4)
    picture = (table.parent / "0.png").read_bytes()
    for i in range(4):
        (table.parent / f"{i}.png").write_bytes(picture)
    given = [f"out={tmp_path / 'run'}", f"data.train={table}", "train.steps=5", *ALBEF_SMALL]
    loop.train(load_config(None, [*given, "train.log_every=3"]))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["matching/skipped"] for line in lines] == [3, 2]
