import json
from typing import Any

import pytest

from clipserve.errors import FilterError, IndexStoreError
from index.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_TEXT_BYTES,
    MAX_VALUES,
    And,
    Condition,
    Not,
    Or,
    parse,
    parse_text,
)


def nested(depth: int) -> Any:
    value: Any = {"a": 1}
    for _ in range(depth):
        value = {"or": [value, {"b": 1}]}
    return value


def test_a_filter_is_a_tree_of_conditions() -> None:
    assert parse({"color": "red"}) == Condition(("color",), "in", ("red",))
    price = parse({"price": {"lt": 10, "gte": 2.5}})
    assert isinstance(price, And)
    assert set(price.parts) == {
        Condition(("price",), "lt", (10,)),
        Condition(("price",), "gte", (2.5,)),
    }
    either = parse({"or": [{"a": {"exists": True}}, {"not": {"b": {"in": [1, 2]}}}]})
    assert isinstance(either, Or)
    assert set(either.parts) == {
        Condition(("a",), "exists", ()),
        Not(Condition(("b",), "in", (1, 2))),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": {"eq": 2}, "a": {"in": [1.0]}}),
        ({"a": {"ne": 1}}, {"not": {"a": 1}}),
        ({"a": {"exists": False}}, {"not": {"a": {"exists": True}}}),
        ({"not": {"not": {"a": 1}}}, {"a": 1}),
        ({"and": [{"a": 1}, {"and": [{"b": 1}, {"a": 1}]}]}, {"b": 1, "a": 1}),
        ({"a": {"in": ["y", "x", "y"]}}, {"a": {"in": ["x", "y"]}}),
        ({"a": -0.0}, {"a": 0}),
        ({"a": 2**70}, {"a": float(2**70)}),
        ({}, {"and": []}),
    ],
)
def test_filters_that_mean_the_same_are_one_key(one: Any, other: Any) -> None:
    assert parse(one) == parse(other)
    assert hash(parse(one)) == hash(parse(other))
    assert str(parse(one)) == str(parse(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 0}, {"a": False}),
        ({"a": "1"}, {"a": 1}),
        ({"a": None}, {"a": {"exists": False}}),
        ({"a": 2**53}, {"a": 2**53 + 1}),
        ({"a.b": 1}, {"a\\.b": 1}),
        ({"and": []}, {"or": []}),
        ({"and": [{"a": 1}, {"b": 1}]}, {"or": [{"a": 1}, {"b": 1}]}),
        ({"a": {"lt": 1}}, {"a": {"lte": 1}}),
    ],
)
def test_filters_that_differ_have_different_keys(one: Any, other: Any) -> None:
    assert parse(one) != parse(other)
    assert str(parse(one)) != str(parse(other))


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"in": [1, True, None, "x", 0.5]}},
        {"a\\.b\\\\c.d": {"gt": "x"}, "\\not": 1, "\\and.or": {"exists": True}},
        {"or": [{"a": {"lt": 1}}, {"not": {"b": "\u732b \"'\n"}}]},
        {"and": []},
        {"or": []},
    ],
)
def test_the_key_of_a_filter_is_that_filter_as_json(value: Any) -> None:
    assert parse(json.loads(str(parse(value)))) == parse(value)
    assert parse_text(json.dumps(value)) == parse(value)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("size.width", ("size", "width")),
        (r"a\.b.c", ("a.b", "c")),
        (r"\and", ("and",)),
        (r"a\\b", ("a\\b",)),
        ("\u732b", ("\u732b",)),
    ],
)
def test_a_name_is_keys_with_dots_between(name: str, path: tuple[str, ...]) -> None:
    assert parse({name: 1}).fields() == {path}


def test_a_filter_knows_its_fields() -> None:
    value = {"a": 1, "or": [{"b.c": {"gt": 1}}, {"not": {"a": {"exists": True}}}]}
    assert parse(value).fields() == {("a",), ("b", "c")}
    assert parse({}).fields() == frozenset()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], r"filter is \[\]; it must be an object"),
        ("color", "filter is 'color'; it must be an object"),
        (None, "filter is null"),
        ({"a": {}}, r"filter\.a is \{\}; it must have an operator: eq, ne"),
        ({"a": {"equals": 1}}, r"filter\.a: 'equals' is not an operator; use eq, .* with a dot"),
        ({"a": {"eq": [1]}}, r"filter\.a\.eq is a list of 1; .* use in"),
        ({"a": ["x", "y"]}, r"filter\.a\.eq is a list of 2; .* use in"),
        ({"a": {"eq": {"b": 1}}}, "an object of 1"),
        ({"a": {"in": "xy"}}, r"filter\.a\.in is 'xy'; it must be a list"),
        ({"a": {"in": [[1]]}}, r"filter\.a\.in\[0\] is a list"),
        ({"a": {"gt": True}}, r"filter\.a\.gt is true; it must be a string or a number"),
        ({"a": {"lte": None}}, "is null; it must be a string or a number"),
        ({"a": {"exists": 1}}, "is 1; it must be true or false"),
        ({"a": float("nan")}, "is nan; a number must be finite"),
        ({"a": {"lt": float("-inf")}}, "is -inf; a number must be finite"),
        ({"a": 10**400}, "more than 256 bits; a number must be finite"),
        ({"a": 10**5000}, "more than 256 bits; a number must be finite"),
        ({"a": "\ud800"}, "must be Unicode text"),
        ({"\ud800": 1}, "must be Unicode text"),
        ({"a": "x" * (MAX_TEXT_BYTES + 1)}, "has 4097 bytes, 4096 are allowed"),
        ({"x" * (MAX_TEXT_BYTES + 1): 1}, "has 4097 bytes"),
        ({"a..b": 1}, r"a name in filter is 'a\.\.b'; it must be keys with dots between"),
        ({"": 1}, "a name in filter is ''"),
        ({"a\\": 1}, "a single backslash cannot be the end"),
        ({1: 1}, "a name in filter is 1; it must be a string"),
        ({"and": {"a": 1}}, r"filter\.and is an object of 1; it must be a list of filters"),
        ({"or": [1]}, r"filter\.or\[0\] is 1; it must be an object"),
        ({"not": [{"a": 1}]}, r"filter\.not is a list of 1; it must be an object"),
        ({"a": {1, 2}}, "must be a string, a number"),
    ],
)
def test_what_is_no_filter_is_refused_by_one_line_that_says_where(value: Any, says: str) -> None:
    with pytest.raises(FilterError, match=says) as caught:
        parse(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_error_repeats_neither_lines_nor_long_text() -> None:
    with pytest.raises(FilterError) as caught:
        parse({"a\n" * 1000: {"b\n" * 1000: 1}})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_filter_error_is_an_error_of_the_index() -> None:
    assert issubclass(FilterError, IndexStoreError)


def test_nesting_is_bounded() -> None:
    parse(nested(MAX_DEPTH))
    with pytest.raises(FilterError, match="16 deep"):
        parse(nested(MAX_DEPTH + 1))
    endless: dict[str, Any] = {}
    endless["not"] = endless
    with pytest.raises(FilterError, match="16 deep"):
        parse(endless)


def test_the_number_of_conditions_is_bounded() -> None:
    parse({str(i): 1 for i in range(MAX_CONDITIONS)})
    with pytest.raises(FilterError, match="256 conditions"):
        parse({str(i): 1 for i in range(MAX_CONDITIONS + 1)})
    with pytest.raises(FilterError, match="256 conditions"):
        parse({"or": [{}] * (MAX_CONDITIONS + 1)})


def test_the_number_of_listed_values_is_bounded_over_all_lists() -> None:
    half = list(range(MAX_VALUES // 2))
    parse({"a": {"in": half}, "b": {"in": half}})
    with pytest.raises(FilterError, match="list 10000 values"):
        parse({"a": {"in": half}, "b": {"in": [*half, -1]}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"p": {"lt": 10, "lt": 2}}', "'lt' is given twice"),
        ("{a: 1}", r"not JSON: .*write for example \{\"color\""),
        ("[" * 100_000, "not JSON"),
        ('{"a": NaN}', "must be finite"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON|finite"),
    ],
)
def test_text_that_is_no_filter_is_refused(text: str, says: str) -> None:
    with pytest.raises(FilterError, match=says):
        parse_text(text)


def test_a_filter_cannot_be_changed() -> None:
    made = parse({"color": "red"})
    with pytest.raises(AttributeError):
        made.values = ("blue",)  # type: ignore[attr-defined]
