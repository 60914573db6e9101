"""Jobs over a connection that breaks: nothing is sent twice, and an end is told as what it is."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import clipserve
from clipserve.errors import RequestRefused, ServiceFailed, ServiceUnreachable

ITEMS = [{"id": str(i), "text": f"text {i}"} for i in range(5)]


class Jobs:
    """One job of a service. `losing`: the last part of an address, and how its requests are lost:
    before they arrive, or after, as answers."""

    def __init__(self, **losing: str) -> None:
        self.losing = losing
        self.lines: list[Any] = []
        self.states: Iterator[str] = iter(["running", "running", "done"])
        self.state = "open"
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        call = request.url.path.rpartition(":")[2] if ":" in request.url.path else request.method
        self.asked.append(call)
        how = self.losing.pop(call, None)
        if how == "before":
            raise httpx.ConnectError("refused")
        answer = self.answer(call, request)
        if how == "after":
            raise httpx.ReadError("the answer was lost")
        return httpx.Response(answer.pop("status", 200), json=answer)

    def answer(self, call: str, request: httpx.Request) -> dict[str, Any]:
        if call == "append":
            self.lines += [json.loads(line) for line in request.content.splitlines()]
        elif call == "start" and self.state != "open":
            fields = {"message": "no", "type": "t", "param": None, "code": "job_not_open"}
            return {"status": 400, "error": fields}
        elif call == "start":
            self.state = "queued"
        elif call == "DELETE":
            self.state = "cancelled"
        elif call == "GET" and self.state not in ("open", "cancelled"):
            self.state = next(self.states, self.state)
        total = len(self.lines)
        fields = {"id": "job-1", "state": self.state, "total": total, "done": total // 2}
        return {**fields, "failed": [], "error": "the disk is full"}

    def client(self, **settings: Any) -> clipserve.Client:
        client = clipserve.Client(transport=httpx.MockTransport(self), **settings)
        client._client._transport._sleep = _do_not_wait
        return client


async def _do_not_wait(_: float) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("call", ["POST", "append", "start"])
@pytest.mark.parametrize("how", ["before", "after"])
def test_a_broken_connection_sends_every_item_once(call: str, how: str):
    jobs = Jobs(**{call: how})
    with jobs.client() as client:
        client.start_job("toys", ITEMS)
    assert jobs.lines == ITEMS
    assert jobs.state != "open"
    assert "DELETE" not in jobs.asked


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_later_part_that_is_lost_is_looked_for_beside_those_before_it(how: str):
    jobs = Jobs()
    items = [{"id": str(i), "text": "x"} for i in range(1500)]
    with jobs.client() as client:
        client.start_job("toys", items, progress=lambda *_: jobs.losing.update(append=how))
    assert jobs.lines == items


def test_a_job_that_cannot_be_sent_is_withdrawn_and_says_why():
    jobs = Jobs(append="before")
    with jobs.client(retries=0) as client, pytest.raises(ServiceUnreachable, match="refused"):
        client.start_job("toys", ITEMS)
    assert jobs.state == "cancelled"


def test_why_a_job_was_not_sent_is_not_hidden_by_why_it_stays():
    jobs = Jobs(append="before", DELETE="before")
    with jobs.client(retries=0) as client, pytest.raises(ServiceUnreachable) as caught:
        client.start_job("toys", ITEMS)
    assert ":append" not in str(caught.value)
    assert caught.value.__notes__[0].startswith("the job job-1 is left: ")
    assert jobs.asked == ["POST", "append", "DELETE"]


def test_a_job_is_asked_for_until_it_has_ended():
    jobs = Jobs()
    told = []
    with jobs.client() as client:
        client.start_job("toys", ITEMS)
        done = client.follow_job("job-1", progress=lambda *one: told.append(one))
    assert done["state"] == "done"
    assert told == [(2, 5)] * 3


@pytest.mark.parametrize(
    ("end", "kind", "told"),
    [
        ("failed", ServiceFailed, "job job-1 failed: the disk is full"),
        ("cancelled", RequestRefused, "job job-1 was cancelled after 2 of 5 items"),
    ],
)
def test_another_end_than_done_is_an_error(end: str, kind: type[Exception], told: str):
    jobs = Jobs()
    jobs.states = iter(["running", end])
    with jobs.client() as client:
        client.start_job("toys", ITEMS)
        with pytest.raises(kind, match=told):
            client.follow_job("job-1")
