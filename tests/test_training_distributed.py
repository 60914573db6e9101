"""What the ranks of a run tell each other; of composed steps see test_training_terms.py."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipserve.errors import ConfigError, TrainingError
from training.distributed import ALONE, World, connect

COUNTS = [2, 0, 3]
SIZE = len(COUNTS)


def test_a_process_that_was_not_told_its_gpu_says_so() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2, but LOCAL_RANK, .* SLURM_LOCALID"):
        _ = World(1, 2).gpu
    assert World(3, 4, 1).gpu == torch.device("cuda", 1)


def rows_of(rank: int) -> Tensor:
    return torch.arange(COUNTS[rank] * 2.0).reshape(-1, 2) + 10 * rank


def factors(rank: int) -> Tensor:
    """What a rank's loss multiplies each of all rows with."""
    return torch.randn(sum(COUNTS), 2, generator=torch.Generator().manual_seed(rank))


def parameters_of(rank: int) -> list[nn.Parameter]:
    """Two dtypes; one is frozen, one has a gradient on rank 1 alone."""
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2).double())
    some, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    first.grad, second.grad = torch.full((3,), rank + 1.0), torch.full((2, 2), 0.1 * rank).double()
    if rank == 1:
        some.grad = torch.tensor([5.0, 7.0])
    return [first, frozen, second, some]


def measure(world: World, folder: Path) -> dict[str, Any]:
    rank = world.rank
    rows = rows_of(rank).requires_grad_()
    gathered = world.gather(rows, COUNTS)
    (gathered * factors(rank)).sum().backward()  # type: ignore[no-untyped-call]
    numbers = torch.full((COUNTS[rank],), rank)
    parameters = parameters_of(rank)
    world.sum_gradients(parameters)
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    world.same_weights(network)
    network(rows_of(rank)[:2] if COUNTS[rank] else torch.zeros(2, 2))
    world.same_statistics(network)
    with world.main_first():
        if world.is_main:
            time.sleep(0.1)
            (folder / "written").touch()
        is_written = (folder / "written").exists()
    return {
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "numbers": world.gather(numbers, COUNTS),
        "halves": world.gather(rows.detach().bfloat16(), COUNTS),
        "total": world.total(torch.tensor([rank, 0.5], requires_grad=True)),
        "exchanged": torch.from_numpy(world.exchange(rank, rank * 2)),
        "gradients": [p.grad for p in parameters],
        "weights": network.state_dict(),
        "agrees": [world.agrees(b"same"), world.agrees(b"other" if rank == 1 else b"same")],
        "is_written": is_written,
    }


def be_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with connect() as world:
        found = measure(world, folder)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank measured."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=be_rank, args=(rank, port, folder)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * SIZE
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


def test_everyone_has_all_rows_in_the_order_of_ranks(found: list[dict[str, Any]]) -> None:
    expected = torch.cat([rows_of(rank) for rank in range(SIZE)])
    for rank in found:
        assert torch.equal(rank["gathered"], expected)
        assert rank["numbers"].tolist() == [0, 0, 2, 2, 2]
        assert rank["numbers"].dtype == torch.int64
        assert torch.equal(rank["halves"], expected.bfloat16())


def test_a_row_gets_the_gradients_of_all_ranks(found: list[dict[str, Any]]) -> None:
    whole = sum((factors(rank) for rank in range(SIZE)), start=torch.zeros(sum(COUNTS), 2))
    for rank, part in enumerate(torch.split(whole, COUNTS)):
        assert torch.allclose(found[rank]["gradient"], part, atol=1e-6)


def test_gradients_are_summed_and_none_counts_as_zero(found: list[dict[str, Any]]) -> None:
    for rank in found:
        first, frozen, second, some = rank["gradients"]
        assert first.tolist() == [6.0] * 3
        assert frozen is None
        assert torch.allclose(second, torch.full((2, 2), 0.3).double(), atol=1e-15)
        assert second.dtype == torch.float64
        assert some.tolist() == [5.0, 7.0]


def test_gradients_are_copied_once_to_be_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    cat, made = torch.cat, []
    monkeypatch.setattr(dist, "all_reduce", sent.append)
    monkeypatch.setattr(torch, "cat", lambda parts: made.append(cat(parts)) or made[-1])
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    World(0, 2).sum_gradients([parameter])
    assert sent[-1] is made[0]


def test_numbers_are_exchanged_and_added_up(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["exchanged"].tolist() == [[0, 0], [1, 2], [2, 4]]
        assert rank["total"].tolist() == [3.0, 1.5]
        assert not rank["total"].requires_grad
        assert rank["agrees"] == [True, False]


def test_weights_and_buffers_are_those_of_rank_0(found: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network(rows_of(0))  # running statistics too, each rank having seen rows of its own
    expected = network.state_dict()
    for rank in found:
        assert rank["weights"].keys() == expected.keys()
        assert all(torch.equal(rank["weights"][name], expected[name]) for name in expected)


def test_what_the_main_rank_writes_the_others_find(found: list[dict[str, Any]]) -> None:
    assert [rank["is_written"] for rank in found] == [True] * SIZE


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
def test_stripes_make_the_whole(count: int) -> None:
    for size in (1, 2, 3, 4, 8):
        stripes = [range(count)[World(rank, size).stripe(count)] for rank in range(size)]
        assert [i for stripe in stripes for i in stripe] == list(range(count))
        lengths = [len(stripe) for stripe in stripes]
        assert max(lengths) - min(lengths) <= 1


def test_alone_everything_is_the_identity() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert ALONE.gather(rows, [3]) is rows
    total = ALONE.total(rows)
    assert torch.equal(total, rows)
    assert not total.requires_grad
    assert total.data_ptr() != rows.data_ptr()  # what it gives may be written to
    parameter = nn.Parameter(torch.zeros(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.exchange(3, 4).tolist() == [[3, 4]]
    assert ALONE.agrees(b"anything")
    assert ALONE.is_main
    with ALONE.main_first():
        pass


def test_without_torchrun_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with connect() as world:
        assert world == ALONE


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no number; start the run with torchrun"),
        ({"WORLD_SIZE": "2"}, "cannot be reached: .*RANK"),
    ],
)
def test_a_wrong_environment_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as caught, connect():
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["all_gather", "all_reduce", "broadcast"])
def test_a_rank_that_is_gone_is_a_training_error(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(dist, name, fail)
    world, rows = World(0, 2), torch.zeros(1, 2)
    calls: dict[str, list[Callable[[], object]]] = {
        "all_gather": [lambda: world.exchange(1), lambda: world.gather(rows, [1, 1])],
        "all_reduce": [lambda: world.total(rows)],
        "broadcast": [
            lambda: world.same_weights(nn.Linear(1, 1)),
            lambda: world.same_statistics(nn.BatchNorm1d(1)),
        ],
    }
    for call in calls[name]:
        with pytest.raises(TrainingError, match="another process of this run is gone"):
            call()
