"""benchmarks/overload.py and startup.py fail when what they measure is not as it should be."""

from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.overload import Replies, find_problems
from benchmarks.startup import Start, summary

WELL = {
    "goodput_share": 0.95,
    "refused": 900,
    "failed": 0,
    "p50_ms_alone_before": 30.0,
    "p50_ms_alone_right_after": 35.0,
    "refused_or_failed_right_after": 0,
}
RELOADS = {"num_problems": 0, "problems": [], "by_fingerprint": {"a": 9, "b": 9}, "checkpoints": 2}
EXPECTED = {"a": np.array([[1.0, 0.0]]), "b": np.array([[0.0, 1.0]])}


def test_an_overload_that_went_well_has_no_problems():
    assert find_problems({"1 text": WELL}, RELOADS) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"goodput_share": 0.8}, "goodput 0.8"),
        ({"refused": 0}, "no overload"),
        ({"failed": 1}, "neither 200 nor 429"),
        ({"p50_ms_alone_right_after": 61.0}, "not recovered"),
        ({"p50_ms_alone_right_after": float("nan")}, "not recovered"),
        ({"refused_or_failed_right_after": 1}, "not recovered"),
    ],
)
def test_what_an_overload_must_not_do_is_a_problem(change: dict[str, Any], problem: str):
    (found,) = find_problems({"1 text": WELL | change}, RELOADS)
    assert problem in found


def test_a_reload_that_never_came_is_a_problem():
    (found,) = find_problems({}, RELOADS | {"by_fingerprint": {"a": 18}})
    assert "not every checkpoint" in found


def test_an_answer_must_hold_the_vector_of_the_model_it_names():
    replies = Replies()
    for maker in ("a", "b", "c"):
        content = {"fingerprint": maker, "data": [{"embedding": [1.0, 0.0]}]}
        replies.note(0, httpx.Response(200, json=content), EXPECTED)
    replies.note(0, httpx.Response(503, text="gone"), EXPECTED)
    assert [problem.split(":")[0] for problem in replies.problems] == [
        "an answer named b",
        "an answer of c, which was not served",
        "status 503",
    ]
    assert replies.fingerprints == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(("limit_s", "in_limit"), [(6.0, True), (4.9, False)])
def test_the_median_start_is_held_against_the_limit(limit_s: float, in_limit: bool):
    starts = [Start(wall_s, 3.0, 0.5) for wall_s in (4.0, 5.0, 9.0)]
    assert summary(starts, limit_s)["in_limit"] is in_limit
