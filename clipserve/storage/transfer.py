"""Content from elsewhere as a stream of bytes, and what can go wrong on the way.

`opened` is the one way in, for http(s), `pipe:` commands, fsspec's schemes and plain files. What
is worth another try leaves it as `Interrupted`, which `retried` turns into `StorageError` when
patience ends; everything else is for the user to put right, and is raised at once.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import SystemRandom
from typing import IO, TypeVar

import fsspec  # type: ignore[import-untyped]
import httpx

from clipserve.errors import DataError
from clipserve.storage.locations import PIPE, local_path, scheme, shown, shown_text

CHUNK_BYTES = 2**20
_MAX_REDIRECTS = 5
_MAX_WAIT_S = 60.0
_MIN_BYTES_PER_S = 1024
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# Not the shared generator: a retry must not change what a training run draws from it.
_jitter = SystemRandom()

Result = TypeVar("Result")


class StorageError(DataError):
    """A location could not be read now, after all retries; later it may be."""

    transient = True


class MissingError(DataError):
    """Nothing is at that location."""


class DeniedError(DataError):
    """The location may not be read with the credentials at hand."""


class Interrupted(Exception):
    """One attempt failed in a way that another may not. Never leaves this package."""

    def __init__(self, reason: str, wait_s: float = 0.0, *, restart: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # what the server asked for
        self.restart = restart  # what was received so far is of no use


@dataclass(frozen=True)
class Stream:
    """Content from byte `start` on. `size` is that of the whole, where the other side tells."""

    chunks: Iterator[bytes]
    start: int = 0
    size: int | None = None
    version: str = ""  # an ETag or a date, by which a later attempt may go on from where it was


def opened(
    location: str, timeout: float, *, start: int = 0, version: str = ""
) -> contextlib.AbstractContextManager[Stream]:
    """Read `location`; with `start`, from that byte where the other side can (see Stream.start).

    `timeout` seconds without a byte, or with less than 1 kB/s, interrupt.
    """
    if "\0" in location:
        raise DataError(f"{shown(location)!r} contains a NUL; no file or address does")
    kind = scheme(location)
    if kind in ("http", "https"):
        return _http(location, timeout, start, version)
    if kind == "pipe":
        return _pipe(location, timeout)
    if kind == "file":
        return _local(location, start)
    return _remote_file(location, timeout, start)


def retried(location: str, attempt: Callable[[], Result], retries: int, backoff_s: float) -> Result:
    """`attempt`, and after each `Interrupted` again, `retries` times, each wait twice the last."""
    for tries in range(retries + 1):
        try:
            return attempt()
        except Interrupted as fault:
            if tries == retries:
                raise StorageError(
                    f"{shown(location)}: {fault} (tried {retries + 1} times); "
                    "check the network and the server, then run again"
                ) from fault
            wait_s = backoff_s * 2**tries * _jitter.uniform(0.5, 1.5)
            time.sleep(min(_MAX_WAIT_S, max(wait_s, fault.wait_s)))
    raise AssertionError("retries is not negative")


def file_system(location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a location, and the path there."""
    kind = scheme(location)
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        extra = _EXTRAS.get(kind)
        remedy = f"pip install 'clipserve[{extra}]'" if extra else shown_text(str(error))
        raise DataError(f"{shown(location)}: {kind}:// needs another package: {remedy}") from error
    except ValueError as error:
        raise DataError(f"{shown(location)}: {shown_text(str(error))}") from error
    return filesystem, path


@contextlib.contextmanager
def file_faults(location: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise MissingError(f"{shown(location)} is not there; check the location") from error
    except PermissionError as error:
        raise _denied(location) from error
    except OSError as error:
        if "Forbidden" in str(error):  # how gcsfs reports a 403
            raise _denied(location) from error
        raise Interrupted(shown_text(str(error)) or type(error).__name__) from error
    except _library_errors() as error:
        if "Credentials" in type(error).__name__ or "Auth" in type(error).__name__:
            raise _denied(location) from error
        raise Interrupted(shown_text(str(error)) or type(error).__name__) from error


@contextlib.contextmanager
def _http(location: str, timeout: float, start: int, version: str) -> Iterator[Stream]:
    # Bytes as they are stored: sizes, digests and ranges are of those.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if start and version:
        headers["If-Range"] = version
    with _http_faults(location, timeout):
        client = httpx.Client(timeout=timeout, follow_redirects=True, max_redirects=_MAX_REDIRECTS)
        with client, client.stream("GET", location, headers=headers) as response:
            _check_status(location, response)
            yield _http_stream(response, timeout)


def _http_stream(response: httpx.Response, timeout: float) -> Stream:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        return Stream(_paced(response.iter_bytes(), timeout))
    start = 0
    if response.status_code == 206:
        match = re.match(r"bytes (\d{1,18})-", response.headers.get("content-range", ""))
        if match is None:
            raise Interrupted("the server answered with a part it does not name", restart=True)
        start = int(match.group(1))
    length = response.headers.get("content-length", "")
    return Stream(
        _paced(response.iter_raw(), timeout),
        start,
        start + int(length) if re.fullmatch(r"\d{1,18}", length) else None,
        _version(response),
    )


def _version(response: httpx.Response) -> str:
    """A strong validator: weak ETags do not promise the same bytes (RFC 9110, 13.1.5)."""
    tag: str = response.headers.get("etag", "")
    return tag if tag.startswith('"') else ""


def _check_status(location: str, response: httpx.Response) -> None:
    status, name = response.status_code, shown(location)
    if status in (200, 206):
        return
    if status in (404, 410):
        raise MissingError(f"{name} is not there (HTTP {status}); check the address")
    if status in (401, 403, 407):
        raise DeniedError(f"{name}: access denied (HTTP {status}); check credentials and signature")
    if status == 416:
        raise Interrupted("the content is shorter than it was", restart=True)
    if status in (408, 425, 429) or status >= 500:
        after = response.headers.get("retry-after", "")
        raise Interrupted(f"HTTP {status}", float(after) if after.isdecimal() else 0.0)
    raise DataError(f"{name}: HTTP {status} instead of a file; check the address")


@contextlib.contextmanager
def _http_faults(location: str, timeout: float) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise Interrupted(f"nothing came for {timeout:g} s") from error
    except httpx.TooManyRedirects as error:
        raise DataError(
            f"{shown(location)} redirects more than {_MAX_REDIRECTS} times; check the address"
        ) from error
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
        raise DataError(
            f"{shown(location)} is not an address that can be fetched: {shown_text(str(error))}"
        ) from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise Interrupted(shown_text(str(error)) or type(error).__name__) from error


def _paced(chunks: Iterator[bytes], timeout: float) -> Iterator[bytes]:
    """The chunks, unless they trickle: a peer that sends a byte now and then is as good as gone."""
    waited_s, received = 0.0, 0
    while True:
        before = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        waited_s += time.monotonic() - before
        received += len(chunk)
        if waited_s > timeout:
            if received < _MIN_BYTES_PER_S * timeout:
                raise Interrupted(f"only {received} bytes came in {waited_s:.0f} s")
            waited_s, received = 0.0, 0
        yield chunk


@contextlib.contextmanager
def _pipe(location: str, timeout: float) -> Iterator[Stream]:
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            location.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # so that the whole pipeline can be ended
        )
        assert process.stdout is not None
        try:
            chunks = _pipe_chunks(location, process, process.stdout, errors, timeout)
            yield Stream(_paced(chunks, timeout))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def _pipe_chunks(
    location: str,
    process: "subprocess.Popen[bytes]",
    output: IO[bytes],
    errors: IO[bytes],
    timeout: float,
) -> Iterator[bytes]:
    empty = True
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout):
                raise Interrupted(f"the command printed nothing for {timeout:g} s")
            chunk = os.read(output.fileno(), CHUNK_BYTES)
            if not chunk:
                break
            empty = False
            yield chunk
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise Interrupted(f"the command did not end within {timeout:g} s") from error
    errors.seek(0)
    said = shown_text(errors.read(4096).decode("utf-8", "replace"))
    reason = f": {said}" if said else ""
    if code in (126, 127):  # the shell's "cannot run it" and "no such command"
        raise DataError(f"{shown(location)}: the command cannot be run{reason}")
    if code:
        raise Interrupted(f"the command ended with code {code}{reason}")
    if empty:
        raise Interrupted(f"the command printed nothing{reason}")


@contextlib.contextmanager
def _local(location: str, start: int) -> Iterator[Stream]:
    with file_faults(location), local_path(location).open("rb") as file:
        file.seek(start)
        yield Stream(_file_chunks(file), start, os.fstat(file.fileno()).st_size)


@contextlib.contextmanager
def _remote_file(location: str, timeout: float, start: int) -> Iterator[Stream]:
    # Not kept between calls: fsspec's asynchronous file systems do not survive a fork.
    filesystem, path = file_system(location)
    with file_faults(location), filesystem.open(path, "rb") as file:
        file.seek(start)
        yield Stream(_paced(_file_chunks(file), timeout), start, getattr(file, "size", None))


def _file_chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _denied(location: str) -> DeniedError:
    return DeniedError(f"{shown(location)}: access denied; check credentials and permissions")


def _library_errors() -> tuple[type[Exception], ...]:
    """Errors of s3fs and gcsfs that are not OSError, of the modules they have imported by now."""
    names = {
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "aiohttp": ("ClientError",),
        "gcsfs.retry": ("HttpError",),
        "google.auth.exceptions": ("GoogleAuthError",),
    }
    return tuple(
        getattr(sys.modules[module], name)
        for module, classes in names.items()
        for name in classes
        if module in sys.modules
    )
