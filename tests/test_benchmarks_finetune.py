"""How benchmarks/finetune.py judges; what it prints of real runs is in docs/finetune.md."""

from typing import Any

import pytest

from benchmarks.finetune import judge, read_arguments, train_data


def method(*recalls: tuple[float, float, float]) -> dict[str, Any]:
    """Rows of alpha, old recall, new recall."""
    rows = [
        {"alpha": alpha, "old": {"mean_r10": old}, "new": {"mean_r10": new}}
        for alpha, old, new in recalls
    ]
    return {"alphas": rows}


def judged(method: dict[str, Any]) -> list[tuple[float | None, ...]]:
    return [(row["kept"], row["gained"], row["of_largest"]) for row in method["alphas"]]


def test_gains_are_parts_of_the_end_s_and_of_the_largest_in_any_order() -> None:
    one = method((1.0, 0.1, 0.5), (0.0, 0.4, 0.1), (0.5, 0.2, 0.3))
    other = method((0.0, 0.4, 0.1), (1.0, 0.4, 0.2))
    judge([one, other])
    assert judged(one) == [(0.25, 1, 1), (1, 0, 0), pytest.approx((0.5, 0.5, 0.5))]
    assert judged(other) == [(1, 0, 0), pytest.approx((1, 1, 0.25))]


def test_where_nothing_was_gained_or_known_there_are_no_parts() -> None:
    alone = method((0.0, 0.0, 0.25), (1.0, 0.0, 0.125))
    judge([alone])
    assert judged(alone) == [(None, None, None)] * 2


@pytest.mark.parametrize("alphas", [["0.25", "0.5"], ["0", "0.5"], ["0", "1", "1.5"]])
def test_alphas_without_both_ends_are_refused(
    alphas: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["model", "scratch", "--alphas", *alphas])
    assert "must hold 0, the model before, 1" in capsys.readouterr().err
    assert read_arguments(["model", "scratch", "--alphas", "1", "0"]).alphas == [1, 0]


def test_rehearsal_reads_the_old_task_beside_the_new_one() -> None:
    assert train_data("new", None) == "data.train=[{path='new'}]"
    assert "{path='old-*.tar',weight=0.1}" in train_data("new", "old-*.tar")
