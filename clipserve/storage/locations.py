"""Where shards are, as text: paths, URLs, commands. Nothing here opens a file or a connection.

/data/shards-{000..099}.tar      file:///data/*.tar         local
https://host/d/{000..099}.tar    s3://bucket/d/*.tar        remote, through fsspec where not http
pipe:ssh host cat {000..099}.tar                            remote, what a shell command prints
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from urllib.parse import quote, unquote

from clipserve.errors import DataError

PIPE = "pipe:"
MAX_LOCATIONS = 1_000_000
_MAX_BRACES = 64
_MAX_NAME_BYTES = 255
# `::` chains fsspec's file systems: filecache::s3://bucket/d
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://|::.*://)", re.DOTALL)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")
_FILE_ENDINGS = (".json", ".index", ".tar", ".tar.gz", ".tgz")
_CREDENTIALS = re.compile(r"^[^/?#]*@")


def scheme(location: str) -> str:
    """In lower case; "pipe" for a command, "file" for a plain path."""
    if location.startswith(PIPE):
        return "pipe"
    match = _SCHEME.match(location)
    return match.group().lower() if match else "file"


def is_remote(location: str) -> bool:
    """Whether it must be fetched before it can be read at any place."""
    return scheme(location) != "file"


def local_path(location: str) -> Path:
    """The path of a location that is not remote; takes file:// URLs too."""
    if location[:7].lower() == "file://":
        return Path(unquote(location[7:].removeprefix("localhost")))
    return Path(location)


def shown(location: str) -> str:
    """A location fit for messages and logs: no credentials, no query string, no command line."""
    if location.startswith(PIPE):
        return PIPE + _shown_command(location.removeprefix(PIPE))
    if not is_remote(location):
        return location
    before, separator, rest = location.partition("://")
    path = re.split(r"[?#]", rest, maxsplit=1)[0]
    return before + separator + _CREDENTIALS.sub("", path)


def shown_text(text: str) -> str:
    """A library's or a command's message in one line, each URL in it as `shown` has it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return _URL_IN_TEXT.sub(lambda match: shown(match.group()), line)[:300]


def check_name(name: str) -> str:
    """A shard's name as a manifest may give it: a plain file name, nothing else.

    Whoever wrote a remote manifest must not choose what is run or read here.
    """
    if (
        name in ("", ".", "..")
        or any(character in "/\\" or ord(character) < 32 for character in name)
        or name.startswith(PIPE)
        or len(os.fsencode(name)) > _MAX_NAME_BYTES
    ):
        raise DataError(
            f"the manifest names the shard {name[:80]!r}; it must be a plain file name "
            "beside the manifest: make the manifest again with `clipserve verify`"
        )
    return name


def join(base: str, name: str) -> str:
    """The file `name` in the folder `base`, or beside it when `base` is a shard or a manifest.

    A query string stays at the end, where a signature is looked for.
    """
    check_name(name)
    kind = scheme(base)
    if kind == "pipe":
        raise DataError(f"{shown(base)} is a command, and has no folder for {name}")
    if kind == "file":
        folder = local_path(base)
        return str((folder.parent if _is_file(folder.name) else folder) / name)
    if kind not in ("http", "https"):
        return f"{_folder(base)}/{name}"
    path, mark, query = base.partition("#")[0].partition("?")
    return f"{_folder(path)}/{quote(name)}{mark}{query}"


def braces(pattern: str) -> list[str]:
    """What the shell's braces stand for ({000..099}, {a,b}), in their order; other text stays."""
    if pattern.count("{") > _MAX_BRACES:
        raise DataError(f"{shown(pattern)[:200]} has more than {_MAX_BRACES} braces; give fewer")
    parts, count = [], 1
    for num_options, options in _parts(pattern):
        count *= num_options
        if count > MAX_LOCATIONS:
            raise DataError(
                f"{shown(pattern)[:200]} stands for more than {MAX_LOCATIONS} locations; "
                "give fewer, larger shards"
            )
        parts.append(list(options))
    return ["".join(chosen) for chosen in product(*parts)]


def _shown_command(command: str) -> str:
    """The program and the shard: what is between them may be a password."""
    try:
        words = [word for word in shlex.split(command) if "=" not in word.partition("://")[0]]
    except ValueError:  # quotes that do not match
        return "..."
    shards = [shown(word).rpartition("/")[2] for word in words[1:] if _is_file(shown(word))]
    return " ... ".join(words[:1] + shards[-1:]) or "..."


def _folder(path: str) -> str:
    path = path.rstrip("/")
    return path.rpartition("/")[0] if _is_file(path) else path


def _is_file(name: str) -> bool:
    return name.lower().endswith(_FILE_ENDINGS)


def _parts(pattern: str) -> Iterator[tuple[int, Iterable[str]]]:
    """The texts to choose from, part after part, and their number; of a literal part, one.

    Lazy, for {0..999999999} must not fill the memory before it is refused.
    """
    at = 0
    for start, end in _groups(pattern):
        options = _options(pattern[start + 1 : end]) if start >= at else None
        if options is not None:
            yield 1, [pattern[at:start]]
            yield options
            at = end + 1
    yield 1, [pattern[at:]]


def _groups(pattern: str) -> Iterator[tuple[int, int]]:
    """Each `{` that is closed, with its `}`, from left to right."""
    for start in (i for i, character in enumerate(pattern) if character == "{"):
        depth = 0
        for end in range(start, len(pattern)):
            depth += {"{": 1, "}": -1}.get(pattern[end], 0)
            if depth == 0:
                yield start, end
                break


def _options(body: str) -> tuple[int, Iterable[str]] | None:
    """What stands between a pair of braces, or None when the shell would leave them alone."""
    if match := _RANGE.fullmatch(body):
        return _numbers(*match.groups())
    if match := _LETTERS.fullmatch(body):
        first, last = (ord(letter) for letter in match.groups())
        letters = _span(first, last, 1)
        return len(letters), map(chr, letters)
    parts = _split(body)
    if len(parts) == 1:
        return None
    texts = [text for part in parts for text in braces(part)]
    return len(texts), texts


def _numbers(first: str, last: str, step: str | None) -> tuple[int, Iterator[str]]:
    padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    numbers = _span(int(first), int(last), abs(int(step or 1)) or 1)
    return len(numbers), (f"{number:0{width}d}" for number in numbers)


def _span(first: int, last: int, step: int) -> range:
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


def _split(body: str) -> list[str]:
    """At the commas that are in no inner braces."""
    parts, depth = [""], 0
    for character in body:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
