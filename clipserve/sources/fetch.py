"""Pictures behind http and https addresses -> bytes, with limits. Start at `Fetcher`.

The addresses are from the user's own table, so local ones are allowed; what answers is not trusted:
its size, its time, its redirects and its patience for retries are bounded.
"""

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from clipserve.errors import SampleError
from clipserve.images import ImageLimits, read_limited
from clipserve.sources import Record, Url

KIND = "fetch_failed"
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class FetchLimits:
    """What one picture may cost to fetch."""

    threads: int = 32
    """fetches at once"""
    timeout_s: float = 10.0
    """to connect, and between two pieces of an answer"""
    total_s: float = 60.0
    """for one whole answer"""
    max_redirects: int = 5
    tries: int = 3
    """for what may pass: no connection, a timeout, a cut answer, status 408, 425, 429 or 5xx"""
    backoff_s: float = 0.5
    """before the second try; twice that before the third"""


class Fetcher:
    """A pool of connections, shared by threads. Close it, or use it in a `with` statement."""

    def __init__(self, max_bytes: int, limits: FetchLimits = FetchLimits()) -> None:
        self._max_bytes, self._limits = max_bytes, limits
        self._lock = threading.Lock()
        self._made: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
            self._made = None

    def fetch(self, url: Url) -> bytes:
        """At most `max_bytes`. Raises SampleError of kind "fetch_failed", naming the status."""
        for attempt in range(1, self._limits.tries + 1):
            try:
                return self._get(url)
            except _Passing as passing:
                if attempt == self._limits.tries:
                    reason = f"{_shown(url)}: {passing} ({attempt} tries)"
                    raise SampleError(reason, KIND) from None
                wait = self._limits.backoff_s * 2 ** (attempt - 1)
                time.sleep(wait * random.uniform(0.5, 1.5))
        raise AssertionError("tries is at least 1")

    def _get(self, url: Url) -> bytes:
        try:
            with self._client().stream("GET", url.address) as response:
                return self._read(url, response)
        except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise SampleError(f"{_shown(url)}: {error}", KIND) from None
        except httpx.DecodingError as error:
            raise SampleError(f"{_shown(url)}: damaged answer: {error}", KIND) from None
        except httpx.TimeoutException:
            raise _Passing(f"no answer within {self._limits.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise _Passing(str(error) or type(error).__name__) from None

    def _read(self, url: Url, response: httpx.Response) -> bytes:
        status = f"status {response.status_code} {response.reason_phrase}".rstrip()
        if response.status_code in _TRANSIENT_STATUS:
            raise _Passing(status)
        if response.status_code != httpx.codes.OK:
            raise SampleError(f"{_shown(url)}: {status}", KIND)
        deadline = time.monotonic() + self._limits.total_s
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > self._max_bytes:
                raise SampleError(f"{_shown(url)}: over {self._max_bytes} bytes", KIND)
            if time.monotonic() > deadline:
                reason = f"{_shown(url)}: not whole after {self._limits.total_s:g} s"
                raise SampleError(reason, KIND)
        return bytes(data)

    def _client(self) -> httpx.Client:
        with self._lock:  # made when the first URL is met: reading certificates takes its time
            if self._made is None:
                threads = self._limits.threads
                self._made = httpx.Client(
                    headers={"user-agent": "clipserve", "accept-encoding": "identity"},
                    follow_redirects=True,
                    max_redirects=self._limits.max_redirects,
                    timeout=httpx.Timeout(self._limits.timeout_s, pool=None),
                    limits=httpx.Limits(max_connections=threads, max_keepalive_connections=threads),
                )
            return self._made


def read_image(record: Record, limits: ImageLimits, fetcher: Fetcher) -> bytes:
    """The bytes of a record's picture, wherever they are. Raises OSError and SampleError."""
    if isinstance(record.image, Path):
        return read_limited(record.image, limits.max_bytes)
    if isinstance(record.image, Url):
        return fetcher.fetch(record.image)
    return record.image


class _Passing(Exception):
    """A failure that may be gone at the next try."""


def _shown(url: Url) -> str:
    """The address without credentials and query, which may hold secrets."""
    try:
        parts = urlsplit(url.address)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        return "a malformed address"
    return f"{parts.scheme}://{host}{parts.path}"
