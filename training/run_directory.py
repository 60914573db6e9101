"""The run directory: who may write it, which checkpoint to continue from, which ones to keep.

    checkpoints/step-000000130/    a model directory, with state/ for resuming
    latest, best                   links to two of them

Start at `RunDirectory`.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipserve import checkpoint
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import link_atomic, new_directory
from training.distributed import ALONE, World
from training.runs import LOCK
from training.state import State


@dataclass(frozen=True)
class RunDirectory:
    """`path` is `config.out`; the newest `keep` checkpoints stay, and those that are linked."""

    path: Path
    keep: int

    @property
    def best(self) -> Path:
        """The link to the best model, or to the latest if none was scored."""
        best = self.path / "best"
        return best if best.exists() else self.path / "latest"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time writes into a directory; a killed one leaves no lock behind."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is training into {self.path}; choose another `out`"
                ) from None
            for unfinished in (self.path / "checkpoints").glob(".step-*"):  # of a killed process
                shutil.rmtree(unfinished)
            yield

    def find_start(self, resume: str) -> Path | None:
        """The checkpoint that `--resume` means, None for a fresh start."""
        latest = self.path / "latest"
        if latest.is_symlink() and not latest.exists() and resume in ("auto", "no"):
            raise CheckpointError(
                f"{latest} leads nowhere; name the checkpoint to continue from with --resume DIR"
            )
        if resume == "no":
            if latest.exists():
                raise ConfigError(
                    f"{self.path} already holds a run; choose another `out`, or continue with"
                    " --resume auto"
                )
            return None
        if resume == "auto":
            return latest.resolve() if latest.exists() else None
        if not checkpoint.is_model_directory(resume):
            raise CheckpointError(f"--resume {resume}: not a checkpoint directory")
        return Path(resume)

    def go_back_to(self, start: Path, state: State) -> None:
        """Continue from `start` from now on, also after a kill.

        Later checkpoints belong to a course that was left: they are kept under other names.
        Raises ConfigError if the run here is another than that of `start`.
        """
        if not (self.path / "latest").is_symlink():
            return  # a new run that starts from another's checkpoint
        checkpoints = (self.path / "checkpoints").resolve()
        if start.resolve().parent != checkpoints:
            raise ConfigError(
                f"{self.path} holds a run of its own, which {start} is no part of; choose another"
                " `out`"
            )
        link_atomic(self.path / "latest", f"checkpoints/{start.resolve().name}")
        best = (self.path / "best").resolve().name
        for folder in sorted(checkpoints.glob("step-*")):
            if folder.name > start.resolve().name:
                left = folder.with_name(f"left-{folder.name}")
                shutil.rmtree(left, ignore_errors=True)
                folder.rename(left)
        if best > start.resolve().name:
            (self.path / "best").unlink(missing_ok=True)
            state.counters.best = None

    def save(
        self, state: State, description: dict[str, Any], is_best: bool, world: World = ALONE
    ) -> None:
        """Write checkpoints/step-N, then move `best` and `latest`, then drop old ones.

        `description` are the arguments that say of the model how it was trained. A state that is
        split over the ranks all of them save at once. CheckpointError names the one before.
        """
        name = f"step-{state.counters.step:09d}"
        try:
            with self._new_checkpoint(name, world) as folder:
                model = state.whole()
                if world.is_main:
                    title = self.path.resolve().name
                    checkpoint.write_into(folder, model, name=title, **description)
                state.save(folder, world)
            if world.is_main:
                self._link(name, is_best)
        except OSError as error:
            raise CheckpointError(self._explain(name, error)) from error

    @contextlib.contextmanager
    def _new_checkpoint(self, name: str, world: World) -> Iterator[Path]:
        """The folder to fill, on every rank; it counts when rank 0's block ends."""
        if not world.is_main:
            yield Path(world.tell(""))
            return
        with new_directory(self.path / "checkpoints" / name) as folder:
            world.tell(str(folder))
            yield folder

    def _explain(self, name: str, error: OSError) -> str:
        before = (self.path / "latest").resolve()
        whole = f"{before} is whole" if before.exists() else "there is none before it"
        return (
            f"checkpoint {name} cannot be written: {error.strerror or error}; {whole}: put that"
            " right and run the same command again"
        )

    def _link(self, name: str, is_best: bool) -> None:
        if is_best:  # first: what `latest` says was best must be linked
            link_atomic(self.path / "best", f"checkpoints/{name}")
        link_atomic(self.path / "latest", f"checkpoints/{name}")
        linked = {(self.path / link).resolve() for link in ("latest", "best")}
        for folder in sorted((self.path / "checkpoints").glob("step-*"))[: -self.keep]:
            if folder.resolve() not in linked:
                shutil.rmtree(folder)
