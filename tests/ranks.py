"""A step of the training loop for each kind of objective, in one process and in several.

    python tests/ranks.py FOLDER [split CASE ...]

Writes FOLDER/SIZE-COUNT.pt: what a batch of COUNT rows, spread over SIZE processes, gave in each of
CASES, or in some with weights that are split over the processes. These are forked from this one,
which has imported everything.

Weights are far from their small first values, so that what differs is an error and not rounding.
"""

import multiprocessing
import os
import socket
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from albefs import albef_table, vocabulary
from cocas import coca_architecture
from conftest import tiny_architecture
from torch import Tensor

from clipserve import checkpoint
from clipserve.config import Config
from clipserve.embed import prepare
from clipserve.model import Model, ModelInfo, assemble, create
from clipserve.text import Tokenizer
from clipserve.towers import build_network
from training.distributed import World, connect, is_split
from training.forward import Networks, modules_of
from training.fsdp import split
from training.networks import build, plan
from training.precision import Precision
from training.recipe import Run
from training.state import Counters, State
from training.step import train_step
from training.streaming import Batch

RUNS = [(1, 5), (2, 5), (1, 3), (4, 3)]
"""processes, and rows of the batch; of three rows one of four processes has none"""
IN_PARTS = ", in micro-batches"
"""what is added to the name of a case whose weights are split"""
CAPTIONS = ["a red cat on a mat", "a dog", "the blue bird", "a cat", "two dogs"]
GROUPS = [[10, 20, 30], [11, 21, 31], [11, 22, 30], [12, 20, 32], [13, 23, 33]]
"""rows 1 and 2 have one picture, 0 and 3 one caption, 0 and 2 one label"""
QUEUED = [[14, 24, 34], [11, 25, 35], [15, 20, 36]]
"""one queued pair has the picture of rows 1 and 2, another the caption of rows 0 and 3"""
CONTEXT = 12
TEACHER = "teacher"


def clip_table(**more: Any) -> dict[str, Any]:
    text = {"context_length": CONTEXT, "vocab_size": 200, "width": 16, "heads": 2, "layers": 1}
    return tiny_architecture() | {"text_cfg": text} | more


def siglip_table() -> dict[str, Any]:
    return clip_table(init_logit_scale=1.5, init_logit_bias=-2.0)


def coca_table() -> dict[str, Any]:
    table = coca_architecture()
    for part in ("text_cfg", "multimodal_cfg"):
        table[part] |= {"context_length": CONTEXT, "vocab_size": 200}
    return table


@dataclass(frozen=True)
class Case:
    """An architecture, and what it is trained on."""

    table: dict[str, Any]
    objectives: list[dict[str, Any]]
    dtype: torch.dtype = torch.float32
    """of towers"""


CONTRASTIVE = {"name": "contrastive", "weight": 0.7}
MOMENTUM = {"name": "momentum_contrast", "queue_size": 7, "momentum": 0.9, "alpha": 0.6}
MATCHING = {"name": "matching", "negatives": "batch", "weight": 1.3}
LANGUAGE = {"name": "masked_language", "probability": 0.5, "alpha": 0.4}
HEAD = {"hidden_size": 8, "output_size": 6}
EVERY = ["picture", "caption", "label"]
ALBEF = albef_table(dropout=0.0)

CASES = {
    "contrastive": Case(clip_table(), [CONTRASTIVE]),
    "contrastive with positives, in tiles": Case(
        clip_table(), [CONTRASTIVE | {"positives": EVERY, "tile_size": 2}]
    ),
    "sigmoid": Case(siglip_table(), [{"name": "sigmoid"}]),
    "sigmoid in chunks": Case(siglip_table(), [{"name": "sigmoid", "chunk_size": 2}]),
    "sigmoid in a ring": Case(siglip_table(), [{"name": "sigmoid", "exchange": "ring"}]),
    "sigmoid with positives, in chunks, in a ring": Case(
        siglip_table(),
        [{"name": "sigmoid", "positives": EVERY, "chunk_size": 1, "exchange": "ring"}],
    ),
    "momentum contrast of CLIP": Case(clip_table(), [MOMENTUM]),
    "matching": Case(ALBEF, [CONTRASTIVE, MATCHING]),
    "matching without groups": Case(ALBEF, [CONTRASTIVE, MATCHING | {"positives": []}]),
    "masked language": Case(ALBEF, [CONTRASTIVE, LANGUAGE | {"alpha": 0}]),
    "ALBEF": Case(ALBEF, [MOMENTUM, MATCHING, LANGUAGE]),
    "distillation": Case(clip_table(), [{"name": "distill", "teacher": TEACHER, "affinity": 0.5}]),
    "SLIP": Case(clip_table(), [CONTRASTIVE, HEAD | {"name": "simclr"}]),
    "Barlow Twins": Case(clip_table(), [CONTRASTIVE, HEAD | {"name": "barlow_twins"}]),
    "VICReg": Case(clip_table(), [CONTRASTIVE, HEAD | {"name": "vicreg"}]),
    "SimSiam": Case(clip_table(), [CONTRASTIVE, HEAD | {"name": "simsiam"}]),
    "CoCa": Case(coca_table(), [CONTRASTIVE, {"name": "captioning", "weight": 2.0}]),
}
WITHIN = Case(ALBEF, [CONTRASTIVE, MATCHING | {"negatives": "process", "positives": []}])
"""whose answer depends on the processes: which rows are together in one"""
WITHIN_SIZES = (2, 5)


def furnish(folder: Path) -> None:
    """What the cases read: a vocabulary, and a teacher of other sizes than the student."""
    vocabulary(folder / "vocabulary")
    table = tiny_architecture() | {"embed_dim": 24}
    table["vision_cfg"] |= {"image_size": 48}
    torch.manual_seed(1)
    checkpoint.save(create(table), folder / TEACHER, name=TEACHER, objective=("contrastive",))


def measure(
    case: Case,
    count: int,
    world: World,
    folder: Path,
    *,
    precision: str = "fp32",
    splits: bool = False,
    **settings: Any,
) -> dict[str, Tensor]:
    """A step's loss, its terms and reports, every gradient, and the queue, by name."""
    run = make_run(case, world, folder, precision, splits, **settings)
    ranks = [World(rank, world.size) for rank in range(world.size)]
    counts = [len(range(count)[rank.stripe(count)]) for rank in ranks]
    losses = train_step(run, make_batch(run, count), counts)
    trained = [*run.state.model.named_parameters(), *run.networks.heads.named_parameters()]
    found = losses | {
        f"gradient of {name}": whole(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in trained
    }
    if run.networks.queue is not None:
        check_alike(run.networks.queue, world)
        found |= {f"queue of {name}": rows for name, rows in run.networks.queue.named_buffers()}
    return found


def check_alike(module: torch.nn.Module, world: World) -> None:
    """To the last bit, whichever rank has it."""
    digest = zlib.crc32(b"".join(rows.numpy().tobytes() for rows in module.buffers()))
    assert len(set(world.exchange(digest)[:, 0].tolist())) == 1, "ranks have different queues"


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if is_split(tensor) else tensor
    return found


def make_run(
    case: Case,
    world: World,
    folder: Path,
    precision: str = "fp32",
    splits: bool = False,
    **settings: Any,
) -> Run:
    """What the loop works on, but for data; `settings` are those of `train`."""
    objectives = [
        o | {"teacher": str(folder / TEACHER)} if o["name"] == "distill" else o
        for o in case.objectives
    ]
    config = Config.model_validate(
        {
            "out": str(folder),
            "model": {"architecture": case.table},
            "data": {"train": "not read", "label_field": "label"},
            "objectives": objectives,
            "train": {"steps": 9} | settings,
        }
    )
    torch.manual_seed(0)
    model = make_model(case.table, folder)
    networks = plan(config, build(config, model, world), compile_towers=False)
    be_precise(networks, case.dtype)
    if networks.teacher is not None:  # in bf16 a row would depend a little on those beside it
        exact = prepare(checkpoint.load_for_training(folder / TEACHER), "cpu", "fp32")
        networks = replace(networks, teacher=exact)
    shake(networks)
    if networks.queue is not None:
        image, text = F.normalize(torch.randn(2, len(QUEUED), model.embed_dim), dim=2)
        networks.queue.push(image, text, torch.tensor(QUEUED))
    if splits:
        for root in (networks.model, networks.momentum):
            if root is not None:
                split(root, world, is_trained=root is model)
    order: Any = SimpleNamespace(order=SimpleNamespace(batches_per_epoch=2))
    parameters = [*model.parameters(), *networks.heads.parameters()]
    return Run(
        config=config,
        state=State(
            model,
            torch.optim.SGD(parameters, lr=0.1),
            {},
            modules_of(networks),
            counters=Counters(step=1),  # in the middle of alpha's ramp
        ),
        stream=order,
        val=None,
        networks=networks,
        device=torch.device("cpu"),
        precision=Precision(precision),
        total_steps=9,
        world=world,
    )


def make_model(table: dict[str, Any], folder: Path) -> Model:
    """All have the small vocabulary, also CLIP, to whom it is all the same."""
    text = table["text_cfg"] | {
        "tokenizer": "wordpiece",
        "tokenizer_path": str(folder / "vocabulary"),
    }
    return assemble(build_network(table), table, None, Tokenizer(text), ModelInfo()).train()


def be_precise(networks: Networks, dtype: torch.dtype) -> None:
    """Vectors are float32 all the same, and so are the heads that see only these."""
    heads = [head for name, head in networks.heads.items() if not name.startswith("distill")]
    for module in (networks.model, networks.twin, *heads):
        if module is not None:
            module.to(dtype)


@torch.no_grad()
def shake(networks: Networks) -> None:
    """First weights are small, and the momentum copy's are the model's own."""
    for module in (networks.model, networks.twin, networks.heads):
        for parameter in module.parameters() if module is not None else ():
            parameter.add_(torch.randn(parameter.shape) * 0.1 * (parameter.ndim > 0))


def make_batch(run: Run, count: int) -> Batch:
    """This rank's stripe of the same rows for everyone, its texts cut to its own longest."""
    model, own = run.networks.model, run.world.stripe(count)
    random = torch.Generator().manual_seed(3)
    size = (3, max(count, 5), 3, 32, 32)
    pixels = torch.randint(0, 256, size, generator=random, dtype=torch.uint8)
    captions = [CAPTIONS[row % 5] for row in range(count)][own]
    groups = GROUPS + [[50 + row, 60 + row, 70 + row] for row in range(5, count)]
    tokens = model.tokenizer(captions)
    return Batch(
        pixels[0, :count][own],
        tokens.cut() if model.can_cut_text else tokens.ids,
        list(range(count))[own],
        0,
        torch.tensor(groups)[:count][own],
        captions,
        pixels[1:, :count][:, own] if captions else None,
    )


def measure_all(
    names: list[str], count: int, folder: Path, world: World
) -> dict[str, dict[str, Tensor]]:
    splits = bool(names) and world.size > 1
    found = {
        name: measure(CASES[name], count, world, folder, splits=splits) for name in names or CASES
    }
    for name in names if splits else ():
        case = CASES[name]
        found[name + IN_PARTS] = measure(case, count, world, folder, splits=True, accum_freq=4)
    return found


def be_rank(rank: int, size: int, port: int, work: Callable[[World], object], result: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with connect() as world:
        found = work(world)
    if world.is_main:
        torch.save(found, result)


def spread(size: int, work: Callable[[World], object], result: Path) -> None:
    """`work` in each of `size` processes, forked from this one; what it gave the first one."""
    context = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = [
        context.Process(target=be_rank, args=(rank, size, port, work, result))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if failed := [process.exitcode for process in ranks if process.exitcode]:
        sys.exit(f"{size} processes ended with {failed}")


def main(folder: Path, names: list[str]) -> None:
    furnish(folder)
    for name in names or CASES:
        make_run(CASES[name], World(), folder)  # for what it imports
    if names:
        import torch._dynamo.convert_frame
        import torch.distributed.fsdp  # noqa: F401
    for size in () if names else WITHIN_SIZES:
        spread(size, lambda world: measure(WITHIN, 5, world, folder), folder / f"within-{size}.pt")
    for size, count in RUNS:
        work = partial(measure_all, names, count, folder)
        spread(size, work, folder / f"{size}-{count}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])
