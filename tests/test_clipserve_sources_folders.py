import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.sources import BadRecord, Record, SourceOptions, read_source

PICTURE = encode(make_picture())


def read(path: Path, **options: Any) -> list[Record | BadRecord]:
    return list(read_source(path, SourceOptions(**options)))


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)


def kinds(records: list[Record | BadRecord]) -> list[tuple[str, str]]:
    return [(r.key, getattr(r, "kind", "good")) for r in records]


def test_json_beside_a_picture_gives_captions_and_metadata(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    (tmp_path / "a.json").write_text(json.dumps({"captions": ["one", "two"], "colour": "red"}))
    (tmp_path / "b.json").write_text(json.dumps({"caption": "of the json", "colour": "blue"}))
    (tmp_path / "b.txt").write_text("of the text")
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.json").write_text(json.dumps({"colour": "red"}))
    records = read(tmp_path)
    assert kinds(records) == [
        ("a", "good"),
        ("b", "good"),
        ("c", "bad_json"),
        ("d", "bad_json"),
        ("e", "empty_caption"),
    ]
    first, second = records[:2]
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.captions, first.metadata) == (("one", "two"), {"colour": "red"})
    assert second.captions == ("of the text",)
    made = read(tmp_path, caption_template="something {colour}")
    assert [getattr(r, "captions", None) for r in made] == [
        ("something red",),
        ("something blue",),
        None,
        None,
        ("something red",),
    ]


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    put(tmp_path, "train/red_shoe/1.jpg", "train/red_shoe/1.png", "train/hat/2.jpg", "stray.jpg")
    records = read(tmp_path)
    assert kinds(records) == [
        ("stray.jpg", "missing_caption"),
        ("train/hat/2.jpg", "good"),
        ("train/red_shoe/1.jpg", "good"),
        ("train/red_shoe/1.png", "good"),
    ]
    assert isinstance(records[2], Record)
    assert records[2].captions == ("red shoe",)
    assert records[2].metadata == {"label": "red_shoe"}
    made = read(tmp_path, caption_template="a photo of a {label}")
    assert isinstance(made[1], Record)
    assert made[1].captions == ("a photo of a hat",)


def test_one_side_file_anywhere_means_that_all_need_one(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jpg", "y/2.jpg")
    (tmp_path / "y/2.txt").write_text("two")
    assert kinds(read(tmp_path)) == [("x/1", "missing_caption"), ("y/2", "good")]


def test_loops_of_links_end_and_linked_folders_are_read_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(root, "a/1.jpg")
    put(outside, "2.jpg", "back_there/3.jpg")
    (root / "a/self").symlink_to(root)
    (root / "b").symlink_to(outside)
    (root / "c").symlink_to(outside)
    (outside / "again").symlink_to(root / "a")
    (root / "loop.jpg").symlink_to("loop.jpg")
    assert kinds(read(root)) == [
        ("c", "linked_folder"),
        ("loop.jpg", "missing_caption"),
        ("a/self", "linked_folder"),
        ("a/1.jpg", "good"),
        ("b/again", "linked_folder"),
        ("b/2.jpg", "good"),
        ("b/back_there/3.jpg", "good"),
    ]


def test_many_folders_inside_one_another(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(400):
            os.mkdir("d")
            os.chdir("d")
        Path("1.jpg").write_bytes(PICTURE)
    finally:
        os.chdir(here)
    assert len(read(tmp_path)) == 1


def test_side_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", "d.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "b.txt")
    with (tmp_path / "c.txt").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "d.txt").write_text("d")
    assert kinds(read(tmp_path)) == [
        ("a", "bad_caption"),
        ("b", "missing_caption"),
        ("c", "long_text"),
        ("d", "good"),
        ("d", "repeated_key"),
    ]


def test_names_that_are_not_utf_8_and_hidden_ones(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", ".hidden.jpg", ".thumbs/b.jpg")
    (tmp_path / "a.txt").write_text("a")
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(PICTURE)
    assert [kind for _, kind in kinds(read(tmp_path))] == ["good", "bad_key"]


def test_a_folder_knows_no_columns(tmp_path: Path) -> None:
    put(tmp_path, "x/1.jpg")
    with pytest.raises(DataError, match="is no table: group_by 'id'"):
        read(tmp_path, group_by="id")
