"""One request and its answer: timeouts, when to try again, and what an error becomes."""

import asyncio
import datetime
import email.utils
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

import httpx

from clipserve import __version__
from clipserve.errors import (
    AccessDenied,
    NotThere,
    RequestRefused,
    ServiceError,
    ServiceFailed,
    ServiceOverloaded,
    ServiceUnreachable,
)

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0


class Transport:
    """Sends requests to one service. `retries`: how often an idempotent one is tried again."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        connections: int = 16,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        headers = {
            "User-Agent": f"clipserve/{__version__}",
            "X-Request-Timeout": f"{timeout_s:g}",  # the service drops what nobody waits for
        }
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections),
            transport=transport,
        )
        self._url = url
        self._retries = retries
        self._sleep = sleep

    async def close(self) -> None:
        await self._http.aclose()

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        lines: Sequence[Any] | None = None,
        as_bytes: bool = False,
        idempotent: bool = True,
        look: Callable[[], Awaitable[Any]] | None = None,
    ) -> Any:
        """The answer's JSON, or its bytes, to a body of JSON or of lines of it.

        Raises ServiceError, the kind of which says what to do. What is not idempotent is sent again
        only after a 429, which says that nothing was done; or where `look` finds out what was: the
        answer, or None.
        """
        for attempt in range(self._retries + 1):
            try:
                answer = await self._try(method, path, body, lines)
                return answer.content if as_bytes else self._json(answer)
            except (ServiceUnreachable, ServiceOverloaded) as error:
                is_undone = error.status == 429
                if attempt == self._retries or not (idempotent or is_undone):
                    raise
                await self._sleep(_pause_s(error, attempt))
                if look is not None and not is_undone and (found := await look()) is not None:
                    return found
        raise AssertionError

    async def pause(self, seconds: float) -> None:
        """Between two requests."""
        await self._sleep(seconds)

    async def _try(
        self, method: str, path: str, body: Any, lines: Sequence[Any] | None
    ) -> httpx.Response:
        how: dict[str, Any] = {"json": body}
        if lines is not None:
            content = "\n".join(map(json.dumps, lines)) + "\n"
            how = {"content": content, "headers": {"Content-Type": "application/x-ndjson"}}
        try:
            answer = await self._http.request(method, path, **how)
        except httpx.TimeoutException:
            raise ServiceUnreachable(
                f"{self._url} did not answer {method} {path} in time"
            ) from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ServiceUnreachable(f"{self._url} cannot be reached: {reason}") from None
        if not answer.is_success:
            raise read_error(answer)
        return answer

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            asked = f"{answer.request.method} {answer.request.url.raw_path.decode()}"
            raise ServiceFailed(
                f"{self._url} answered {asked} with something that is not JSON; is a clipserve"
                " service there?",
                status=answer.status_code,
            ) from None


def read_error(answer: httpx.Response) -> ServiceError:
    """From the service's error body, or from the status alone where a proxy answered."""
    try:
        fields = answer.json()["error"]
        message, code, param = str(fields["message"]), fields["code"], fields["param"]
    except (ValueError, KeyError, TypeError):
        message, code, param = f"HTTP {answer.status_code} {answer.reason_phrase}", None, None
    status = answer.status_code
    error = _kind(status)(message, status=status, code=code, param=param)
    if isinstance(error, ServiceOverloaded):
        error.retry_after_s = _retry_after_s(answer.headers.get("retry-after", ""))
    return error


def address(*parts: str) -> str:
    """An address below /v1, of any texts."""
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


def _kind(status: int) -> type[ServiceError]:
    if status in (429, 503):
        return ServiceOverloaded
    if status >= 500:
        return ServiceFailed
    if status in (401, 403):
        return AccessDenied
    return NotThere if status == 404 else RequestRefused


def _pause_s(error: ServiceError, attempt: int) -> float:
    """What the service asked for; else twice as long each time, spread so that clients part."""
    asked = error.retry_after_s if isinstance(error, ServiceOverloaded) else None
    if asked is not None:
        return min(asked, _LONGEST_PAUSE_S)
    longest: float = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
    return longest * random.uniform(0.5, 1.0)


def _retry_after_s(value: str) -> float | None:
    """Of the header's two forms, seconds and a date."""
    if value.isdigit():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000" is how a date says UTC and nothing of a place
        date = date.replace(tzinfo=datetime.UTC)
    return max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
