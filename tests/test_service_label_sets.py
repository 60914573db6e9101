"""Files of labels that classifications may name."""

from pathlib import Path

import pytest

from clipserve.errors import ConfigError
from service.label_sets import load_label_sets


def test_without_a_path_there_are_none():
    assert load_label_sets(None, 2) == {}


def test_json_and_toml_hold_names_with_labels(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"animals": ["cat", " dog "]}')
    (tmp_path / "b.toml").write_text('colours = ["red", "blue"]')
    (tmp_path / "notes.txt").write_text("not read")
    want = {"animals": ("cat", "dog"), "colours": ("red", "blue")}
    assert load_label_sets(tmp_path, 2) == want
    assert load_label_sets(tmp_path / "b.toml", 2) == {"colours": ("red", "blue")}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", "[]", "expected names"),
        ("a.json", '{"x": []}', "at least one"),
        ("a.json", '{"x": "cat"}', "list of labels"),
        ("a.json", '{"x": ["cat", " "]}', "no label"),
        ("a.toml", "x = [1]", "no label"),
        ("a.toml", "x = ['a', 'b', 'c']", "'x' of .* has 3 labels; at most 2"),
        ("a.txt", "x", "is not .json or .toml"),
    ],
)
def test_what_is_no_label_set_is_refused(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_label_sets(tmp_path / name, 2)


def test_an_empty_folder_and_a_name_given_twice_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no"):
        load_label_sets(tmp_path, 2)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"animals": ["cat"]}')
    with pytest.raises(ConfigError, match="there twice"):
        load_label_sets(tmp_path, 2)
