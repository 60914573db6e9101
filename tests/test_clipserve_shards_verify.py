import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, make_picture
from tars import samples, write_tar

from clipserve import cli
from clipserve.errors import DataError
from clipserve.shards import ShardSet
from clipserve.shards.manifest import write_manifest
from clipserve.shards.scan import scan
from clipserve.shards.verify import verify


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Two shards of four samples, without a manifest."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"00{number}.tar", samples(4, 4 * number))
    return folder


@pytest.fixture
def packed(bare: Path) -> Path:
    """The same with one."""
    write_manifest(bare, *scan(bare, ["000.tar", "001.tar"]))
    return bare


def test_a_folder_without_a_manifest_gets_one(bare: Path) -> None:
    report = verify(bare)
    assert report.written == bare
    assert (report.manifest.num_samples, report.bad, report.problems) == (8, (), [])
    assert sorted(f.name for f in bare.iterdir()) == sorted(
        ["000.tar", "000.index", "001.tar", "001.index", "manifest.json"]
    )
    assert ShardSet.open(bare).read(7).key == "0007"
    again = verify(bare)
    assert (again.written, again.problems, again.manifest) == (None, [], report.manifest)


def test_nothing_is_written_where_nobody_may_write_or_none_is_wished(bare: Path) -> None:
    assert verify(bare, write=False).written is None
    bare.chmod(0o555)
    assert verify(bare).written is None  # for root, too
    bare.chmod(0o755)
    assert verify(bare / "000.tar").written is None
    assert verify(f"{bare}/*.tar").manifest.num_samples == 8
    assert not (bare / "manifest.json").exists()


def test_a_changed_shard_is_found(packed: Path) -> None:
    file = packed / "001.tar"
    data = bytearray(file.read_bytes())
    data[600] ^= 4  # inside a picture
    file.write_bytes(data)
    damaged = "001.tar is damaged: its sha256 is not the manifest's"
    assert verify(packed).problems == [damaged]
    file.write_bytes(data + bytes(512))
    with pytest.raises(DataError, match=r"001\.tar has \d+ bytes, not the manifest's"):
        ShardSet.open(packed)
    assert verify(packed).problems == [damaged]
    file.unlink()
    assert verify(packed).problems == ["001.tar is missing"]


def test_a_changed_index_is_found(packed: Path) -> None:
    index = np.load(packed / "000.index")
    index["image_offset"][1] += 512
    with (packed / "000.index").open("wb") as file:
        np.save(file, index)
    assert "000.index is damaged" in verify(packed).problems[0]
    (packed / "000.index").write_bytes(b"\x93NUMPY nonsense")
    assert "000.index is damaged" in verify(packed).problems[0]
    (packed / "000.index").unlink()
    assert "000.index cannot be read" in verify(packed).problems[0]
    with pytest.raises(DataError, match=r"000\.index is missing"):
        ShardSet.open(packed)


def test_rescan_takes_the_shards_as_they_are_now(packed: Path) -> None:
    write_tar(packed / "001.tar", samples(3, 10))
    write_tar(packed / "002.tar", samples(2, 20))
    with pytest.raises(DataError, match=r"does not list: 002\.tar"):
        verify(packed)
    report = verify(packed, rescan=True)
    assert (report.written, report.manifest.num_samples) == (packed, 9)
    assert len(ShardSet.open(packed)) == 9
    assert verify(packed).problems == []


def test_rescan_replaces_a_manifest_of_another_format(packed: Path) -> None:
    file = packed / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    with pytest.raises(DataError, match=r"format 1, of an older clipserve; .*--rescan"):
        verify(packed)
    assert verify(packed, rescan=True).written == packed
    assert len(ShardSet.open(packed)) == 8


def test_known_bad_samples_stay_bad_and_decoding_finds_more(bare: Path) -> None:
    whole = encode(make_picture(200, 200), "JPEG")
    members = [("a.jpg", whole), ("a.txt", b"a"), ("b.jpg", whole[:-90]), ("b.txt", b"b")]
    write_tar(bare / "000.tar", [*members, ("c.txt", b"lone")])
    (bare / "001.tar").unlink()
    assert [bad.key for bad in verify(bare).bad] == ["c"]
    assert [bad.key for bad in verify(bare).bad] == ["c"]
    found = verify(bare, decode=True)
    assert [(bad.key, bad.kind) for bad in found.bad] == [("b", "bad_image"), ("c", "half_sample")]
    assert len(ShardSet.open(bare)) == 2
    verify(bare, decode=True, rescan=True)
    assert len(ShardSet.open(bare)) == 1


def test_identical_pictures_are_counted_and_stay(bare: Path) -> None:
    write_tar(bare / "002.tar", [("x.jpg", b"J" * 102), ("x.txt", b"other words")])
    report = verify(bare)
    assert (report.duplicates.groups, report.duplicates.samples) == (1, 2)
    assert report.duplicates.first == [["000.tar:0002", "002.tar:x"]]
    assert report.manifest.num_samples == 9


def test_an_interrupted_pack_is_not_verified(packed: Path) -> None:
    (packed / ".pack.json").write_text("{}")
    for call in (verify, ShardSet.open):
        with pytest.raises(DataError, match="run the same `clipserve pack` again"):
            call(packed)


@pytest.mark.parametrize("typo", ["typo", "000.tra", "typo/manifest.json"])
def test_a_mistyped_path_is_never_its_parent(packed: Path, typo: str) -> None:
    with pytest.raises(DataError, match="holds no .tar shards"):
        verify(packed / typo)


def test_progress_ends_at_all_bytes(bare: Path) -> None:
    calls: list[tuple[int, int]] = []
    verify(bare, progress=lambda done, total: calls.append((done, total)))
    size = sum(file.stat().st_size for file in bare.glob("*.tar"))
    assert calls[-1] == (size, size)


def test_the_command_reports_and_ends_with_one(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.app(["verify", str(bare), "--no-write", "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "shards": 2,
        "samples": 8,
        "bad": [],
        "problems": [],
        "duplicates": {"groups": 0, "samples": 0, "first": []},
        "out_of_order": 0,
    }
    assert not (bare / "manifest.json").exists()
    with (bare / "001.tar").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify", str(bare), "--json"], standalone_mode=False)
    assert ended.value.code == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert (bad["shard"], bad["key"], bad["kind"]) == ("001.tar", "0004", "damaged_header")
    shutil.copy(bare / "000.tar", bare / "001.tar")
    with pytest.raises(SystemExit) as ended:
        cli.app(["verify", str(bare)], standalone_mode=False)
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert "the same picture: 000.tar:0000, 001.tar:0000" in captured.out
    assert "001.tar is damaged" in captured.err
