"""benchmarks/poison.py tells what goes wrong, and ends."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

import clipserve
from benchmarks import poison
from benchmarks.poison import BOUNDS_MB, find_problems
from benchmarks.poison_clients import (
    MAY_BE_CUT_OFF,
    Good,
    Seen,
    insist,
    is_correct,
    problem_of_hits,
    problem_of_probabilities,
    problem_of_vectors,
    send,
    shuffled,
)
from service.app import create_app
from service.registry import Registry
from service.settings import load_settings
from tests.poison import Hostile

GOOD = Good("/v1/embeddings", {"input": ["a"]}, partial(problem_of_vectors, np.array([[1.0, 0.0]])))


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
    assert seen.problems == ["good request to /v1/embeddings: status 429: "]


def test_a_wrong_vector_is_a_wrong_answer():
    seen = Seen()
    assert is_correct(seen, GOOD, httpx.Response(200, json={"data": [{"embedding": [1.0, 0.0]}]}))
    for wrong in ([0.0, 1.0], [1.0, 0.0, 0.0]):
        answer = httpx.Response(200, json={"data": [{"embedding": wrong}]})
        assert not is_correct(seen, GOOD, answer)
    assert len(seen.problems) == 2


def test_a_wrong_probability_is_a_wrong_answer():
    right = np.array([[0.75, 0.25], [0.5, 0.5]])

    def problem(*results: list[tuple[str, float]]) -> str | None:
        predictions = [
            [
                {"label": label, "label_index": "ab".index(label), "probability": probability}
                for label, probability in result
            ]
            for result in results
        ]
        body = {"results": [{"predictions": one} for one in predictions]}
        return problem_of_probabilities(["a", "b"], right, body)

    even = [("a", 0.5), ("b", 0.5)]
    assert problem([("a", 0.751), ("b", 0.249)], even) is None
    for wrong in ([("b", 0.75), ("a", 0.25)], even, [("a", 0.75)], []):
        assert "off by" in (problem(wrong, even) or "")
    assert problem(even) == "1 results in the place of 2"
    unreadable = {"results": [{"error": {}}] * 2}
    assert problem_of_probabilities(["a", "b"], right, unreadable) is not None


def test_a_wrong_hit_is_a_wrong_answer():
    right = np.array([[0.9, 0.1, 0.5, 0.499]])

    def problem(*hits: tuple[int, float], of: int = 0) -> str | None:
        told = [{"id": str(i), "score": score, "metadata": {"n": i + of}} for i, score in hits]
        return problem_of_hits(right, 2, {"results": [{"hits": told}]})

    assert problem((0, 0.9), (2, 0.5)) is None
    assert problem((0, 0.899), (3, 0.501)) is None  # as good, in the service's precision
    assert "not the 2 best" in (problem((2, 0.5), (0, 0.9)) or "")
    assert "not the 2 best" in (problem((0, 0.9), (0, 0.9)) or "")
    assert "not the 2 best" in (problem((0, 0.9)) or "")
    assert "off by" in (problem((0, 0.9), (2, 0.4)) or "")
    assert "passed over" in (problem((0, 0.9), (1, 0.1)) or "")
    assert "metadata" in (problem((0, 0.9), (2, 0.5), of=1) or "")
    assert problem_of_hits(right, 2, {"results": []}) == "0 results in the place of 1"


def test_good_requests_are_answered_rightly_and_not_by_what_another_item_gets(tmp_path: Path):
    path = poison._make_model(tmp_path)
    registry = Registry(load_settings(decode_threads=2))
    model = registry.add_model(clipserve.load(path, device="cpu", dtype="fp32")).model
    vectors = poison._item_vectors(model)
    registry.add_collection(poison._make_collection(model, vectors, tmp_path / "toys"))
    requests = poison.good_requests(model, vectors)
    try:
        app = create_app(registry.settings, registry)
        with TestClient(app, base_url="http://localhost") as client:
            answers = [client.post(good.path, json=good.body).json() for good in requests]
    finally:
        registry.close()
    for good, answer in zip(requests, answers, strict=True):
        assert good.problem(answer) is None
        name = "data" if good.path == "/v1/embeddings" else "results"
        first, *others = answer[name]
        assert good.problem({name: [*others, first]}) is not None, good.body


def test_a_round_holds_every_row_once():
    rows = [Hostile(str(i), "/", b"") for i in range(9)]
    order = shuffled([*rows, b"a"], 15)
    assert {row.name for row in order[:10] if isinstance(row, Hostile)} == {r.name for r in rows}
    assert len(order) == 15
