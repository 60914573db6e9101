"""benchmarks/poison.py tells what goes wrong, and ends."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.poison import BOUNDS_MB, find_problems
from benchmarks.poison_clients import (
    MAY_BE_CUT_OFF,
    Good,
    Seen,
    insist,
    is_correct,
    send,
    shuffled,
)
from tests.poison import Hostile

GOOD = Good({"input": ["a"]}, np.array([[1.0, 0.0]]))


def report(**changes: Any) -> dict[str, Any]:
    memory = {"start": 700.0, "half way": 800.0, "end": 850.0, "peak": 1500.0}
    told = {
        "hostile_requests": 5000,
        "good_requests": 500,
        "good_answered_correctly": 500,
        "rss_mb": memory,
        "bounds_mb": BOUNDS_MB,
        "tracebacks_in_the_log": 0,
    }
    return told | changes


def client(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://service")


def close(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("closed")


def test_a_run_that_went_well_has_no_problems():
    assert find_problems(report(), 5000, 500) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"good_requests": 40, "good_answered_correctly": 40}, "40 of 500 good ones in time"),
        ({"hostile_requests": 4999}, "only 4999 of 5000 hostile"),
        ({"good_answered_correctly": 499}, "1 good requests were not answered correctly"),
        ({"tracebacks_in_the_log": 2}, "2 tracebacks"),
    ],
)
def test_a_shortfall_is_a_problem(changes: dict[str, int], problem: str):
    (found,) = find_problems(report(**changes), 5000, 500)
    assert problem in found


@pytest.mark.parametrize(
    ("which", "megabytes"), [("end", 1300.0), ("peak", 2800.0)], ids=["a leak", "a peak"]
)
def test_memory_over_its_bound_is_a_problem(which: str, megabytes: float):
    memory = report()["rss_mb"] | {which: megabytes}
    (found,) = find_problems(report(rss_mb=memory), 5000, 500)
    assert found.startswith("memory: ")


def test_only_a_large_body_may_be_cut_off_and_it_is_counted():
    seen = Seen()
    send(client(close), seen, Hostile("large", "/", b"a" * MAY_BE_CUT_OFF))
    assert (seen.cut_off["large"], seen.problems) == (1, [])
    send(client(close), seen, Hostile("small", "/", b"a"))
    assert seen.problems == ["small: ReadError"]
    assert not seen.answered


def test_an_answer_that_is_late_is_a_problem_whatever_the_body():
    def wait(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late")

    seen = Seen()
    send(client(wait), seen, Hostile("large", "/", b"a" * MAY_BE_CUT_OFF))
    assert seen.problems == ["large: ReadTimeout"]


def test_a_service_that_stays_busy_is_not_asked_beyond_the_deadline():
    busy = client(lambda request: httpx.Response(429, headers={"Retry-After": "60"}))
    seen = Seen()
    answer = insist(busy, seen, GOOD, time.monotonic() + 30)
    assert not is_correct(seen, GOOD, answer)
    assert seen.problems == ["good request: status 429: "]


def test_a_wrong_vector_is_a_wrong_answer():
    seen = Seen()
    assert is_correct(seen, GOOD, httpx.Response(200, json={"data": [{"embedding": [1.0, 0.0]}]}))
    for wrong in ([0.0, 1.0], [1.0, 0.0, 0.0]):
        answer = httpx.Response(200, json={"data": [{"embedding": wrong}]})
        assert not is_correct(seen, GOOD, answer)
    assert len(seen.problems) == 2


def test_a_round_holds_every_row_once():
    rows = [Hostile(str(i), "/", b"") for i in range(9)]
    order = shuffled([*rows, b"a"], 15)
    assert {row.name for row in order[:10] if isinstance(row, Hostile)} == {r.name for r in rows}
    assert len(order) == 15
