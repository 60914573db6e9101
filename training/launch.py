"""Several training processes on this machine, by torch's launcher. Start at `launch`.

Process 0 has the terminal; of the others only the last line of one that failed is shown. When one
is gone the launcher ends the others. The run then begins anew from its last checkpoint, as often
as `max_restarts` says, unless the reason is one that would come again.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from clipserve.embed import count_processors
from clipserve.errors import ConfigError, TrainingError
from training.distributed import is_one_of_many

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2  # at whether all processes live
_SAYS_WHY = "says why"  # of another process, see training.distributed
_CAN_RESTART = TrainingError.exit_code  # not what would come again, nor a signal that stopped it
_STOPPED = 128  # and the number of the signal, after which the run ended in order
_SAVING_S = 600  # that a stopped run may take to finish its step, and to write a checkpoint


class ProcessFailed(TrainingError):
    """A process of the run ended, with the exit code that the command passes on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(arguments: Sequence[str], resume: str, processes: int, max_restarts: int) -> int:
    """Run `clipserve train` with `arguments` in so many processes; returns the exit code.

    Raises ProcessFailed with what one but the first said when it ended.
    """
    if is_one_of_many():
        raise ConfigError(
            "--processes and --max-restarts are for a run that nothing else starts; leave them out"
            " here, where WORLD_SIZE says that this is one of several processes"
        )
    _check_devices(processes)
    # As torchrun does: threads of several processes would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_processors() // processes)))
    for restarts in range(max_restarts + 1):
        try:
            return _run([*arguments, "--resume", resume], processes)
        except ProcessFailed as error:
            if error.exit_code != _CAN_RESTART or restarts == max_restarts:
                raise
            logger.warning("%s; restart %d of %d", error, restarts + 1, max_restarts)
        resume = "auto"
    raise AssertionError("not reached")


def _run(arguments: Sequence[str], processes: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="clipserve-train-") as folder:
        quiet = {rank: Std.ALL for rank in range(1, processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="clipserve",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=_LOOK_EVERY_S,
            shutdown_timeout=_SAVING_S,
            logs_specs=DefaultLogsSpecs(folder, redirects=quiet),
        )
        signal.signal(signal.SIGUSR1, _pass_on)
        elastic = logging.getLogger("torch.distributed.elastic")
        elastic.propagate = False  # `_explain` says it in one line
        elastic.addHandler(logging.NullHandler())
        try:
            elastic_launch(config, sys.executable)("-m", "clipserve", "train", *arguments)
        except ChildFailedError as error:
            said = _last_lines(Path(folder))
            raise _explain(error.failures, said) from None
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _last_lines(folder: Path) -> dict[int, str]:
    """What each process but the first said last on stderr."""
    found = {}
    for file in folder.glob("**/stderr.log"):
        lines = file.read_text(errors="replace").strip().splitlines()
        found[int(file.parent.name)] = lines[-1] if lines else ""
    return found


def _explain(failures: Mapping[int, Any], said: Mapping[int, str]) -> ProcessFailed:
    """The failure that the others followed from; torch lists first what it saw first."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    causes = [rank for rank in codes if _is_cause(codes[rank], said.get(rank, _SAYS_WHY))]
    rank = next(iter(causes or codes))
    if codes[rank] < 0:
        name = signal.Signals(-codes[rank]).name
        return ProcessFailed(f"process {rank} of this run was killed by {name}", _CAN_RESTART)
    line = said.get(rank, "").removeprefix("clipserve: ") or f"its own message {_SAYS_WHY}"
    return ProcessFailed(f"process {rank} of this run ended: {line}", codes[rank])


def _is_cause(code: int, last_line: str) -> bool:
    """Whether a process ended so by itself: not by the launcher, nor because another was gone."""
    if code < 0:
        return code != -signal.SIGTERM
    if code == _CAN_RESTART:
        return _SAYS_WHY not in last_line
    return code < _STOPPED


def _pass_on(number: int, frame: FrameType | None) -> None:
    """A wish for a checkpoint is for the processes. What does not listen yet would die of it."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            status = Path(f"/proc/{child}/status").read_text()
            caught = int(status.split("SigCgt:")[1].split()[0], 16)
            if caught >> (number - 1) & 1:
                os.kill(int(child), number)


def _check_devices(processes: int) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ConfigError(
            f"--processes {processes} needs as many GPUs, and there are {gpus}; give fewer, or set"
            " CUDA_VISIBLE_DEVICES= and train.device=cpu"
        )
