"""Ranks that pass rows round or gather them have, together, the losses of one process."""

import contextlib
import multiprocessing
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from clipserve.errors import TrainingError
from training.distributed import ALONE, World
from training.objectives.contrastive import contrastive_loss
from training.objectives.sigmoid import sigmoid_loss, sigmoid_ring_loss
from training.ring import ring

# Rows of each rank: uneven, and one rank of four has none.
COUNTS = {2: [5, 3], 4: [3, 0, 4, 1]}
NAMES = ("image", "text", "scale", "bias")
Loss = Callable[[dict[str, Tensor], list[int], World, Tensor | None], Tensor]


def gathered(
    loss: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    counts: list[int],
    world: World,
    groups: Tensor | None,
    **options: Any,
) -> Tensor:
    """The share of a rank whose own rows are among all ranks' gathered ones."""
    everyone = [world.gather(inputs[name], counts) for name in ("image", "text")]
    scalars = [inputs["scale"]] if loss is contrastive_loss else [inputs["scale"], inputs["bias"]]
    return loss(*everyone, *scalars, own=place(counts, world), groups=groups, **options)


def passed_round(
    inputs: dict[str, Tensor],
    counts: list[int],
    world: World,
    groups: Tensor | None,
    chunk_size: int | None = None,
) -> Tensor:
    return sigmoid_ring_loss(
        inputs["image"],
        ring(inputs["text"], counts, world),
        inputs["scale"],
        inputs["bias"],
        own=place(counts, world),
        total=sum(counts),
        groups=groups,
        chunk_size=chunk_size,
    )


LOSSES: dict[str, Loss] = {
    "contrastive dense": partial(gathered, contrastive_loss),
    "contrastive tiled": partial(gathered, contrastive_loss, tile_size=3),
    "sigmoid gathered": partial(gathered, sigmoid_loss),
    "sigmoid gathered, chunked": partial(gathered, sigmoid_loss, chunk_size=3),
    "sigmoid ring": passed_round,
    "sigmoid ring, chunked": partial(passed_round, chunk_size=2),
}


def place(counts: list[int], world: World) -> slice:
    first = sum(counts[: world.rank])
    return slice(first, first + counts[world.rank])


def whole_batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows = (F.normalize(torch.randn(8, 5, generator=random), dim=1) for _ in "it")
    return dict(zip(NAMES, (*rows, torch.tensor(14.3), torch.tensor(-3.0)), strict=True))


def groups_of(kind: str) -> Tensor | None:
    """Ids by which rows of different ranks are positives, or None."""
    rows = torch.arange(8)
    return torch.stack([rows % 3, 100 + rows // 2], dim=1) if kind == "grouped" else None


def measure(kind: str, name: str, counts: list[int], world: World) -> dict[str, Tensor]:
    """A rank's value and gradients of one loss, by name."""
    rows, whole = place(counts, world), whole_batch()
    inputs = {n: (t[rows] if t.dim() else t).clone().requires_grad_() for n, t in whole.items()}
    loss = LOSSES[name](inputs, counts, world, groups_of(kind))
    loss.backward()  # type: ignore[no-untyped-call]
    return {"value": loss.detach()} | {n: t.grad for n, t in inputs.items() if t.grad is not None}


def be_rank(rank: int, ports: dict[int, int], folder: Path) -> None:
    """One of as many processes as the largest world has; the smaller worlds are without some."""
    torch.set_num_threads(1)
    for size in COUNTS:
        if rank >= size:
            continue
        address = f"tcp://127.0.0.1:{ports[size]}"
        dist.init_process_group("gloo", address, rank=rank, world_size=size)
        found = {
            (kind, name): measure(kind, name, COUNTS[size], World(rank, size))
            for kind in ("pairs", "grouped")
            for name in LOSSES
        }
        torch.save(found, folder / f"{size}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By number of ranks, what each of them measured."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        servers = {n: stack.enter_context(socket.create_server(("127.0.0.1", 0))) for n in COUNTS}
        ports = {size: server.getsockname()[1] for size, server in servers.items()}
    # Ranks are forked from one process that has imported what takes seconds.
    multiprocessing.set_forkserver_preload(["torch._dynamo", "training.objectives.sigmoid"])
    start_processes(  # type: ignore[no-untyped-call]
        be_rank, (ports, folder), nprocs=max(COUNTS), start_method="forkserver"
    )
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in COUNTS}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("kind", ["pairs", "grouped"])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_together_equal_one_process(
    found: dict[int, list[Any]], name: str, kind: str, size: int
) -> None:
    """Value, and the gradients of features, scale and bias; nothing is counted twice."""
    expected = measure(kind, name.split(",")[0].replace("tiled", "dense"), [8], ALONE)
    shares = [rank[kind, name] for rank in found[size]]
    summed = {
        key: torch.cat([share[key] for share in shares])
        if key in ("image", "text")
        else torch.stack([share[key] for share in shares]).sum(dim=0)
        for key in expected
    }
    assert summed["value"].item() == pytest.approx(expected["value"].item(), abs=1e-6, rel=1e-6)
    assert set(expected) >= {"value", "image", "text", "scale"}
    assert ("bias" in expected) == name.startswith("sigmoid")
    for key, gradient in expected.items():
        assert torch.allclose(summed[key], gradient, atol=1e-6, rtol=1e-5), key


def test_alone_the_ring_is_the_own_rows() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    ((where, block),) = ring(rows, [3], ALONE)
    assert where == slice(0, 3)
    assert torch.equal(block, rows)
    block.sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None


def test_a_message_that_fails_is_a_training_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(messages: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(dist, "P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(dist, "batch_isend_irecv", fail)
    blocks = ring(torch.zeros(1, 2), [1, 1], World(0, 2))
    next(blocks)
    with pytest.raises(TrainingError, match="another process of this run is gone"):
        next(blocks)
