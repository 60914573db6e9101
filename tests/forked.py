"""Processes of a run, forked from one that has imported everything: each would take seconds."""

import itertools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from clipserve.cli import main
from training.distributed import connect

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "clipserve.cli",
        "training.loop",
        "torch.utils.tensorboard",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch._dynamo.convert_frame",  # which the first split module imports
    ]
)
_PATIENCE_S = 900


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and all that it said."""

    code: int | None
    said: str


def train(
    size: int, folder: Path, arguments: Sequence[str], kill: tuple[int, int] | None = None
) -> list[Ended]:
    """`clipserve train` in so many ranks; `kill`: a rank, and the step in which it gets SIGKILL."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{rank}.log" for rank in range(size)]
    ranks = _start(size, [(_be_command, arguments, str(log), kill) for log in logs])
    return [Ended(rank.exitcode, log.read_text()) for rank, log in zip(ranks, logs, strict=True)]


def call(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(world, *arguments)` on each of the ranks."""
    ranks = _start(size, [(_be_called, function, *arguments)] * size)
    assert [rank.exitcode for rank in ranks] == [0] * size


def _start(size: int, tasks: list[tuple[Any, ...]]) -> list[BaseProcess]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks: list[BaseProcess] = [
        _CONTEXT.Process(target=_be_rank, args=(rank, size, port, *task))
        for rank, task in enumerate(tasks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(_PATIENCE_S)
        if process.exitcode is None:
            process.kill()
    return ranks


def _be_rank(rank: int, size: int, port: int, task: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    task(*arguments)


def _be_called(function: Callable[..., None], *arguments: Any) -> None:
    with connect() as world:
        function(world, *arguments)


def _be_command(arguments: Sequence[str], log: str, kill: tuple[int, int] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if kill is not None and kill[0] == int(os.environ["RANK"]):
        _kill_in_step(kill[1])
    sys.argv = ["clipserve", "train", *arguments]
    main()


def _kill_in_step(number: int) -> None:
    """In the middle of it: the towers have seen the batch, nothing was summed."""
    real, calls = torch.Tensor.backward, itertools.count(1)

    def backward(tensor: torch.Tensor, *arguments: Any) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(tensor, *arguments)

    torch.Tensor.backward = backward  # type: ignore[method-assign,assignment]
