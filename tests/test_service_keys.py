"""The file of API keys, and the command that writes it."""

import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clipserve.cli import app
from clipserve.errors import ConfigError
from service.keys import Keys, add_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def test_the_file_holds_no_secret_and_is_its_owners(file: Path):
    key = add_key(file, "someone", "write")
    assert key.split("_", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    revoke_key(file, add_key(file, "other", "read").split("_")[1])
    assert file.stat().st_mode & 0o777 == 0o600
    assert [(key.name, key.scope) for key in read_keys(file)] == [("someone", "write")]


def test_a_damaged_line_grants_nothing_and_harms_no_other(file: Path, caplog):
    key = add_key(file, "someone", "read")
    good = json.loads(file.read_text())
    bad = [
        "nonsense",
        "[]",
        json.dumps(good | {"scope": "root"}),
        json.dumps(good | {"salt": 5}),
        json.dumps(good | {"sha256": "00"}),
    ]
    file.write_text("\n".join([*bad, json.dumps(good)]))  # no line end, as an editor leaves it
    other = add_key(file, "other", "read")
    assert [key.name for key in read_keys(file)] == ["someone", "other"]
    assert [r.message.split()[1] for r in caplog.records] == ["1", "2", "3", "4", "5"]
    known = Keys(file)
    assert known.find(key.encode()) is not None
    assert known.find(other.encode()) is not None


def test_a_service_does_not_start_on_a_file_without_keys(file: Path):
    with pytest.raises(ConfigError, match="clipserve keys new"):
        Keys(file)


def test_revoking_a_key_leaves_every_other_line_as_it_is(file: Path):
    kept = add_key(file, "other", "read")
    before = "# the shop\n\nnonsense\n" + file.read_text()
    file.write_text(before)
    revoke_key(file, add_key(file, "someone", "read").split("_")[1])
    assert file.read_text() == before
    assert Keys(file).find(kept.encode()) is not None


def test_a_key_that_is_there_twice_is_revoked_altogether(file: Path):
    identity = add_key(file, "someone", "read").split("_")[1]
    file.write_text(file.read_text() * 2)
    revoke_key(file, identity)
    assert read_keys(file) == []


def test_the_file_stays_its_owners_and_keeps_its_mode(file: Path, monkeypatch):
    identity = add_key(file, "someone", "read").split("_")[1]
    add_key(file, "other", "read")
    file.chmod(0o640)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, user, group: given.append((user, group)))
    revoke_key(file, identity)
    assert given == [(file.stat().st_uid, file.stat().st_gid)]
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_file_that_would_change_hands_stays_as_it_is(file: Path, monkeypatch):
    identity = add_key(file, "someone", "read").split("_")[1]

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(ConfigError, match="owner"):
        revoke_key(file, identity)
    assert [key.id for key in read_keys(file)] == [identity]
    assert list(file.parent.iterdir()) == [file]


def is_locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_file_is_changed_by_one_at_a_time(file: Path, monkeypatch):
    locked: list[bool] = []

    def observe(function: Any) -> Any:
        def observed(*arguments: Any) -> Any:
            locked.append(is_locked(file.parent))
            return function(*arguments)

        return observed

    monkeypatch.setattr(os, "fsync", observe(os.fsync))
    identity = add_key(file, "someone", "read").split("_")[1]
    assert locked == [True]
    monkeypatch.setattr(Path, "read_text", observe(Path.read_text))
    revoke_key(file, identity)
    assert locked[:4] == [True] * 4  # and twice when it was read, once when it was written
    assert not is_locked(file.parent)


def test_a_key_that_is_not_there_cannot_be_revoked(file: Path):
    identity = add_key(file, "someone", "read").split("_")[1]
    with pytest.raises(ConfigError, match=identity):
        revoke_key(file, "nobody")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 65])
def test_a_name_is_a_short_line(file: Path, name: str):
    with pytest.raises(ConfigError, match="1 to 64"):
        add_key(file, name, "read")


def test_the_command_makes_lists_and_revokes_keys(file: Path):
    def run(*words: str) -> str:
        result = CliRunner().invoke(
            app, ["keys", *words], env={"CLIPSERVE_API_KEYS_FILE": str(file)}
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    key = run("new", "--name", "the page", "--scope", "write").strip()
    found = Keys(file).find(key.encode())
    assert found is not None
    assert (found.name, found.scope) == ("the page", "write")
    listed = run("list")
    assert "the page" in listed
    assert key.split("_", 2)[2] not in listed
    assert run("revoke", found.id) == f"revoked {found.id}, the key of the page\n"
    assert read_keys(file) == []


def test_the_command_names_the_scopes(file: Path):
    result = CliRunner().invoke(
        app, ["keys", "new", "--name", "x", "--scope", "root", "--file", file]
    )
    assert isinstance(result.exception, ConfigError)
    assert "read, write, admin" in str(result.exception)
    assert not file.exists()


def test_a_secret_is_never_logged(file: Path, caplog):
    with caplog.at_level(logging.DEBUG):
        key = add_key(file, "someone", "read")
        Keys(file).find(key.encode())
        Keys(file).find(b"csk_nobody_guess")
        revoke_key(file, key.split("_")[1])
    assert key.split("_", 2)[2] not in caplog.text
    assert "guess" not in caplog.text
