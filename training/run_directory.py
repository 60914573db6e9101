"""The run directory: who may write it, which checkpoint to continue from, which ones to keep.

    checkpoints/step-000000130/    a model directory, with state/ for resuming
    latest, best                   links to two of them
    checkpoints/left-step-...      of courses that were left by going back, the later ones numbered
    checkpoints/skipped-step-...   of a run that ended after a skipped step: for --resume alone

Start at `RunDirectory`.
"""

import contextlib
import fcntl
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipserve import checkpoint
from clipserve.errors import CheckpointError, ConfigError
from clipserve.files import link_atomic, new_directory, put_back_replaced
from clipserve.shards import is_shard_source
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

    def check(self) -> None:
        """ConfigError for a path that is no place for a run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"out = {self.path} is no folder; name one, that may be new")
        if is_shard_source(self.path) and not (self.path / "checkpoints").exists():
            raise ConfigError(
                f"out = {self.path} holds shards; name a folder of its own for the run"
            )

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
            self._clear_up()
            yield

    def _clear_up(self) -> None:
        """What a killed process left half written, or half replaced."""
        checkpoints = self.path / "checkpoints"
        for old in checkpoints.glob(".*step-*.old"):
            put_back_replaced(old)
        for unfinished in checkpoints.glob(".*step-*"):
            shutil.rmtree(unfinished)

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

    def find_latest(self, world: World) -> Path | None:
        """The last checkpoint, as rank 0 knows it, if there is one.

        Raises CheckpointError unless all ranks find the same one there.
        """
        latest = self.path / "latest"
        name = world.tell(latest.resolve().name if latest.exists() else "")
        if not name:
            return None
        start = self.path / "checkpoints" / name
        state = start / "state" / "state.json"
        self.check_shared(
            state.read_bytes() if state.exists() else b"", f"checkpoint {name}", world
        )
        return start

    def check_shared(self, content: bytes, what: str, world: World) -> None:
        """Raises CheckpointError unless all ranks have the same `content`."""
        if not world.agrees(content):
            raise CheckpointError(
                f"the processes of this run do not find the same {what} in {self.path}; give them"
                " one `out`, on a disk that all share"
            )

    def go_back_to(self, start: Path, step: int) -> None:
        """Continue from `start`, a checkpoint of `step`, from now on, also after a kill.

        Later checkpoints belong to a course that was left: they are kept under other names.
        Raises ConfigError if the run here is another than that of `start`.
        """
        if not (self.path / "latest").is_symlink():
            return  # a new run that starts from another's checkpoint
        start, checkpoints = start.resolve(), (self.path / "checkpoints").resolve()
        if start.parent != checkpoints:
            raise ConfigError(
                f"{self.path} holds a run of its own, which {start} is no part of; choose another"
                " `out`"
            )
        link_atomic(self.path / "latest", f"checkpoints/{start.name}")
        best, own = self.path / "best", self.folder_of(step).name
        if best.exists() and best.resolve().name > own:
            best.unlink()
        for folder in sorted(checkpoints.glob("step-*")):
            if folder.name > own:
                folder.rename(_free(folder.with_name(f"left-{folder.name}")))

    def folder_of(self, step: int, is_aside: bool = False) -> Path:
        """The checkpoint of a step."""
        name = f"step-{step:09d}"
        return self.path / "checkpoints" / (f"skipped-{name}" if is_aside else name)

    def save(
        self,
        state: State,
        description: dict[str, Any],
        links: Sequence[str],
        world: World = ALONE,
    ) -> None:
        """Write a checkpoint, then move `links`, which are `best` and `latest`, then drop old ones.

        One without links is kept aside: nothing goes on from it by itself, and it replaces no
        other. `description` are the arguments that say of the model how it was trained. A state
        that is split over the ranks all of them save at once. CheckpointError names the one before.
        """
        target = self.folder_of(state.counters.step, is_aside=not links)
        try:
            with self._new_checkpoint(target, world) as folder:
                model = state.whole()
                if world.is_main:
                    title = self.path.resolve().name
                    checkpoint.write_into(folder, model, name=title, **description)
                state.save(folder, world)
            if world.is_main:
                for link in links:
                    link_atomic(self.path / link, f"checkpoints/{target.name}")
                if not state.counters.is_unproven:
                    self._drop_old()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {target.name} cannot be written: {error.strerror or error};"
                f" {self.name_whole()}: put that right and run the same command again"
            ) from error

    @contextlib.contextmanager
    def _new_checkpoint(self, target: Path, world: World) -> Iterator[Path]:
        """The folder to fill, on every rank; it counts when rank 0's block ends."""
        if not world.is_main:
            yield Path(world.tell(""))
            return
        with new_directory(target) as folder:
            world.tell(str(folder))
            yield folder

    def name_whole(self) -> str:
        """Which checkpoint is sure to be there, for those who tell of a failure."""
        latest = (self.path / "latest").resolve()
        return f"{latest} is whole" if latest.exists() else "there is no checkpoint before it"

    def _drop_old(self) -> None:
        linked = {(self.path / link).resolve() for link in ("latest", "best")}
        for folder in sorted((self.path / "checkpoints").glob("step-*"))[: -self.keep]:
            if folder.resolve() not in linked:
                shutil.rmtree(folder)


def _free(path: Path) -> Path:
    """That, or a number behind it, where there is nothing yet."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())
