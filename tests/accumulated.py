"""A step in any number of micro-batches, with dropout and patch dropout, in one process or several.

    python tests/accumulated.py FOLDER SIZE

Writes FOLDER/found.pt: by case and number of micro-batches what a step over SIZE processes gave.
Four processes get three rows, so that one has none.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from albefs import albef_table, open_clip_vision, timm_vision
from ranks import (
    CONTRASTIVE,
    HEAD,
    LANGUAGE,
    MATCHING,
    MOMENTUM,
    TEACHER,
    Case,
    clip_table,
    coca_table,
    furnish,
    make_batch,
    make_run,
    siglip_table,
    spread,
)
from torch import Tensor

from training.distributed import ALONE, World
from training.state import seed_step
from training.step import train_step

ROWS = 16
FREQUENCIES = (1, 2, 4, 8)
Found = dict[str, dict[int, dict[str, Tensor]]]


def dropping(table: dict[str, Any]) -> dict[str, Any]:
    """The same with patch dropout."""
    return table | {"vision_cfg": table["vision_cfg"] | {"patch_dropout": 0.5}}


def exact(table: dict[str, Any], *objectives: dict[str, Any]) -> Case:
    return Case(table, list(objectives), torch.float64)


ALBEF = albef_table(open_clip_vision(patch_dropout=0.5), dropout=0.2)
TIMM = albef_table(timm_vision(patch_dropout=0.5, timm_drop_path=0.3, layers=2), dropout=0.2)
DISTILL = {"name": "distill", "teacher": TEACHER, "affinity": 0.5}
CASES = {
    "contrastive": exact(dropping(clip_table()), CONTRASTIVE),
    "momentum contrast": exact(dropping(clip_table()), MOMENTUM),
    "sigmoid": exact(dropping(siglip_table()), {"name": "sigmoid"}),
    "distillation": exact(dropping(clip_table()), DISTILL),
    "SLIP": exact(dropping(clip_table()), CONTRASTIVE, HEAD | {"name": "simclr"}),
    "SimSiam": exact(dropping(clip_table()), CONTRASTIVE, HEAD | {"name": "simsiam"}),
    "CoCa": exact(dropping(coca_table()), CONTRASTIVE, {"name": "captioning", "weight": 2.0}),
    "ALBEF": exact(ALBEF, MOMENTUM, MATCHING, LANGUAGE),
    "ALBEF with timm's tower": exact(TIMM, MOMENTUM, MATCHING, LANGUAGE),
}


SOME = ["SLIP", "CoCa", "ALBEF"]
"""that go through more than the towers"""


def plain(case: Case) -> Case:
    """In float32."""
    return Case(case.table, case.objectives)


def measure(
    case: Case,
    world: World,
    folder: Path,
    rows: int,
    *,
    draw: int = 1,
    precision: str = "fp32",
    **settings: Any,
) -> dict[str, Tensor]:
    """Losses, reports, gradients, the weights after the step, and the queue, by name."""
    run = make_run(case, world, folder, precision, **settings)
    ranks = [World(rank, world.size) for rank in range(world.size)]
    counts = [len(range(rows)[rank.stripe(rows)]) for rank in ranks]
    seed_step(0, draw, world.rank)
    found = train_step(run, make_batch(run, rows), counts)
    heads = run.networks.heads.named_parameters()
    for name, weight in [*run.state.model.named_parameters(), *heads]:
        found[f"weight {name}"] = weight.detach()
        if weight.grad is not None:
            found[f"gradient of {name}"] = weight.grad
    if run.networks.queue is not None:
        found |= {f"queue of {name}": rows for name, rows in run.networks.queue.named_buffers()}
    return found


def measure_all(folder: Path, world: World) -> Found:
    names, rows, numbers = (SOME, 3, (1, 2)) if world.size == 4 else (CASES, ROWS, FREQUENCIES)
    return {
        name: {
            number: measure(CASES[name], world, folder, rows, accum_freq=number)
            for number in numbers
        }
        for name in names
    }


def main(folder: Path, size: int) -> None:
    folder.mkdir()
    furnish(folder)
    for case in CASES.values():
        make_run(case, ALONE, folder)  # for what it imports
    spread(size, partial(measure_all, folder), folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
