"""Running what `layers` built, as an engine would with every right taken away.

A container has a read-only root, /tmp in memory, the image's user without capabilities, a volume, a
process tree with the command as PID 1, and a network of its own with nothing but loopback in it.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dockerfile import Image
from layers import Root, enter

_POLL_S = 0.1


class Container:
    """A running container; `Engine.start` makes one."""

    def __init__(self, process: subprocess.Popen[bytes], image: Image, env: dict[str, str]) -> None:
        self._process = process
        self._image = image
        self._env = env
        self._pid = _first_process(process)

    def execute(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as the image's user."""
        # The root is entered first: the rest of the command is found in the image.
        inside = enter(Path("/"), argv, self._env, self._image)[2:]
        namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--root"]
        command = ["nsenter", f"--target={self._pid}", *namespaces, "--", *inside]
        return subprocess.run(command, capture_output=True, text=True)

    def wait_until_healthy(self, within_s: float) -> float:
        """Seconds until the image's own health check succeeds; TimeoutError, or it ended."""
        started = time.monotonic()
        while self.execute(self._image.healthcheck).returncode != 0:
            if self._process.poll() is not None:
                raise RuntimeError(f"the container ended with code {self._process.returncode}")
            if time.monotonic() - started > within_s:
                raise TimeoutError("the health check does not succeed")
            time.sleep(_POLL_S)
        return time.monotonic() - started

    def wait_until_obedient(self, within_s: float) -> float:
        """Seconds until PID 1 handles the stop signal, which the kernel drops before."""
        number = signal.Signals[self._image.stop_signal]
        started = time.monotonic()
        while not _caught(self._pid) >> (number - 1) & 1:
            if time.monotonic() - started > within_s:
                raise TimeoutError(f"{number.name} is not handled")
            time.sleep(_POLL_S)
        return time.monotonic() - started

    def stop(self, within_s: float) -> int:
        """Send the image's stop signal to PID 1; the exit code."""
        os.kill(self._pid, signal.Signals[self._image.stop_signal])
        return self._process.wait(within_s)


@dataclass(frozen=True)
class Engine:
    """Starts containers of one image; the volumes below `work` are those of earlier ones."""

    root: Root
    image: Image
    work: Path

    @contextlib.contextmanager
    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> Iterator[Container]:
        """The image's entry point with `command`, and `files` lent read-only by their new path."""
        variables = self.image.env | dict(env or {})
        argv = self._command([*self.image.entrypoint, *command], variables, files or {})
        process = subprocess.Popen(argv)
        try:
            yield Container(process, self.image, variables)
        finally:
            process.kill()
            process.wait()

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A container that ends by itself, with `argv` in place of the entry point."""
        command = self._command(argv, self.image.env, {})
        return subprocess.run(command, stdout=subprocess.PIPE, text=True)

    def _command(
        self, argv: Sequence[str], env: Mapping[str, str], files: Mapping[str, Path]
    ) -> list[str]:
        target = self.work / "root"
        script = [self.root.mount(target), ["ip", "link", "set", "lo", "up"]]
        script.append(["mount", "-t", "proc", "proc", f"{target}/proc"])
        for volume in self.image.volumes:
            script += _mount_volume(volume, target, self.work / "volumes")
        for folder, mode in (("/tmp", "1777"), ("/run", "755"), ("/dev/shm", "1777")):
            options = f"mode={mode},nosuid,nodev,noexec"
            script.append(["mount", "-t", "tmpfs", "-o", options, "tmpfs", f"{target}{folder}"])
        for inside, file in files.items():
            place = Path(f"{target}{inside}")
            script += [["mkdir", "-p", str(place.parent)], ["touch", str(place)]]
            script.append(["mount", "--bind", "-o", "ro", str(file), str(place)])
        script.append(["exec", *enter(target, argv, env, self.image)])
        namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts"]
        text = "\n".join(map(shlex.join, script))
        return ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-ec", text]


def _mount_volume(volume: str, target: Path, volumes: Path) -> list[list[str]]:
    """A new volume gets the content and the owner of the image's folder, as a named one does."""
    kept = volumes / volume.strip("/")
    commands = [["mount", "--bind", str(kept), f"{target}{volume}"]]
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        commands.insert(0, ["cp", "-aT", f"{target}{volume}", str(kept)])
    return commands


def _caught(pid: int) -> int:
    """The signals that a process handles, as bits."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(
        next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16
    )


def _first_process(unshare: subprocess.Popen[bytes]) -> int:
    """The process that `unshare` forked: PID 1 of its namespace."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    while not (found := children.read_text().split()):
        if unshare.poll() is not None:
            raise RuntimeError(f"the container ended with code {unshare.returncode}")
        time.sleep(_POLL_S)
    return int(found[0])
