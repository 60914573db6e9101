"""Which members make a sample, and how the others are named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, make_picture
from tars import Members, samples, write_tar

from clipserve.shards import grouping
from clipserve.shards.manifest import Manifest
from clipserve.shards.scan import scan

ONE = samples(1)


def scanned(tmp_path: Path, members: Members, decode: bool = False) -> tuple[Manifest, np.ndarray]:
    path = write_tar(tmp_path / "s.tar", members, tarfile.GNU_FORMAT)
    manifest, (index,) = scan(path.parent, [path.name], decode=decode)
    return manifest, index


def keys(index: np.ndarray) -> list[str]:
    return [key.decode() for key in index["key"].tolist()]


def bad(manifest: Manifest) -> list[tuple[str, str]]:
    return [(entry.key, entry.kind) for entry in manifest.bad]


def sample(key: str, text: bytes = b"words", image: bytes = b"picture") -> Members:
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]


def test_half_samples_are_named(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.txt", b"two"), ("c.json", b"{}"), *ONE]
    manifest, index = scanned(tmp_path, [*members, ("d.jpg", b"4"), ("d.json", b'{"n": 1}')])
    assert keys(index) == ["0000"]
    assert bad(manifest) == [(key, "half_sample") for key in "abcd"]
    reasons = [entry.reason for entry in manifest.bad]
    assert reasons[:3] == ["has no caption", "has no picture", "has no picture and caption"]


def test_members_need_not_be_adjacent(tmp_path: Path) -> None:
    # webdataset: four half samples.
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"one"), ("b.txt", b"two"), *ONE]
    manifest, index = scanned(tmp_path, members)
    assert keys(index) == ["a", "b", "0000"]
    assert not manifest.bad
    assert manifest.shards[0].num_out_of_order == 2


def test_the_order_of_members_inside_a_sample_does_not_matter(tmp_path: Path) -> None:
    manifest, index = scanned(tmp_path, [ONE[2], ONE[1], ONE[0]])
    assert keys(index) == ["0000"]
    assert manifest.shards[0].num_out_of_order == 0


@pytest.mark.parametrize(
    "members",
    [
        [*sample("a"), *sample("a", b"again", b"other"), *ONE],
        [*sample("a"), *ONE, *sample("a", b"again", b"other")],
        [("a.jpg", b"lone"), *ONE, *sample("a")],
        [*sample("a"), ("a.jpg", b"second"), *ONE],
        [("a.jpg", b"picture"), ("a.jpg", b"second"), ("a.txt", b"words"), *ONE],
        [*sample("a"), *ONE, *sample("a"), *sample("a")],
    ],
    ids=["adjacent", "later", "half before", "picture behind", "picture twice", "three times"],
)
def test_of_a_repeated_key_the_first_complete_sample_counts(
    tmp_path: Path, members: Members
) -> None:
    # webdataset: both samples when they are apart, an error when they are adjacent.
    manifest, index = scanned(tmp_path, members)
    assert sorted(keys(index)) == ["0000", "a"]
    assert bad(manifest) == [("a", "repeated_key")]
    row = index[keys(index).index("a")]
    data = (tmp_path / "s.tar").read_bytes()
    start = int(row["image_offset"])
    assert data[start : start + int(row["image_size"])] == b"picture"


def test_a_dot_inside_a_name_is_not_the_extensions(tmp_path: Path) -> None:
    # webdataset: one sample "v1" of extensions "0_img.jpg", "1_img.jpg" ...
    members = [*sample("v1.0_img"), *sample("d.x/v1.1_img"), *sample("v1.2_img")]
    manifest, index = scanned(tmp_path, members)
    assert keys(index) == ["v1.0_img", "d.x/v1.1_img", "v1.2_img"]
    assert not manifest.bad
    assert manifest.shards[0].num_out_of_order == 0


def test_extra_members_of_a_sample_are_ignored(tmp_path: Path) -> None:
    extra = [
        ("0000.seg.png", b"mask"),
        ("0000.cls", b"7"),
        ("0000.png", b"the same in another format"),
        ("0000.depth.json", b"{}"),
        (".hidden", b""),
        ("README", b"x"),
        ("folder/.hidden.jpg", b"x"),
    ]
    members = [ONE[0], *extra, ONE[1], ONE[2], *samples(1, 1)]
    manifest, index = scanned(tmp_path, members)
    assert keys(index) == ["0000", "0001"]
    assert not manifest.bad
    assert manifest.shards[0].num_out_of_order == 0


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        (sample("\udce9"), "bad_key"),
        (sample("k" * 1100), "long_key"),
        (sample("a", b"x" * (2**20 + 1)), "long_text"),
        (sample("a", b"caf\xe9"), "bad_caption"),
        (sample("a", b"words\0\0"), "bad_caption"),
        (sample("a", b" \n\t"), "empty_caption"),
        (sample("a", b""), "empty_caption"),
        ([*sample("a"), ("a.json", b"{broken")], "bad_json"),
        ([*sample("a"), ("a.json", b"[1]")], "bad_json"),
        ([*sample("a"), ("a.json", b"")], "bad_json"),
        ([*sample("a"), ("a.json", b"[" * 100_000)], "bad_json"),
        ([*sample("a"), ("a.json", b'{"n": ' + b"9" * 10_000 + b"}")], "bad_json"),
        ([*sample("a"), ("a.json", b"\xff\xfe\xfa")], "bad_json"),
        ([*sample("a"), ("a.json", b'{"captions": []}')], "empty_caption"),
        ([*sample("a"), ("a.json", b'{"captions": [" "]}')], "empty_caption"),
        ([*sample("a"), ("a.json", b'{"captions": ["\\ud800"]}')], "bad_caption"),
        (sample("a", image=b""), "bad_image"),
        (sample("a", image=bytes(600)), "hole"),
        (sample("a", image=b"\xff\xd8\xff" + b"x" * 600 + bytes(40)), "hole"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, members: Members, kind: str) -> None:
    manifest, index = scanned(tmp_path, [*members, *ONE], decode=False)
    assert keys(index) == ["0000"]
    assert [entry.kind for entry in manifest.bad] == [kind]
    assert manifest.bad[0].key.isascii()


def test_a_picture_over_the_limit_is_not_even_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "MAX_IMAGE_BYTES", 1000)
    manifest, index = scanned(tmp_path, [*sample("a", image=b"x" * 1001), *ONE])
    assert keys(index) == ["0000"]
    assert bad(manifest) == [("a", "long_image")]


def test_zeros_behind_the_end_of_a_picture_are_harmless(tmp_path: Path) -> None:
    pictures = [encode(make_picture(), format) for format in ("JPEG", "PNG", "GIF")]
    members = [m for i, data in enumerate(pictures) for m in sample(f"{i}", image=data + bytes(50))]
    manifest, index = scanned(tmp_path, members)
    assert keys(index) == ["0", "1", "2"]
    assert not manifest.bad


def test_decode_names_pictures_that_do_not(tmp_path: Path) -> None:
    whole = encode(make_picture(200, 200), "JPEG")
    members = [
        *sample("whole", image=whole),
        *sample("cut", image=whole[:-100]),
        *sample("no_picture", image=b"GIF89a?"),
    ]
    manifest, index = scanned(tmp_path, members)
    assert len(index) == 3
    manifest, index = scanned(tmp_path, members, decode=True)
    assert keys(index) == ["whole"]
    assert bad(manifest) == [("cut", "bad_image"), ("no_picture", "bad_image")]
    assert "truncated" in manifest.bad[0].reason


def test_the_index_knows_how_long_the_longest_caption_is(tmp_path: Path) -> None:
    several = json.dumps({"captions": ["one", "thr\u00e9\u00e9", "two"]}).encode()
    members = [*sample("a", b"four"), *sample("b", b"ignored, for"), ("b.json", several)]
    _, index = scanned(tmp_path, [*members, ("c.jpg", b"1"), ("c.json", several)])
    assert index["text_bytes"].tolist() == [4, 7, 7]


def test_a_shard_of_other_things_has_no_samples_and_nothing_bad(tmp_path: Path) -> None:
    manifest, index = scanned(tmp_path, [("README", b"x"), ("data.csv", b"y")])
    assert (len(index), manifest.bad) == (0, ())


def test_captions_are_a_list_of_texts_or_none() -> None:
    assert grouping.parse_captions({"captions": ["a"]}) == ["a"]
    for other in ({}, {"captions": "a"}, {"captions": [1]}, {"captions": None}):
        assert grouping.parse_captions(other) is None


def test_a_key_of_any_bytes_can_be_shown() -> None:
    shown = grouping.show("caf\udce9")
    assert io.StringIO(shown).read() == "caf\\udce9"
