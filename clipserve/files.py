"""Writing so that a crash or a full disk leaves the old file or the new one, never half of one."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename over it."""
    with new_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it appears under `path`, complete and on disk, when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A directory to fill; it appears under `path`, complete and on disk, when the block succeeds.

    An older directory of that name is replaced, and stays if the block or the replacing fails. That
    takes two renamings: a kill between them leaves the older one for `put_back_replaced`. Without
    `replace` whatever holds something stays, though it came to be meanwhile: FileExistsError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    folder = aside / path.name  # the name that it will have, for those who tell of it
    try:
        folder.mkdir()
        yield folder
        for file in folder.rglob("*"):
            sync(file)
        sync(folder)
        if replace and path.exists():
            _replace(path, folder)
        else:
            try:
                folder.rename(path)  # which the system does onto nothing or an empty directory
            except OSError as error:
                if not path.exists():
                    raise
                reason = "came to be meanwhile, and stays as it is"
                raise FileExistsError(errno.EEXIST, reason, str(path)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(path.parent)


def put_back_replaced(old: Path) -> None:
    """Undo what a kill left half done: `old` is the `.NAME.*.old` beside a replaced directory.

    What it holds becomes NAME again, unless that is there; `old` is removed.
    """
    path = old.with_name(old.name[1:].rsplit(".", 2)[0])
    if (old / _REPLACED).exists() and not path.exists():
        (old / _REPLACED).rename(path)
        sync(path.parent)
    shutil.rmtree(old)


def save_tensors(
    tensors: Mapping[str, "Tensor"], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. Raises OSError as for any other file; its library does not."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from None


def digest_tensors(tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None) -> str:
    """The `sha256` of the file that `save_tensors` writes, without the file or a copy of it.

    Of `metadata` it takes one entry at most: of several the library has no fixed order.
    """
    import torch
    from safetensors.torch import save

    # The library says how it names and orders them; small ones spare it the content.
    small = {name: torch.zeros(1, dtype=tensor.dtype) for name, tensor in tensors.items()}
    content = save(small, metadata)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = sorted(tensors, key=lambda name: int(header[name]["data_offsets"][0]))
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def link_atomic(link: Path, target: str) -> None:
    """Point the symbolic link `link` at `target`, replacing an earlier one in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """fsync a file or a directory, so that its content or its names survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb", buffering=0) as file:
        begun = _begun.pop(_identity(file), None)
        return _digest(file) if begun is None else begun.result()


def hash_ahead(paths: Iterable[Path]) -> None:
    """Begin in a thread what the next `sha256` of each file then waits for, if the file is still
    the same one and as it was. A file that cannot be opened is left to it."""
    begun = []
    for path in paths:
        with contextlib.suppress(OSError):
            file = path.open("rb", buffering=0)
            begun.append((file, Future[str]()))
            _begun[_identity(file)] = begun[-1][1]
    threading.Thread(target=_hash, args=(begun,), name="hash", daemon=True).start()


_REPLACED = "replaced"
_begun: dict[tuple[int, ...], "Future[str]"] = {}
_DIGESTED_AT_ONCE = 8 * 2**20  # few turns at the interpreter's lock, which imports hold meanwhile


def _replace(path: Path, folder: Path) -> None:
    """Put `folder` in the place of another; if that fails, all is as before."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(old / _REPLACED)
        folder.rename(path)
    except BaseException:
        put_back_replaced(old)
        raise
    sync(path.parent)
    shutil.rmtree(old)


def _identity(file: FileIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _hash(begun: "list[tuple[FileIO, Future[str]]]") -> None:
    for file, digest in begun:
        with file:
            try:
                digest.set_result(_digest(file))
            except OSError as error:
                digest.set_exception(error)


def _digest(file: FileIO) -> str:
    digest = hashlib.sha256()
    size = os.fstat(file.fileno()).st_size
    buffer = memoryview(bytearray(max(1, min(size, _DIGESTED_AT_ONCE))))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()
