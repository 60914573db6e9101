import os
from pathlib import Path

import pytest

from clipserve import files


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    files.write_atomic(file, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def fill_and_fail() -> None:
        with files.new_directory(target) as folder:
            (folder / "half").write_text("x")
            assert not target.exists()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fill_and_fail()
    assert list((tmp_path / "deep").iterdir()) == []
    with files.new_directory(target) as folder:
        (folder / "whole").write_text("x")
    assert [file.name for file in target.iterdir()] == ["whole"]


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.link_atomic(tmp_path / "latest", name)
        assert (tmp_path / "latest").resolve().name == name
