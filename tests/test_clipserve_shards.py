import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipserve import shards
from clipserve.errors import DataError
from clipserve.shards import ShardSet


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(start, start + count)
        for member in (
            (f"{i:04d}.jpg", b"J" * (100 + i)),
            (f"{i:04d}.txt", f"caption {i}".encode()),
            (f"{i:04d}.json", json.dumps({"n": i}).encode()),
        )
    ]


def test_every_sample_is_read_from_its_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(5))
    write_tar(tmp_path / "b.tar", pairs(4, start=5))
    opened = ShardSet.open(tmp_path)
    assert len(opened) == 9
    for i in (8, 0, 5, 4, 3):
        sample = opened.read(i)
        assert opened.key(i) == (sample.shard, sample.key) == ("ab"[i > 4] + ".tar", f"{i:04d}")
        assert sample.image == b"J" * (100 + i)
        assert sample.captions == (f"caption {i}",)
        assert sample.metadata == {"n": i}
    opened.close()


def test_a_pattern_and_a_single_tar_select_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", pairs(3))
    write_tar(tmp_path / "train-1.tar", pairs(3, 3))
    write_tar(tmp_path / "val-0.tar", pairs(2))
    assert len(ShardSet.open(tmp_path / "train-*.tar")) == 6
    assert len(ShardSet.open(tmp_path / "val-0.tar")) == 2
    for nothing in ("other-*.tar", "missing.tar", "nofolder"):
        with pytest.raises(DataError, match=r"holds no \.tar shards"):
            ShardSet.open(tmp_path / nothing)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_each_tar_dialect(tmp_path: Path, format: int) -> None:
    stem = "folder/" + "k" * 80 + "/" + "x" * 60 + "\u00e9"
    if format == tarfile.USTAR_FORMAT:
        stem = "folder/" + "k" * 60 + "/" + "x" * 60
    write_tar(tmp_path / "a.tar", [(f"{stem}.png", b"P" * 700), (f"{stem}.txt", b"hi")], format)
    sample = ShardSet.open(tmp_path).read(0)
    assert sample.key == stem
    assert sample.image == b"P" * 700


def test_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"one"), ("b.txt", b"two")]
    opened = ShardSet.open(write_tar(tmp_path / "a.tar", members))
    assert [opened.read(i).captions for i in range(2)] == [("one",), ("two",)]


def test_half_and_repeated_samples_are_named(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("b.txt", b"two"),
        ("c.jpg", b"3"),
        ("c.txt", b"three"),
        ("c.jpg", b"4"),
        (".hidden", b""),
        ("README", b"x"),
    ]
    opened = ShardSet.open(write_tar(tmp_path / "s.tar", members))
    found = {(bad.key, bad.kind) for bad in opened.manifest.bad}
    assert found == {("a", "half_sample"), ("b", "half_sample"), ("c", "repeated_key")}
    assert len(opened) == 1
    assert opened.read(0).image == b"3"


def test_captions_in_the_json_win(tmp_path: Path) -> None:
    fields = json.dumps({"captions": ["one", "two"], "n": 1}).encode()
    opened = ShardSet.open(write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.json", fields)]))
    assert opened.read(0).captions == ("one", "two")
    assert opened.read(0).metadata == {"n": 1}


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    second = data.index(b"0001.jpg")
    if kind == "flipped bit in a header":
        data[second + 2] ^= 1
    elif kind == "zeroed size field":
        data[second + 124 : second + 136] = b"\0" * 12
    elif kind == "cut in a header":
        del data[second + 100 :]
    elif kind == "cut in a member":
        del data[second + 512 + 50 :]
    elif kind == "cut between members":
        del data[second:]
    elif kind == "zeroed header":
        data[second : second + 512] = bytes(512)
    elif kind == "two archives in one":
        data.extend(bytes(data))
    elif kind == "a web page":
        data[:] = b"<html>not found</html>" * 50
    elif kind == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    [
        "flipped bit in a header",
        "zeroed size field",
        "cut in a header",
        "cut in a member",
        "cut between members",
        "zeroed header",
        "two archives in one",
        "a web page",
        "empty",
    ],
)
def test_a_damaged_shard_is_never_read_as_a_shorter_one(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(4))
    damage(path, kind)
    with pytest.raises(DataError, match=r"a\.tar"):
        ShardSet.open(tmp_path)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    folder.mkdir()
    write_tar(folder / "000.tar", pairs(4))
    write_tar(folder / "001.tar", pairs(4, 4))
    shards.write_manifest(folder, *shards.scan(folder, ["000.tar", "001.tar"]))
    return folder


def test_the_manifest_gives_what_a_scan_gives(packed: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(packed, tmp_path / "bare"))
    (bare / "manifest.json").unlink()
    with_manifest, scanned = ShardSet.open(packed), ShardSet.open(bare)
    assert with_manifest.manifest == scanned.manifest
    assert with_manifest.manifest.fingerprint == scanned.manifest.fingerprint
    assert [with_manifest.read(i) for i in range(8)] == [scanned.read(i) for i in range(8)]
    assert shards.verify(packed)[1] == []


def test_a_changed_shard_is_found(packed: Path) -> None:
    file = packed / "001.tar"
    data = bytearray(file.read_bytes())
    data[600] ^= 4  # inside a picture
    file.write_bytes(data)
    assert shards.verify(packed)[1] == ["001.tar is damaged: its sha256 is not the manifest's"]
    file.write_bytes(data + bytes(512))
    with pytest.raises(DataError, match=r"001\.tar has \d+ bytes, not the manifest's"):
        ShardSet.open(packed)
    file.unlink()
    assert shards.verify(packed)[1] == ["001.tar is missing"]


def test_a_changed_index_is_found(packed: Path) -> None:
    index = np.load(packed / "000.index")
    index["image_offset"][1] += 512
    with (packed / "000.index").open("wb") as file:
        np.save(file, index)
    assert "000.index is damaged" in shards.verify(packed)[1][0]


def test_a_mistyped_path_never_opens_its_parent(packed: Path) -> None:
    for typo in ("typo", "00[9]*", "000.tra"):
        with pytest.raises(DataError, match=r"holds no \.tar shards"):
            ShardSet.open(packed / typo)
        with pytest.raises(DataError):
            shards.verify(packed / typo)
    assert len(ShardSet.open(packed / "00[1]*.tar")) == 4


def test_a_shard_beside_the_manifest_is_not_overlooked(packed: Path) -> None:
    write_tar(packed / "002.tar", pairs(2, 8))
    with pytest.raises(DataError, match=r"does not list: 002\.tar"):
        ShardSet.open(packed)


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", pairs(1, i))
    opened = ShardSet.open(tmp_path)
    assert [opened.read(i).metadata["n"] for i in (0, 1, 2, 3, 4, 0, 3)] == [0, 1, 2, 3, 4, 0, 3]
    assert len(opened._files) == 2
    opened.close()


def test_a_key_that_is_not_utf8_is_a_bad_sample(tmp_path: Path) -> None:
    members = [("\udce9.jpg", b"1"), ("\udce9.txt", b"x"), *pairs(1)]
    opened = ShardSet.open(write_tar(tmp_path / "a.tar", members))
    assert [bad.kind for bad in opened.manifest.bad] == ["bad_key"]
    assert opened.read(0).key == "0000"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 9}, "format 9"),
        ({"fingerprint": "0"}, "was changed"),
        ({"shards": 3}, "cannot be read"),
    ],
)
def test_a_bad_manifest_says_what_to_do(
    packed: Path, change: dict[str, object], words: str
) -> None:
    file = packed / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=words):
        ShardSet.open(packed)


def test_a_shard_that_shrinks_while_open_is_an_error(packed: Path) -> None:
    opened = ShardSet.open(packed)
    (packed / "001.tar").write_bytes((packed / "001.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"001\.tar ends before byte"):
        opened.read(7)
