"""Building the stages of a Dockerfile without a container engine: overlays, namespaces, chroot.

Start at `Builder.build`. Each RUN, COPY and WORKDIR makes a layer, a folder named by the hash of
everything that led to it, as an engine does: a second build starts where it differs from the first.
All mounts are made in a namespace of the command that needs them and are gone when it ends. Needs
root, debootstrap and Debian's archive; what an engine would pull as the base image is made of it.
"""

import hashlib
import logging
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from dockerfile import (
    BUILDING,
    DESCRIBING,
    Context,
    DockerfileError,
    Image,
    Instruction,
    expand,
    parse,
)

logger = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BASE = re.compile(r"python:(3\.\d+)\.\d+-slim-(\w+)(@sha256:[0-9a-f]{64})?")


@dataclass(frozen=True)
class Root:
    """A file system made of layers, the newest first, and the key that names it."""

    layers: tuple[Path, ...]
    key: str

    def mount(self, target: Path, upper: Path | None = None) -> list[str]:
        """The command that mounts it: read-only, or with changes written to `upper`."""
        options = f"lowerdir={':'.join(map(str, self.layers))}"
        if upper:
            options += f",upperdir={upper},workdir={upper.with_name('work')}"
        return ["mount", "-t", "overlay", "overlay", "-o", options, str(target)]


class Builder:
    """Builds stages of one Dockerfile into layers below `work`."""

    def __init__(
        self,
        text: str,
        context: Context,
        work: Path,
        arguments: Mapping[str, str],
        secrets: Mapping[str, Path],
    ) -> None:
        self._file = parse(text)
        self._context = context
        self._work = work
        self._secrets = secrets
        self._arguments = self._file.arguments | dict(arguments)
        self._built: dict[str, tuple[Root, Image]] = {}
        self._target = work / "root"
        self._target.mkdir(parents=True, exist_ok=True)

    def build(self, name: str) -> tuple[Root, Image]:
        """The file system and the description of a stage, and of those it needs before it."""
        if name not in self._built:
            stage = next(stage for stage in self._file.stages if stage.name == name)
            root, image = self._from(expand(stage.base, self._arguments))
            for step in stage.steps:
                if step.name in DESCRIBING:
                    image.apply(step, self._arguments)
                if step.name in BUILDING:
                    root = self._layer(root, image, step)
            self._built[name] = root, replace(image, variables={})
        return self._built[name]

    def _from(self, base: str) -> tuple[Root, Image]:
        if any(stage.name == base for stage in self._file.stages):
            return deepcopy(self.build(base))
        return make_base(base, self._work), Image(env={"PATH": _PATH})

    def _layer(self, root: Root, image: Image, step: Instruction) -> Root:
        """The root with what the step adds; nothing runs if that is known."""
        inputs = self._inputs(image, step)
        facts = [root.key, step.name, image.expand(step.text), step.flags, image.user]
        facts += [image.workdir, sorted((image.env | image.variables).items()), inputs]
        key = _digest(repr(facts).encode())
        folder = self._work / "layers" / key
        shown = f"{step.name} {' '.join(step.text.split())}"[:90]
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for part in ("diff", "work"):
                (folder / part).mkdir(parents=True)
            started = time.monotonic()
            {"RUN": self._run, "COPY": self._copy, "WORKDIR": self._workdir}[step.name](
                root, folder / "diff", image, step
            )
            (folder / "done").touch()
            logger.info("%5.0f s %7s  %s", time.monotonic() - started, size(folder), shown)
        else:
            logger.info("  known %7s  %s", size(folder), shown)
        return Root((folder / "diff", *root.layers), key)

    def _inputs(self, image: Image, step: Instruction) -> list[str]:
        """Digests of what a step reads besides its root."""
        if step.name == "COPY":
            *sources, _ = shlex.split(image.expand(step.text))
            files = [file for source in sources for file in self._context.files(source)]
            return [
                f"{file} {_digest((self._context.folder / file).read_bytes())}" for file in files
            ]
        binds = [mount for mount in step.mounts() if mount["type"] == "bind"]
        return [self._digest_of(mount["from"], mount["source"]) for mount in binds]

    def _digest_of(self, stage: str, path: str) -> str:
        script = [
            self.build(stage)[0].mount(self._target),
            ["cd", f"{self._target}{path}"],
            ["sh", "-c", "find . -type f -print0 | sort -z | xargs -0 sha256sum"],
        ]
        return _digest(run_script(script, capture=True))

    def _run(self, root: Root, upper: Path, image: Image, step: Instruction) -> None:
        target = self._target
        script = [root.mount(target, upper), ["mount", "-t", "proc", "proc", f"{target}/proc"]]
        for file in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
            # The network and whom it trusts are this machine's, as with an engine's bridge.
            script.append(["mount", "--bind", file, f"{target}{file}"])
        undo = [["umount", f"{target}{mount['target']}"] for mount in step.mounts()]
        for mount in step.mounts():
            source, commands = self._mount_source(mount)
            if source is None:
                undo.remove(["umount", f"{target}{mount['target']}"])
                continue
            place = Path(f"{target}{mount['target']}")
            make = ["touch"] if source.is_file() else ["mkdir", "-p"]
            remove = ["rm", "-f"] if source.is_file() else ["rmdir", "--ignore-fail-on-non-empty"]
            script += [*commands, [*make, str(place)]]
            script.append(["mount", "--bind", str(source), str(place)])
            undo.append([*remove, str(place)])
        home = {"HOME": "/root"} if image.user.split(":")[0] in ("0", "root") else {}
        argv = ["/bin/sh", "-c", step.text]
        script.append(enter(target, argv, home | image.variables | image.env, image))
        run_script([*script, *undo])

    def _mount_source(self, mount: Mapping[str, str]) -> tuple[Path | None, list[list[str]]]:
        """Where a --mount of RUN comes from, and what makes it so; None for a secret not given."""
        match mount["type"]:
            case "cache":
                folder = self._work / "cache" / mount["target"].strip("/").replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                return folder, []
            case "secret":
                return self._secrets.get(mount["id"]), []
            case "bind":
                other = self._work / f"from-{mount['from']}"
                other.mkdir(exist_ok=True)
                root, _ = self.build(mount["from"])
                return Path(f"{other}{mount['source']}"), [root.mount(other)]
        raise DockerfileError(f"--mount=type={mount['type']} is not known")

    def _copy(self, root: Root, upper: Path, image: Image, step: Instruction) -> None:
        *sources, place = shlex.split(image.expand(step.text))
        target = f"{self._target}{Path(image.workdir) / place}"
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            staging = Path(folder)
            script = [root.mount(self._target, upper), ["mkdir", "-p", str(Path(target).parent)]]
            for source in sources:
                for file in self._context.files(source):
                    (staging / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(self._context.folder / file, staging / file)
                if (self._context.folder / source).is_dir():  # its content goes there
                    script.append(["cp", "-rT", f"{staging}/{source}", target])
                else:
                    script.append(["cp", f"{staging}/{source}", target])
            run_script(script)

    def _workdir(self, root: Root, upper: Path, image: Image, step: Instruction) -> None:
        made = ["mkdir", "-p", f"{self._target}{image.workdir}"]
        run_script([root.mount(self._target, upper), made])


def make_base(image: str, work: Path) -> Root:
    """What stands for a base image: the same Debian and the same Python, from Debian's archive."""
    known = _BASE.fullmatch(image)
    if not known:
        raise DockerfileError(f"FROM {image}: an equivalent is known for {_BASE.pattern} only")
    python, suite = f"python{known[1]}", known[2]
    folder = work / "layers" / f"base-{suite}-{python}"
    root = folder / "diff"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _shell("debootstrap", "--variant=minbase", "--include=ca-certificates", suite, str(root))
        # The official image has Python's headers, which torch.compile needs, and no compiler.
        packages = [f"{python}-venv", f"lib{python}-dev"]
        install = "apt-get install --yes --no-install-recommends -o Dpkg::Use-Pty=0 "
        script = f"export DEBIAN_FRONTEND=noninteractive; {install}{' '.join(packages)}"
        _shell("chroot", str(root), "/bin/sh", "-c", f"{script} && apt-get clean")
        (root / "usr/local/bin/python").symlink_to(f"/usr/bin/{python}")
        (folder / "empty").mkdir()
        (folder / "done").touch()
    # A read-only overlay needs two layers at least.
    return Root((folder / "empty", root), folder.name)


def enter(target: Path, argv: Sequence[str], env: Mapping[str, str], image: Image) -> list[str]:
    """The command that runs `argv` in a root, as the image's user in its folder."""
    user = [] if image.user == "0:0" else unprivileged(image)
    variables = [f"{name}={value}" for name, value in env.items()]
    inside = [*user, "/usr/bin/env", "-i", "-C", image.workdir, *variables, *argv]
    return ["chroot", str(target), *inside]


def unprivileged(image: Image) -> list[str]:
    """The command prefix that gives up every right, as `--cap-drop ALL` does."""
    uid, _, gid = image.user.partition(":")
    rights = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    # Changing the user makes the kernel forget what unshare's --kill-child asked for.
    rights.append("--pdeathsig=KILL")
    return ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={gid or uid}", *rights]


def run_script(commands: Sequence[Sequence[str]], capture: bool = False) -> bytes:
    """Run commands, stopping at the first that fails, where their mounts are nobody else's."""
    script = "\n".join(shlex.join(command) for command in commands)
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script],
        stdout=subprocess.PIPE if capture else None,
        check=True,
    )
    return done.stdout or b""


def size(folder: Path) -> str:
    done = subprocess.run(["du", "-sh", str(folder)], capture_output=True, check=True, text=True)
    return done.stdout.split()[0]


def _shell(*command: str) -> None:
    subprocess.run(command, check=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
