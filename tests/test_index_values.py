import math
import random
from typing import Any

import numpy as np
import pytest
from filtered import PATHS, expected, is_refused
from test_index_columns import Rows

from clipserve.errors import FilterError
from index import columns as columns_module
from index.columns import Columns
from index.filters import parse


def check(filter: Any, holds: list[Any], fails: list[Any]) -> None:
    """For which values of field "a"; ... stands for a row that has none."""
    rows = Rows(*({} if value is ... else {"a": value} for value in [*holds, *fails]))
    mask = Columns(rows).mask(parse(filter), rows.rowids())
    assert mask.dtype == bool
    assert mask.tolist() == [True] * len(holds) + [False] * len(fails)


NUMBERS = [0, 1, -1, 1.0, 0.5, -0.0, 2**53, 2**53 + 1, 2**53 + 2, 2.0**60, 2**60, 2**60 + 1]
NUMBERS += [2**63 - 1, -(2**63), 2**63, 2**64 + 1, -(2**70), 1e300, -1e-300, 7.25]
TEXTS = ["", "a", "ab", "b", "B", "1", "a\0", "a\0b", "\u00e9", "\u732b", "\uffff", "\U0001f431"]
SCALARS = [None, True, False, *NUMBERS, *TEXTS]


def random_value(random: random.Random) -> Any:
    if random.random() < 0.7:
        return random.choice(SCALARS)
    if random.random() < 0.2:
        return {"x": random.choice(SCALARS)}
    elements = [random.choice(SCALARS) for _ in range(random.randint(0, 4))]
    return random.choice([elements, [*elements, [1, "a"]], [*elements, {"x": 1}], [10**400]])


def random_metadata(random: random.Random) -> Any:
    metadata = {}
    for path in PATHS.values():
        if random.random() < 0.7:
            inside = random_value(random)
            metadata[path[0]] = {path[1]: inside} if len(path) > 1 else inside
    return metadata


def random_filter(random: random.Random, depth: int = 3) -> Any:
    if depth and random.random() < 0.5:
        some = [random_filter(random, depth - 1) for _ in range(random.randint(0, 3))]
        return random.choice([{"and": some}, {"or": some}, {"not": {"and": some}}])
    operator = random.choice(["eq", "ne", "in", "gt", "gte", "lt", "lte", "exists"])
    value: Any = random.choice(SCALARS)
    if operator == "in":
        value = [random.choice(SCALARS) for _ in range(random.choice([0, 1, 2, 5, 20]))]
    elif operator == "exists":
        value = random.random() < 0.5
    elif operator in ("gt", "gte", "lt", "lte"):
        value = random.choice(NUMBERS + TEXTS)
    return {random.choice(list(PATHS)): {operator: value}}


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_what_the_language_says_row_by_row(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns_module, "SEGMENT_ROWS", 60)
    generator = random.Random(seed)
    rows = Rows(*(random_metadata(generator) for _ in range(200)))
    columns = Columns(rows)
    for step in range(300):
        if step % 10 == 0:
            rows.add(*(random_metadata(generator) for _ in range(generator.randint(1, 5))))
            rows.delete(*generator.sample(list(rows.live), 3))
        rowids = rows.rowids()
        if step % 3 == 0:
            rowids = rowids[np.random.default_rng(step).random(len(rowids)) < 0.3]
        filter = random_filter(generator)
        mask = columns.mask(parse(filter), rowids)
        truth = [expected(filter, rows.live[rowid]) for rowid in rowids.tolist()]
        assert mask.tolist() == truth, filter


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_refused_where_the_language_says_so(seed: int) -> None:
    generator = random.Random(seed)
    outcomes = set()
    for _ in range(300):
        rows = Rows(*(random_metadata(generator) for _ in range(generator.randint(1, 4))))
        filter, metadata = random_filter(generator), list(rows.live.values())
        try:
            mask = Columns(rows).mask(parse(filter), rows.rowids())
        except FilterError:
            assert is_refused(filter, metadata), filter
            outcomes.add("refused")
        else:
            assert not is_refused(filter, metadata), filter
            assert mask.tolist() == [expected(filter, each) for each in metadata]
            outcomes.add("answered")
    assert outcomes == {"refused", "answered"}


def test_a_missing_value_is_not_equal_and_does_not_exist() -> None:
    check({"a": {"eq": "x"}}, ["x"], [..., None])
    check({"a": {"ne": "x"}}, [..., None], ["x"])
    check({"a": None}, [None], [..., "x"])
    check({"a": {"exists": True}}, [None, [], {}, "x"], [...])
    check({"a": {"exists": False}}, [...], [None, [], {}, "x"])
    check({"a": {"gt": 0}}, [1], [..., None])
    check({"not": {"a": {"gt": 0}}}, [..., None], [1])
    check({"a": {"in": []}}, [], [..., None, 1])


def test_true_and_false_are_no_numbers() -> None:
    check({"a": 1}, [1, 1.0], [True, "1"])
    check({"a": True}, [True], [1, False, "true"])
    check({"a": {"in": [0, True]}}, [True, 0], [False, 1])
    check({"a": {"gte": 0}}, [2], [False, True])
    check({"a": {"ne": False}}, [0, True], [False])


def test_large_integers_and_floats_are_compared_exactly() -> None:
    check({"a": 2**53 + 1}, [2**53 + 1], [2**53, 2**53 + 2, 2.0**53])
    check({"a": 2.0**53}, [2**53, 2.0**53], [2**53 + 1])
    check({"a": {"gt": 2**53}}, [2**53 + 1, 2**62], [2**53, 2.0**53, -(2**62)])
    check({"a": {"gt": 2**62}}, [2**62 + 1, 2.0**63], [2**62, 2.0**62])
    check({"a": {"lte": 2**62 + 1}}, [2**62 + 1, 2.0**62], [2**62 + 2])
    check({"a": {"lt": 0.1}}, [math.nextafter(0.1, 0), 0], [0.1])
    check({"a": {"in": [*range(20), -0.0]}}, [-0.0, 0, 19], [20, 0.5])


def test_integers_beyond_64_bits_are_the_nearest_float() -> None:
    check({"a": 2**70}, [2**70, 2**70 + 1, 2.0**70], [2**71])
    check({"a": {"gt": 1e308}}, [10**400], [-(10**400), 1])
    check({"a": {"lt": 2**63}}, [2**63 - 1, -(2**63)], [2**63, 2.0**63])


def test_strings_are_ordered_by_code_point() -> None:
    texts = ["", "a", "a\0", "ab", "\u00e9", "\uffff", "\U0001f431"]
    check({"a": {"gt": "a"}}, texts[2:], texts[:2])
    check({"a": {"lte": "\uffff"}}, texts[:-1], texts[-1:])
    check({"a": {"gte": "aa", "lt": "\u00ea"}}, texts[3:5], texts[5:])
    check({"a": {"gt": "5"}}, ["7"], [7])


@pytest.mark.parametrize("count", [1, 2, 126, 127, 128, 129, 300, 32768, 32769])
def test_any_number_of_distinct_strings(count: int) -> None:
    rows = Rows(*({"a": f"{i:05d}"} for i in range(count)), {"a": 1}, {})
    columns, rowids = Columns(rows), rows.rowids()
    last = f"{count - 1:05d}"
    for filter, number in [
        ({"a": last}, 1),
        ({"a": {"lt": last}}, count - 1),
        ({"a": {"gt": last}}, 0),
        ({"a": {"gte": "00000"}}, count),
        ({"a": {"ne": last}}, count + 1),
        ({"a": {"in": [last, "x"]}}, 1),
        ({"a": {"in": [last, *"abcdefghi"]}}, 1),
    ]:
        assert columns.mask(parse(filter), rowids).sum() == number


def test_a_list_matches_by_any_of_its_elements() -> None:
    with_red = [["red"], ["blue", "red"], "red"]
    without = [[], ["blue", 5], [["red"]], [{"a": "red"}]]
    check({"a": "red"}, with_red, without)
    check({"a": {"ne": "red"}}, without, with_red)
    check({"a": {"gt": 4}}, [["blue", 5]], [["9"], [4], []])
    check({"a": {"gt": 4, "lt": 3}}, [[1, 9]], [[4]])
    check({"a.b": 1}, [{"b": 1}, {"b": [1]}], [[{"b": 1}], {"b": {"b": 1}}])
