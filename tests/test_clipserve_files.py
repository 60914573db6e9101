import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_directory_has_its_name_while_it_is_filled(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "model") as folder:
        assert folder.name == "model"
        (folder / "whole").write_text("x")


def test_an_older_directory_is_replaced_or_stays_as_asked(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("old", "new"):
        with files.new_directory(target) as folder:
            (folder / name).write_text("x")
    assert [file.name for file in target.iterdir()] == ["new"]
    with pytest.raises(FileExistsError), files.new_directory(target, replace=False) as folder:
        (folder / "newer").write_text("x")
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


# A process that replaces a directory, and kills itself after so many renamings.
KILLED = """
import os, signal, sys
from pathlib import Path
from clipserve import files

target, renamings = Path(sys.argv[1]), int(sys.argv[2])
real, done = Path.rename, []

def rename(path, new):
    done.append(real(path, new))
    if len(done) == renamings:
        os.kill(os.getpid(), signal.SIGKILL)
    return new

with files.new_directory(target) as folder:
    (folder / "version").write_text("new")
    Path.rename = rename
"""


def write_version(target: Path, text: str) -> None:
    with files.new_directory(target) as folder:
        (folder / "version").write_text(text)


def test_a_directory_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "model", Path.rename
    write_version(target, "old")

    def rename(path: Path, new: Path) -> Path:
        if new == target and path.name == "model":
            raise OSError(5, "Input/output error")
        return real(path, new)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="Input/output error"):
            write_version(target, "new")
    assert (target / "version").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("renamings", [1, 2])
def test_a_kill_while_a_directory_is_replaced_leaves_one_of_the_two(
    tmp_path: Path, renamings: int
) -> None:
    target = tmp_path / "step-3"
    write_version(target, "old")
    command = [sys.executable, "-c", KILLED, str(target), str(renamings)]
    root = Path(files.__file__).parent.parent
    assert subprocess.run(command, cwd=root).returncode == -signal.SIGKILL
    (old,) = tmp_path.glob(".step-3.*.old")
    files.put_back_replaced(old)
    assert (target / "version").read_text() == ("old" if renamings == 1 else "new")
    assert not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize("is_file", [False, True])
def test_what_came_to_be_while_a_directory_was_filled_stays(tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "copy"
    theirs = target if is_file else target / "theirs"

    def fill_too_late() -> None:
        with files.new_directory(target, replace=False) as folder:
            (folder / "ours").write_text("x")
            theirs.parent.mkdir(exist_ok=True)
            theirs.write_text("y")

    with pytest.raises(FileExistsError, match="came to be meanwhile, and stays") as caught:
        fill_too_late()
    assert caught.value.filename == str(target)
    assert theirs.read_text() == "y"
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with files.new_directory(tmp_path / "copy", replace=False) as folder:
        (folder / "ours").write_text("x")
    assert (tmp_path / "copy" / "ours").exists()


def test_tensors_have_the_digest_of_their_file_unwritten(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).T,
        "a": torch.randn(2, 2),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "ids": torch.arange(7).expand(2, 7),
        "none": torch.zeros(0, 4),
        'half.\u00e4 "x"': torch.randn(4, 1).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "pixels": torch.randint(0, 256, (5,), dtype=torch.uint8),
    }
    for given, metadata in ((tensors, {"format": "pt"}), (tensors, None), ({}, None)):
        files.save_tensors(given, tmp_path / "file", metadata)
        assert files.digest_tensors(given, metadata) == files.sha256(tmp_path / "file")


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.link_atomic(tmp_path / "latest", name)
        assert (tmp_path / "latest").resolve().name == name


@pytest.mark.parametrize("size", [0, 5, 8 * 2**20 + 1])
def test_a_digest_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(size))
    assert files.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_digest_begun_ahead_is_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    hashed, digest = [], files._digest
    monkeypatch.setattr(files, "_digest", lambda opened: hashed.append(1) or digest(opened))
    files.hash_ahead([file])
    for times in (1, 2):
        assert files.sha256(file) == hashlib.sha256(b"weights").hexdigest()
        assert len(hashed) == times


def test_a_file_that_changed_since_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"old weights")
    files.hash_ahead([file])
    file.write_bytes(b"damaged")
    assert files.sha256(file) == hashlib.sha256(b"damaged").hexdigest()


def test_what_cannot_be_hashed_ahead_fails_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.hash_ahead([tmp_path / "none"])
    with pytest.raises(FileNotFoundError):
        files.sha256(tmp_path / "none")

    def fail(file: object) -> str:
        raise OSError(5, "Input/output error")

    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    monkeypatch.setattr(files, "_digest", fail)
    files.hash_ahead([file])
    with pytest.raises(OSError, match="Input/output error"):
        files.sha256(file)
