"""A pack that is cut short, at any point and by any means, and given again."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import encode, make_picture

from clipserve.errors import DataError
from clipserve.shards import UNFINISHED, ShardSet
from clipserve.sources import SourceOptions
from training import shard_writer
from training.pack_state import claim, differing
from training.shards import PackOptions, pack

ROOT = Path(__file__).parent.parent

# Every pack runs in a process of its own, which kills itself at its n-th renaming of a file: before
# it or after it. Shards, indexes, manifests and the state itself all get their names that way.
KILLED = """
import os, signal, sys
from pathlib import Path
from training.shards import PackOptions, pack

source, out, split_by = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
options = PackOptions(samples_per_shard=4, val_fraction=0.3, split_by=split_by)
rename = Path.replace

def run(folder, fatal, is_before):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0
    def replace(self, target):
        nonlocal calls
        calls += 1
        if calls == fatal and is_before:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(self, target)
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed
    Path.replace = replace
    pack(source, folder, options)
    os._exit(0)

def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

assert run(out / "whole", 0, True) == 0
expected = content(out / "whole")
kills = 0
for first in range(1, 40, 5):
    folder = out / str(first)
    fatal = first
    while (code := run(folder, fatal, fatal % 2 == 0)) != 0:
        assert code == -signal.SIGKILL, code
        kills += 1
        fatal += 5
    assert content(folder) == expected, sorted(set(content(folder)) ^ set(expected))
print(kills)
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """50 rows; every seventh is bad in one way or another."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = ["image,caption"]
    for i in range(50):
        (folder / f"{i}.png").write_bytes(encode(make_picture(16, 16, seed=i)))
        rows.append(f"{i}.png,{'' if i % 14 == 0 else f'caption {i}'}")
    for i in (7, 21, 35):
        (folder / f"{i}.png").write_bytes(b"no picture")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return folder / "t.csv"


@pytest.mark.parametrize("split_by", ["caption", "image"])
def test_killed_again_and_again_it_leaves_the_same_bytes(
    table: Path, tmp_path: Path, split_by: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(table), str(tmp_path / "out"), split_by],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


class Broken(Exception):
    """What stops a pack in these tests."""


def stop_after(shards: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next shard after so many fail, once."""
    finish = shard_writer.ShardWriter.finish_shard
    finished = 0

    def failing(self: Any) -> None:
        nonlocal finished
        finished += 1
        if finished == shards + 1:
            raise error
        finish(self)

    monkeypatch.setattr(shard_writer.ShardWriter, "finish_shard", failing)


OPTIONS = PackOptions(samples_per_shard=4)


def test_half_a_pack_is_not_opened_and_goes_on_without_reading_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(3, Broken(), patch)
        with pytest.raises(Broken):
            pack(table, out, OPTIONS)
    names = sorted(file.name for file in out.iterdir())
    assert names == [UNFINISHED, "000000.tar", "000001.tar", "000002.tar", "bad_samples.jsonl"]
    with pytest.raises(DataError, match="pack"):
        ShardSet.open(out)
    for i in range(10):  # they are in finished shards
        (table.parent / f"{i}.png").unlink()
    assert pack(table, out, OPTIONS).num_good == 43
    shards = ShardSet.open(out)
    assert shards.read(0).image == encode(make_picture(16, 16, seed=1))
    assert not (out / UNFINISHED).exists()
    with pytest.raises(DataError, match="is not an empty folder"):
        pack(table, out, OPTIONS)


def test_both_halves_of_a_split_are_closed_until_all_is_done(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3, Broken(), monkeypatch)
    with pytest.raises(Broken):
        pack(table, tmp_path / "out", PackOptions(samples_per_shard=4, val_fraction=0.3))
    for name in ("train", "val"):
        with pytest.raises(DataError, match="pack"):
            ShardSet.open(tmp_path / "out" / name)


def test_other_options_and_another_source_are_refused(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, Broken(), patch)
        with pytest.raises(Broken):
            pack(table, out, OPTIONS)
    with pytest.raises(DataError, match=r"differs in options\.samples_per_shard; give the command"):
        pack(table, out, PackOptions(samples_per_shard=5))
    named = PackOptions(SourceOptions(caption_column="caption"), samples_per_shard=4)
    with pytest.raises(DataError, match=r"differs in options\.source\.caption_column"):
        pack(table, out, named)
    (tmp_path / "u.csv").write_text(table.read_text())
    with pytest.raises(DataError, match="differs in source"):
        pack(tmp_path / "u.csv", out, OPTIONS)
    with table.open("a") as file:
        file.write("0.png,one more\n")
    with pytest.raises(DataError, match="differs in size, mtime_ns"):
        pack(table, out, OPTIONS)


def test_while_no_shard_is_finished_other_options_begin_anew(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(0, Broken(), patch)
        with pytest.raises(Broken):
            pack(table, tmp_path / "out", PackOptions(samples_per_shard=4, val_fraction=0.3))
    assert pack(table, tmp_path / "out", OPTIONS).num_good == 43
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_a_folder_that_changed_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "below").mkdir(parents=True)
    for i in range(12):
        (source / f"below/{i:02d}.png").write_bytes(encode(make_picture(16, 16, seed=i)))
        (source / f"below/{i:02d}.txt").write_text(f"caption {i}")
    with monkeypatch.context() as patch:
        stop_after(2, Broken(), patch)
        with pytest.raises(Broken):
            pack(source, out, OPTIONS)
    (source / "below/03.txt").write_text("another caption")
    with pytest.raises(DataError, match="has changed since the pack was begun"):
        pack(source, out, OPTIONS)
    (source / "below/03.txt").write_text("caption 3")
    assert pack(source, out, OPTIONS).num_good == 12


def test_a_full_disk_is_one_line_and_the_pack_goes_on_later(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        stop_after(2, full, patch)
        with pytest.raises(DataError, match="No space left on device; make room and give the same"):
            pack(table, out, OPTIONS)
    assert not list(out.glob("*.tmp"))
    assert pack(table, out, OPTIONS).num_good == 43


def test_a_really_full_disk(table: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    writer = shard_writer.ShardWriter(table.parent, shard_writer.Position(), 10, 2**30)
    (table.parent / "000000.tar.tmp").symlink_to("/dev/full")
    writer.write({"png": bytes(100)})
    with pytest.raises(OSError, match="No space left"):
        writer.finish_shard()
    writer.abandon()
    assert not (table.parent / "000000.tar.tmp").is_symlink()


def test_two_packs_into_one_folder_do_not_mix(table: Path, tmp_path: Path) -> None:
    with claim(tmp_path / "out"), pytest.raises(DataError, match="another process packs into"):
        pack(table, tmp_path / "out", OPTIONS)
    assert pack(table, tmp_path / "out", OPTIONS).num_good == 43


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}', '{"format_version": 9}'])
def test_a_damaged_state_is_refused(table: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / UNFINISHED).write_text(content)
    with pytest.raises(DataError, match=r"\.pack\.json"):
        pack(table, tmp_path / "out", OPTIONS)


def test_a_cut_list_of_bad_samples_is_mended(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(5, Broken(), patch)
        with pytest.raises(Broken):
            pack(table, tmp_path / "out", OPTIONS)
    with (tmp_path / "out" / "bad_samples.jsonl").open("a") as file:
        file.write('{"record": 40, "ke')
    report = pack(table, tmp_path / "out", OPTIONS)
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["record"] for line in lines] == [1, 8, 15, 22, 29, 36, 43]
    assert report.bad_by_kind == {"empty_caption": 4, "bad_image": 3}


def test_differences_are_named_by_their_place() -> None:
    assert differing({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"c": 1, "d": 3}, "e": 1}) == [
        "a",
        "b.d",
        "e",
    ]
