"""The part of Dockerfile syntax that our files use, and the .dockerignore beside them.

`parse` splits a file into stages and fails on what it does not know: the prover runs what an engine
would run or nothing. `Image.apply` folds the instructions that only describe a container.
"""

import fnmatch
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

BUILDING = ("RUN", "COPY", "WORKDIR")
DESCRIBING = (
    *("ARG", "ENV", "USER", "ENTRYPOINT", "CMD", "HEALTHCHECK"),
    *("VOLUME", "EXPOSE", "LABEL", "STOPSIGNAL", "WORKDIR"),
)
_FLAGS = {
    "FROM": set[str](),
    "RUN": {"mount"},
    "HEALTHCHECK": {"interval", "timeout", "start-period", "retries"},
}
_REFERENCE = re.compile(r"\$(?:(\w+)|\{(\w+)\})|(\$\{)")


class DockerfileError(Exception):
    """Something that an engine would refuse, or that this parser does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `RUN --mount=type=cache,target=/a b` has name RUN, flag mount, text b."""

    line: int
    name: str
    flags: tuple[tuple[str, str], ...]
    text: str

    def mounts(self) -> list[dict[str, str]]:
        """The `--mount` flags as tables."""
        return [
            dict(part.partition("=")[::2] for part in value.split(","))
            for key, value in self.flags
            if key == "mount"
        ]


@dataclass(frozen=True)
class Stage:
    """FROM `base` AS `name`, and what follows until the next FROM."""

    name: str
    base: str
    steps: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """The ARGs before the first FROM, with their defaults, and the stages in order."""

    arguments: dict[str, str]
    stages: tuple[Stage, ...]


@dataclass
class Image:
    """What an image says of its containers; `variables` are for the build alone."""

    env: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    stop_signal: str = "SIGTERM"

    def apply(self, step: Instruction, arguments: Mapping[str, str]) -> None:
        """Fold in one of DESCRIBING; `arguments` are the build's, which ARG asks for by name."""
        match step.name:
            case "ARG":
                name, has_default, default = _argument(self.expand(step.text))
                value = arguments.get(name, default if has_default else None)
                if value is not None:
                    self.variables[name] = value
            case "ENV":
                self.env |= dict(_pairs(self.expand(step.text)))
            case "LABEL":
                self.labels |= dict(_pairs(self.expand(step.text)))
            case "USER":
                self.user = self.expand(step.text)
            case "WORKDIR":
                self.workdir = str(Path(self.workdir) / self.expand(step.text))
            case "ENTRYPOINT":
                self.entrypoint, self.command = _exec_form(step), []
            case "CMD":
                self.command = _exec_form(step)
            case "HEALTHCHECK":
                self.healthcheck = _healthcheck(step)
            case "VOLUME":
                self.volumes += shlex.split(self.expand(step.text))
            case "EXPOSE":
                self.ports += self.expand(step.text).split()
            case "STOPSIGNAL":
                self.stop_signal = step.text

    def expand(self, text: str) -> str:
        """$NAME and ${NAME} replaced; ENV wins over ARG, an unknown name is empty."""
        return expand(text, self.variables | self.env)


def parse(text: str) -> Dockerfile:
    """The stages of a Dockerfile; DockerfileError for what is not known here."""
    arguments: dict[str, str] = {}
    stages: list[tuple[str, str, list[Instruction]]] = []
    for step in _instructions(text):
        if step.name == "FROM":
            words = step.text.split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                raise DockerfileError(f"line {step.line}: FROM {step.text}")
            stages.append((words[2] if len(words) == 3 else str(len(stages)), words[0], []))
        elif stages:
            stages[-1][2].append(step)
        elif step.name == "ARG":
            name, _, default = _argument(step.text)
            arguments[name] = default
        else:
            raise DockerfileError(f"line {step.line}: {step.name} before FROM")
    return Dockerfile(arguments, tuple(Stage(name, base, tuple(s)) for name, base, s in stages))


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$NAME and ${NAME} replaced by their values; other forms are an error."""

    def value(match: re.Match[str]) -> str:
        if match[3]:
            raise DockerfileError(f"only $NAME and ${{NAME}} are known: {text}")
        return variables.get(match[1] or match[2], "")

    return _REFERENCE.sub(value, text)


class Context:
    """The files a build may copy: a folder without what its .dockerignore names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = (folder / ".dockerignore").read_text().splitlines()
        self._patterns = [line for line in lines if line.strip() and not line.startswith("#")]

    def files(self, source: str) -> list[Path]:
        """The files that COPY of `source` takes, relative to the folder; it must name some."""
        start = self.folder / source
        found = sorted(start.rglob("*")) if start.is_dir() else [start]
        relative = [path.relative_to(self.folder) for path in found if path.is_file()]
        kept = [path for path in relative if not self._is_ignored(path)]
        if not kept:
            raise DockerfileError(f"COPY {source}: not in the build context")
        return kept

    def _is_ignored(self, path: Path) -> bool:
        ignored = False
        for pattern in self._patterns:  # the last one that fits decides
            fits = any(
                _fits(str(part), pattern.removeprefix("!")) for part in (path, *path.parents)
            )
            if fits:
                ignored = not pattern.startswith("!")
        return ignored


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(Path(path).name, pattern[3:])
    if "**" in pattern:
        raise DockerfileError(f".dockerignore: ** is known at the start only: {pattern}")
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)


def _instructions(text: str) -> Iterator[Instruction]:
    for number, line in _logical_lines(text.splitlines()):
        name, _, rest = line.partition(" ")
        name = name.upper()
        if name != "FROM" and name not in BUILDING + DESCRIBING:
            raise DockerfileError(f"line {number}: unknown instruction {name}")
        flags, rest = _split_flags(rest.strip())
        unknown = {key for key, _ in flags} - _FLAGS.get(name, set())
        if unknown:
            raise DockerfileError(f"line {number}: {name} --{', --'.join(sorted(unknown))}")
        if name in ("RUN", "COPY") and "<<" in rest:
            raise DockerfileError(f"line {number}: here-documents are not known")
        yield Instruction(number, name, tuple(flags), rest)


def _logical_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines without comments, those that end in a backslash joined with the next."""
    start, parts = 0, list[str]()
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        start = start if parts else number
        parts.append(line.rstrip().removesuffix("\\"))
        if not line.rstrip().endswith("\\"):
            yield start, "".join(parts).strip()
            parts = []
    if parts:
        raise DockerfileError(f"line {start}: ends in a backslash")


def _split_flags(text: str) -> tuple[list[tuple[str, str]], str]:
    flags = []
    while match := re.match(r"--([\w-]+)=(\S+)\s*", text):
        flags.append((match[1], match[2]))
        text = text[match.end() :]
    return flags, text


def _argument(text: str) -> tuple[str, str, str]:
    (word,) = shlex.split(text)
    return word.partition("=")


def _pairs(text: str) -> list[tuple[str, str]]:
    words = shlex.split(text)
    if not all("=" in word for word in words):
        raise DockerfileError(f"NAME=value is needed: {text}")
    return [(name, value) for name, _, value in (word.partition("=") for word in words)]


def _exec_form(step: Instruction) -> list[str]:
    """The words of `["a", "b"]`; the form with a shell would put a shell between us and signals."""
    try:
        words = json.loads(step.text)
    except ValueError:
        raise DockerfileError(f"line {step.line}: {step.name} needs the form [...]") from None
    return [str(word) for word in words]


def _healthcheck(step: Instruction) -> list[str]:
    if step.text == "NONE":
        return []
    name, _, rest = step.text.partition(" ")
    if name != "CMD":
        raise DockerfileError(f"line {step.line}: HEALTHCHECK {step.text}")
    return _exec_form(Instruction(step.line, step.name, (), rest.strip()))
