"""Damage of every kind: which samples are still there, byte for byte, and which are named as bad.

The comments "tarfile: ..." say what readers on Python's tarfile, webdataset among them, give for
the same damage (measured with webdataset 1.0.2).
"""

import gzip
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import Extent, Members, extents, to_tar, twenty_samples

from clipserve.shards import ShardSet
from clipserve.shards.manifest import Manifest
from clipserve.shards.scan import scan

SAMPLES = twenty_samples()
KEYS = [name.removesuffix(".jpg") for name, _ in SAMPLES[::3]]
WHOLE = to_tar(SAMPLES)


def content(members: Members) -> dict[str, tuple[bytes, str, dict[str, object]]]:
    """By key: picture, caption, metadata."""
    by_name = dict(members)
    keys = dict.fromkeys(name.rpartition(".")[0] for name, _ in members)
    return {
        key: (
            by_name[f"{key}.jpg"],
            by_name[f"{key}.txt"].decode(),
            json.loads(by_name.get(f"{key}.json", b"{}")),
        )
        for key in keys
    }


def read_all(path: Path) -> dict[str, tuple[bytes, str, dict[str, object]]]:
    shards = ShardSet.open(path)
    samples = [shards.read(i) for i in range(len(shards))]
    shards.close()
    assert len({sample.key for sample in samples}) == len(samples)
    return {s.key: (s.image, s.captions[0], s.metadata) for s in samples}


def bad_of(manifest: Manifest) -> list[tuple[str, str]]:
    return sorted((bad.key, bad.kind) for bad in manifest.bad)


def check(path: Path, data: bytes, lost: list[str], bad: list[tuple[str, str]]) -> None:
    """All of the 20 samples but those lost are there, byte for byte, and just `bad` is named."""
    path.write_bytes(data)
    expected = content(SAMPLES)
    for key in lost:
        del expected[key]
    assert read_all(path) == expected
    manifest, _ = scan(path.parent, [path.name])
    assert bad_of(manifest) == sorted(bad)
    assert manifest.num_samples == len(expected)


def member(name: str) -> Extent:
    return next(extent for extent in extents(WHOLE) if extent.name == name)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPSERVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder / "000.tar"


def test_a_whole_shard_has_all_20(shard: Path) -> None:
    check(shard, WHOLE, [], [])


def test_a_cut_inside_a_picture_costs_that_sample_and_those_behind(shard: Path) -> None:
    # tarfile: two errors, 10 samples.
    data = WHOLE[: member(f"{KEYS[10]}.jpg").data + 99]
    check(shard, data, KEYS[10:], [("", "cut")])


def test_a_cut_inside_a_header_keeps_what_stands_before(shard: Path) -> None:
    # tarfile: no error; 10 samples and half of another.
    data = WHOLE[: member(f"{KEYS[10]}.txt").start + 100]
    check(shard, data, KEYS[10:], [(KEYS[10], "cut")])


def test_a_cut_between_members_is_noticed_by_the_missing_end(shard: Path) -> None:
    # tarfile: no error.
    data = WHOLE[: member(f"{KEYS[10]}.jpg").start]
    check(shard, data, KEYS[10:], [("", "missing_end")])


def test_a_sample_that_lost_only_its_json_to_a_cut_is_not_whole(shard: Path) -> None:
    data = WHOLE[: member(f"{KEYS[10]}.json").start]
    check(shard, data, KEYS[10:], [(KEYS[10], "missing_end")])


@pytest.mark.parametrize("extension", ["jpg", "txt", "json"])
@pytest.mark.parametrize("at", [2, 130, 150, 156, 260, 500])
def test_one_bit_flipped_in_a_header_costs_one_sample(shard: Path, extension: str, at: int) -> None:
    # tarfile: no error; all behind it is gone.
    data = flip(WHOLE, member(f"{KEYS[7]}.{extension}").start + at)
    check(shard, data, [KEYS[7]], [(KEYS[7], "damaged_header")])


def test_a_zeroed_header_costs_one_sample(shard: Path) -> None:
    # tarfile: no error; all behind it is gone.
    start = member(f"{KEYS[7]}.txt").start
    data = WHOLE[:start] + bytes(512) + WHOLE[start + 512 :]
    check(shard, data, [KEYS[7]], [(KEYS[7], "hole")])


def test_a_hole_over_several_samples_is_named_by_those_at_its_ends(shard: Path) -> None:
    start, end = member(f"{KEYS[5]}.jpg").data + 512, member(f"{KEYS[9]}.txt").start + 512
    data = WHOLE[:start] + bytes(end - start) + WHOLE[end:]
    check(shard, data, KEYS[5:10], [(KEYS[5], "hole"), (KEYS[9], "hole")])


def test_a_hole_that_begins_inside_a_picture_behind_its_caption(shard: Path) -> None:
    members = [*SAMPLES[1::3][:1], *SAMPLES[2::3][:1], *SAMPLES[0::3][:1], *SAMPLES[3:]]
    tar = to_tar(members)  # txt, json, jpg: the first sample's headers are all before the hole
    picture = extents(tar)[2]
    start, end = picture.data_end - 200, extents(tar)[4].start
    shard.write_bytes(tar[:start] + bytes(end - start) + tar[end:])
    assert sorted(read_all(shard)) == KEYS[2:]
    manifest, _ = scan(shard.parent, [shard.name])
    assert bad_of(manifest) == [(KEYS[0], "hole"), (KEYS[1], "hole")]


def test_a_download_that_stopped_and_left_zeros_to_the_end(shard: Path) -> None:
    cut = member(f"{KEYS[10]}.jpg").data_end - 100
    data = WHOLE[:cut] + bytes(len(WHOLE) - cut)
    check(shard, data, KEYS[10:], [(KEYS[10], "half_sample")])
    check(shard, data + bytes(2**20), KEYS[10:], [(KEYS[10], "hole")])


@pytest.mark.parametrize("count", [1, 3, 512, 1000])
def test_bytes_lost_in_a_transfer_shift_the_rest_which_is_found_again(
    shard: Path, count: int
) -> None:
    start = member(f"{KEYS[7]}.txt").start + 80
    check(shard, WHOLE[:start] + WHOLE[start + count :], [KEYS[7]], [(KEYS[7], "damaged_header")])


def test_two_archives_in_one_file_are_both_read(shard: Path) -> None:
    # tarfile: the first one's samples.
    check(shard, to_tar(SAMPLES[:30]) + to_tar(SAMPLES[30:]), [], [("", "hole")])


def test_a_header_that_claims_more_than_the_file_has_hides_nothing(shard: Path) -> None:
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 2**40
    start = member(f"{KEYS[10]}.jpg").start
    header = huge.tobuf(tarfile.GNU_FORMAT)
    check(shard, WHOLE[:start] + header + WHOLE[start:], [], [("", "cut")])


@pytest.mark.parametrize(
    "data",
    [b"", b"<html><body>404 not found</body></html>\n" * 90, b"\0" * 2**21, b"x" * 511],
    ids=["empty", "a web page", "zeros", "short"],
)
def test_what_is_no_tar_has_no_samples_and_harms_no_other_shard(shard: Path, data: bytes) -> None:
    # tarfile: an error for the whole run, unless a handler is given.
    shard.with_name("page.tar").write_bytes(data)
    shard.write_bytes(WHOLE)
    assert read_all(shard.parent) == content(SAMPLES)
    manifest = ShardSet.open(shard.parent).manifest
    assert [(bad.shard, bad.kind) for bad in manifest.bad] == [("page.tar", "not_a_tar")]
    assert [entry.num_samples for entry in manifest.shards] == [20, 0]


@pytest.mark.parametrize("name", ["000.tar", "000.tar.gz", "000.tgz"])
def test_a_gzipd_shard_shows_all_its_samples_under_any_name(shard: Path, name: str) -> None:
    # tarfile, opened as a stream of plain tar: an error.
    check(shard.with_name(name), gzip.compress(WHOLE), [], [])
    assert ShardSet.open(shard.parent).is_remote  # that is: it needs a copy
    assert ShardSet.open(shard.parent).manifest.shards[0].compression == "gzip"


def test_a_cut_gzip_shows_what_can_be_unpacked(shard: Path) -> None:
    packed = gzip.compress(WHOLE)
    shard.write_bytes(packed[: len(packed) // 2])
    found, expected = read_all(shard), content(SAMPLES)
    assert 5 < len(found) < 20
    assert all(expected[key] == sample for key, sample in found.items())
    manifest, _ = scan(shard.parent, [shard.name])
    assert {bad.kind for bad in manifest.bad} == {"cut"}


def test_of_a_shard_that_grows_meanwhile_what_was_whole_at_first_is_read(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipserve.shards import scan as module

    cut = member(f"{KEYS[10]}.txt").data + 3
    shard.write_bytes(WHOLE[:cut])
    real = module.walk

    def walk_while_growing(*arguments: object) -> object:
        for found in real(*arguments):  # type: ignore[arg-type]
            shard.write_bytes(WHOLE)
            yield found

    monkeypatch.setattr(module, "walk", walk_while_growing)
    manifest, _ = scan(shard.parent, [shard.name])
    assert manifest.shards[0].num_bytes == cut
    assert manifest.num_samples == 10
    assert bad_of(manifest) == [(KEYS[10], "cut")]


def test_a_shard_that_grows_after_opening_gives_what_it_held_then(shard: Path) -> None:
    shard.write_bytes(WHOLE[: member(f"{KEYS[10]}.jpg").start])
    opened = ShardSet.open(shard.parent)
    shard.write_bytes(WHOLE)
    assert len(opened) == 10
    assert [opened.read(i).key for i in range(10)] == KEYS[:10]
    assert len(ShardSet.open(shard.parent)) == 20  # scanned anew, for its size is another


def test_a_shard_that_shrinks_while_it_is_scanned(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipserve.shards import scan as module

    monkeypatch.setattr(module, "_CHUNK_BYTES", 512)
    shard.write_bytes(WHOLE)
    real, cut = module.walk, member(f"{KEYS[10]}.jpg").data + 600

    def walk_while_shrinking(*arguments: object) -> object:
        for found in real(*arguments):  # type: ignore[arg-type]
            if shard.stat().st_size > cut:
                shard.write_bytes(WHOLE[:cut])
            yield found

    monkeypatch.setattr(module, "walk", walk_while_shrinking)
    manifest, indexes = scan(shard.parent, [shard.name])
    assert indexes[0]["key"].tolist() == [key.encode() for key in KEYS[:10]]
    assert {bad.kind for bad in manifest.bad} <= {"cut", "half_sample"}
    assert manifest.shards[0].num_bytes == cut


def damaged(data: bytes, chance: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """One to three faults, and what bytes of the original each of them hit."""
    hits = []
    pieces = bytearray(data)
    size = limit = len(data)
    starts = [chance.randrange(size) for _ in range(chance.randint(1, 3))]
    # From the back to the front, so that places before are still those of the original.
    for start in sorted(starts, reverse=True):
        if start >= limit:
            continue
        length = min(chance.choice([1, 7, 512, 700, 3000, 20000]), limit - start)
        end, limit = start + length, start
        kind = chance.choice(["flip", "zeros", "noise", "cut", "loss", "insertion", "block"])
        if kind == "flip":
            end = start + 1
            pieces[start] ^= 1 << chance.randrange(8)
        elif kind == "zeros":
            pieces[start:end] = bytes(length)
        elif kind == "noise":
            pieces[start:end] = chance.randbytes(length)
        elif kind == "cut":
            del pieces[start:]
            hits.clear()
            end = size
        elif kind == "loss":
            del pieces[start:end]
        elif kind == "insertion":
            pieces[start:start] = chance.randbytes(length)
            end = start + 1
            start -= 1
        else:
            start -= start % 512
            end = min(start + 512, size)
            limit = start
            pieces[start:end] = bytes(end - start)
        hits.append((start, end))
    return bytes(pieces), hits


LONG = "a/folder/" + "x" * 100 + "\u00e9/"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(5))
def test_random_damage_never_spoils_or_hides_an_untouched_sample(
    tmp_path: Path, format: int, seed: int
) -> None:
    chance = random.Random(seed * 10 + format)
    rename: Callable[[str], str] = lambda name: name  # noqa: E731
    if format != tarfile.USTAR_FORMAT and seed % 2:
        rename = lambda name: LONG + name  # noqa: E731
    members = [(rename(name), data) for name, data in SAMPLES]
    if seed % 3 == 2:  # another order inside each sample
        members = [m for i in range(0, 60, 3) for m in (members[i + 2], members[i + 1], members[i])]
    whole, expected = to_tar(members, format), content(members)
    places = extents(whole)
    for case in range(20):
        data, hits = damaged(whole, chance)
        path = tmp_path / f"{case}.tar"
        path.write_bytes(data)
        found = read_all(path)

        def is_hit(start: int, end: int, hits: list[tuple[int, int]] = hits) -> bool:
            return any(start < hit_end and hit_start < end for hit_start, hit_end in hits)

        touched = {place.key for place in places if is_hit(place.start, place.data_end)}
        # What no checksum protects: the data, and long names.
        unprotected = {
            place.key
            for place in places
            if is_hit(place.start, place.data - 512) or is_hit(place.data, place.data_end)
        }
        assert expected.keys() - touched <= found.keys(), (case, hits)
        wrong = {key for key in found if found[key] != expected.get(key)}
        assert {key for key in wrong if key in expected} <= unprotected, (case, hits)
        assert len(wrong - expected.keys()) <= len(unprotected), (case, hits)
        # Zeros up to the end are an end marker, if no sample shows that it lacks something.
        if touched - found.keys() and max(end for _, end in hits) < places[-1].data_end:
            assert ShardSet.open(path).manifest.bad
