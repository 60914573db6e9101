"""What is promised to be kept is on disk by then; no faster setting may take that away."""

import os
import threading
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from index import acknowledged, cache, database
from index.build import build
from index.collection import Collection, Item
from index.sqlite import connect, fetch

MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 8}
FULL = 2

Events = list[tuple[str, Path, bytes]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Each file that is brought to disk, with its content then, and each that is renamed."""
    seen: Events = []

    def record(name: str) -> None:
        do = getattr(os, name)

        def recorded(descriptor: int) -> None:
            do(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            seen.append((name, path, path.read_bytes() if path.is_file() else b""))

        monkeypatch.setattr(os, name, recorded)

    def replace(source: Any, target: Any) -> None:
        seen.append(("replace", Path(source), Path(source).read_bytes()))
        rename(source, target)
        seen.append(("as", Path(target), b""))

    rename = os.replace
    for name in ("fsync", "fdatasync"):
        record(name)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_every_connection_waits_for_the_disk_at_each_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[tuple[int, str]] = []

    def settings_of(connection: apsw.Connection) -> tuple[int, str]:
        pragmas = ("synchronous", "journal_mode")
        number, mode = (fetch(connection, f"PRAGMA {name}")[0][0] for name in pragmas)
        return number, mode

    def recorded(file: Path, mode: str) -> apsw.Connection:
        connection = connect(file, mode)
        settings.append(settings_of(connection))
        return connection

    monkeypatch.setattr(database, "connect", recorded)
    with Collection.create(tmp_path, **MODEL) as collection:

        def write(name: str) -> None:
            collection.upsert([Item(name)], np.eye(8)[:1])
            settings.append(settings_of(collection._database.connection()))

        write("a")
        thread = threading.Thread(target=write, args=("b",))
        thread.start()
        thread.join()
    with Collection.open(tmp_path, read_only=True) as collection:
        settings.append(settings_of(collection._database.connection()))
    assert len(settings) >= 7
    assert {number for number, _ in settings} == {FULL}
    assert {mode for _, mode in settings[1:]} == {"wal"}  # the first is that which sets it


def test_the_note_of_a_write_is_on_disk_before_the_write_returns(
    tmp_path: Path, events: Events
) -> None:
    with Collection.create(tmp_path, **MODEL) as collection:
        for generation in (1, 2):
            events.clear()
            collection.upsert([Item("a")], np.eye(8)[:1])
            synced = [
                acknowledged._parse(content, collection.identity)
                for what, path, content in events
                if what in ("fsync", "fdatasync") and path.name == acknowledged.ACKNOWLEDGED
            ]
            assert synced == [generation]
            assert collection.generation() == generation


def test_a_new_collection_is_on_disk_with_its_name(tmp_path: Path, events: Events) -> None:
    Collection.create(tmp_path / "pets", **MODEL).close()
    synced = [path for what, path, _ in events if what == "fsync"]
    assert synced[-2:] == [tmp_path / "pets", tmp_path]


def test_the_files_of_an_index_are_on_disk_before_they_get_their_names(
    tmp_path: Path, events: Events
) -> None:
    with Collection.create(tmp_path, **MODEL) as collection:
        collection.upsert([Item(f"{i}") for i in range(8)], np.eye(8))
        events.clear()
        build(collection)
    folder = cache.folder(tmp_path, "image")
    names = [path.name for what, path, _ in events if what == "as"]
    assert len(names) >= 3
    assert names[-1] == cache.INFO_FILE
    for at, (what, path, content) in enumerate(events):
        if what == "replace":
            assert content
            assert ("fsync", path, content) in events[:at], path.name
    # The names of the files are on disk before the description that has them, and that at last.
    named = [at for at, (what, path, _) in enumerate(events) if what == "as"]
    synced = [at for at, (what, path, _) in enumerate(events) if (what, path) == ("fsync", folder)]
    assert any(named[-2] < at < named[-1] for at in synced)
    assert any(at > named[-1] for at in synced)
