"""One request and its answer: what is tried again, after which pause, and what an error becomes."""

import asyncio
import datetime
import email.utils
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from clipserve.client.transport import Transport, address
from clipserve.errors import (
    AccessDenied,
    NotThere,
    RequestRefused,
    ServiceError,
    ServiceFailed,
    ServiceOverloaded,
    ServiceUnreachable,
)

OK = httpx.Response(200, json={"fine": True})


def refusal(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    fields = {"message": "no", "type": "t", "param": "input[2]", "code": code}
    return httpx.Response(status, json={"error": fields}, headers=headers)


class Service:
    """Gives prepared answers one after the other, and notes what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception, **settings: Any) -> None:
        self.requests: list[httpx.Request] = []
        self.pauses: list[float] = []
        left: Iterator[httpx.Response | Exception] = iter(answers)

        def answer(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            found = next(left)
            if isinstance(found, Exception):
                raise found
            return found

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)

        transport = httpx.MockTransport(answer)
        self.transport = Transport("http://there", transport=transport, sleep=sleep, **settings)

    def call(self, method: str = "POST", path: str = "/v1/x", **how: Any) -> Any:
        async def run() -> Any:
            try:
                return await self.transport.call(method, path, {"a": 1}, **how)
            finally:
                await self.transport.close()

        return asyncio.run(run())


def test_a_busy_service_is_asked_again_after_the_time_it_names():
    service = Service(refusal(429, **{"Retry-After": "7"}), OK)
    assert service.call() == {"fine": True}
    assert service.pauses == [7.0]


def test_the_time_may_be_a_date():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    date = email.utils.format_datetime(soon, usegmt=True)
    service = Service(refusal(503, **{"Retry-After": date}), OK)
    service.call()
    assert 10 < service.pauses[0] <= 20


def test_a_date_that_names_no_place_is_utc():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    date = email.utils.format_datetime(soon.replace(tzinfo=None))
    assert date.endswith("-0000")
    service = Service(refusal(503, **{"Retry-After": date}), OK)
    service.call()
    assert 10 < service.pauses[0] <= 20


def test_pauses_grow_and_differ_when_no_time_is_named():
    service = Service(*[refusal(503, **{"Retry-After": "soon"})] * 4, OK)
    service.call()
    longest = [0.25, 0.5, 1.0, 2.0]
    assert all(top / 2 <= got <= top for got, top in zip(service.pauses, longest, strict=True))
    assert service.pauses != longest


def test_a_service_may_not_ask_for_hours():
    service = Service(refusal(429, **{"Retry-After": "86400"}), OK)
    service.call()
    assert service.pauses == [30.0]


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ReadError(""), httpx.ReadTimeout("late")]
)
def test_a_broken_connection_is_tried_again(error: Exception):
    service = Service(error, OK)
    assert service.call() == {"fine": True}
    assert len(service.requests) == 2


def test_after_so_many_tries_the_last_error_is_raised():
    service = Service(*[httpx.ConnectError("refused")] * 3, retries=2)
    with pytest.raises(ServiceUnreachable, match="http://there cannot be reached: refused"):
        service.call()
    assert len(service.requests) == 3


@pytest.mark.parametrize("answer", [httpx.ReadError("broken"), refusal(503)])
def test_what_must_not_happen_twice_is_not_sent_twice(answer: Any):
    service = Service(answer, OK)
    with pytest.raises(ServiceError):
        service.call(idempotent=False)
    assert len(service.requests) == 1


def test_even_that_is_sent_again_when_nothing_was_done():
    assert Service(refusal(429), OK).call(idempotent=False) == {"fine": True}


@pytest.mark.parametrize(("found", "sent"), [({"was": "done"}, 1), (None, 2)])
def test_it_is_sent_again_when_a_look_shows_that_it_did_not_arrive(found: Any, sent: int):
    async def look() -> Any:
        return found

    service = Service(httpx.ReadError("broken"), OK)
    assert service.call(look=look) == (found or {"fine": True})
    assert len(service.requests) == sent


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRefused),
        (401, AccessDenied),
        (403, AccessDenied),
        (404, NotThere),
        (413, RequestRefused),
        (422, RequestRefused),
        (500, ServiceFailed),
        (504, ServiceFailed),
    ],
)
def test_errors_are_of_a_kind_and_not_tried_again(status: int, kind: type[ServiceError]):
    service = Service(refusal(status), OK)
    with pytest.raises(ServiceError) as caught:
        service.call()
    error = caught.value
    assert type(error) is kind
    assert (str(error), error.status, error.code, error.param) == (
        "no",
        status,
        "some_code",
        "input[2]",
    )
    assert len(service.requests) == 1


def test_a_proxys_error_tells_its_status():
    service = Service(httpx.Response(502, text="<html>bad gateway"))
    with pytest.raises(ServiceFailed, match="HTTP 502"):
        service.call()


def test_an_overloaded_service_says_when_to_come_back():
    service = Service(refusal(429, **{"Retry-After": "3"}), retries=0)
    with pytest.raises(ServiceOverloaded) as caught:
        service.call()
    assert caught.value.retry_after_s == 3.0


def test_something_that_is_not_json_is_no_answer():
    service = Service(httpx.Response(200, text="hello"))
    with pytest.raises(ServiceFailed, match="not JSON"):
        service.call()


def test_the_key_and_the_deadline_go_with_every_request():
    service = Service(OK, api_key="csk_secret", timeout_s=2.5)
    service.call()
    headers = service.requests[0].headers
    assert headers["authorization"] == "Bearer csk_secret"
    assert headers["x-request-timeout"] == "2.5"
    assert headers["user-agent"].startswith("clipserve/")


def test_lines_are_a_json_value_each():
    service = Service(OK)
    service.call(lines=[{"id": "a\nb"}, {"id": "c"}])
    request = service.requests[0]
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.content == b'{"id": "a\\nb"}\n{"id": "c"}\n'


def test_addresses_hold_any_name():
    assert address("collections", "a/b c", "items") == "/v1/collections/a%2Fb%20c/items"


def test_the_kinds_can_be_caught_as_one() -> None:
    kinds: list[Callable[..., Exception]] = [ServiceUnreachable, ServiceOverloaded, NotThere]
    assert all(isinstance(kind("x"), ServiceError) for kind in kinds)
