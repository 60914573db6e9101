"""The marks of benchmarks/service.py are met or not as they should be."""

from typing import Any

import numpy as np
import pytest

from benchmarks.service_ratios import MARKS, compare, find_problems, ratios

TEXTS = {"in process: texts": {"items_per_s": 130.0}}
PICTURES = {
    "in process: pictures": {"items_per_s": 44.0},
    "in process: pictures, resized": {"items_per_s": 80.0},
}


def service(rate: float, latency_ms: float) -> dict[str, float]:
    return {"items_per_s": rate, "p50_ms": latency_ms, "refused": 0, "failed": 0}


def measured(ours: dict[str, float]) -> dict[str, Any]:
    """Every load that has a mark: ours, and two Infinities, each better at one number; and what is
    reached in process."""
    row = {
        "clipserve": ours,
        "infinity float32": service(10, 80),
        "infinity bfloat16": service(5, 60),
        "clip-server": service(100, 1),
    }
    limits = {"1 text, 32 clients": TEXTS, "1 picture, 32 clients": PICTURES}
    return {mark.load: row | limits.get(mark.load, {}) for mark in MARKS}


def report(loads: dict[str, Any]) -> dict[str, Any]:
    return {"ratios": ratios(loads), "agreement": {}, "loads": loads}


def test_each_ratio_is_against_the_infinity_that_is_best_at_it():
    table = ratios(measured(service(40, 30)))
    fastest = table["items_per_s: 1 picture, 32 clients"]
    ours = {"ours": "clipserve", "met": True}
    assert fastest == ours | {"value": 4.0, "against": "infinity float32", "mark": ">= 4"}
    soonest = table["p50_ms: 1 text, 1 clients"]
    assert soonest == ours | {"value": 0.5, "against": "infinity bfloat16", "mark": "<= 0.5"}


def test_in_int8_ours_and_theirs_are_compared_too_and_the_rest_is_stated():
    loads = measured(service(40, 30))
    for row in loads.values():
        row |= {"clipserve int8": service(75, 18), "infinity int8": service(25, 40)}
    table = ratios(loads)
    both = table["items_per_s: 1 picture, 32 clients"]
    assert (both["value"], both["ours"], both["against"]) == (3, "clipserve int8", "infinity int8")
    assert not both["met"]
    rest = table["items_per_s: 1 picture, 32 clients, without int8"]
    assert (rest["value"], rest["ours"], rest["mark"]) == (4, "clipserve", "stated")
    soonest = table["p50_ms: 1 text, 1 clients"]
    assert (soonest["value"], soonest["against"]) == (0.45, "infinity int8")
    agreement = {"1 text": {"infinity int8": {"least_cosine": 0.995, "nearest_is_own": True}}}
    told = find_problems(report(loads) | {"agreement": agreement})
    assert not any("vectors" in problem for problem in told)


def test_the_most_that_is_served_is_held_against_what_runs_in_process():
    loads = measured(service(40, 30))
    loads["1 text, 64 clients"] = {"clipserve": service(110, 900)} | TEXTS
    table = ratios(loads)
    assert table["served / in process: texts"]["value"] == round(110 / 130, 3)
    assert not table["served / in process: texts"]["met"]
    assert table["served / in process: pictures"]["value"] == round(40 / 44, 3)
    assert table["served / towers alone: pictures"] == {
        "value": 0.5,
        "against": "in process: pictures, resized",
        "mark": "stated",
        "met": True,
    }


def test_marks_that_are_missed_are_problems():
    loads = measured(service(115, 30))
    assert find_problems(report(loads)) == []
    slow = find_problems(report(measured(service(115, 31))))
    assert slow == [f"p50_ms: {m.load}: 0.517, not <= 0.5" for m in MARKS if not m.is_least]
    few = find_problems(report(measured(service(39, 30))))
    assert "items_per_s: 1 picture, 32 clients: 3.9, not >= 4" in few


def test_what_was_not_measured_does_not_meet_its_mark():
    loads = measured(service(115, 30))
    alone = {load: {"clipserve": row["clipserve"]} for load, row in loads.items()}
    assert len(find_problems(report(alone))) == len(MARKS) + 2
    assert len(find_problems(report({}))) == len(MARKS) + 2


@pytest.mark.parametrize("kind", ["refused", "failed"])
def test_a_request_without_its_answer_is_a_problem(kind: str):
    loads = measured(service(115, 30))
    loads["1 text, 64 clients"] = {"infinity float32": service(9, 90) | {kind: 1}}
    (problem,) = find_problems(report(loads))
    assert problem == "1 text, 64 clients: requests of infinity float32 were refused or failed"


def test_vectors_of_other_items_are_noticed():
    ours = np.eye(3, 4, dtype=np.float32)
    assert compare(ours, ours) == {"least_cosine": 1.0, "nearest_is_own": True}
    alike = np.full((3, 4), 0.5, np.float32)  # as if all texts were cut to the same
    found = compare(ours, alike)
    assert not found["nearest_is_own"]
    told = report(measured(service(115, 30))) | {"agreement": {"1 text": {"infinity": found}}}
    (problem,) = find_problems(told)
    assert problem.startswith("1 text: the vectors of infinity are others than ours")
