"""Where shards are: paths, globs, braces, URLs, commands; and how they are shown."""

from pathlib import Path

import fsspec
import pytest

from clipserve import storage
from clipserve.errors import DataError


@pytest.mark.parametrize(
    "location", ["http://h/a", "HTTPS://h/a", "s3://b/a", "gs://b/a", "memory://a", "pipe:cat a"]
)
def test_urls_and_commands_are_remote(location: str) -> None:
    assert storage.is_remote(location)


@pytest.mark.parametrize("location", ["/a/b.tar", "a.tar", "file:///a", "a::b", "c:/a", "", "~"])
def test_paths_are_local(location: str) -> None:
    assert not storage.is_remote(location)


def test_a_file_url_is_its_path() -> None:
    assert storage.local_path("file:///a%20b/c?.tar") == Path("/a b/c?.tar")
    assert storage.local_path("file://localhost/a") == Path("/a")
    assert storage.local_path("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}", ["000", "001", "002"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{b,a,}x", ["bx", "ax", "x"]),
        ("{0..1}-{a,b}", ["0-a", "0-b", "1-a", "1-b"]),
        ("{a,b{1..2}}c", ["ac", "b1c", "b2c"]),
        ("{{a,b}}", ["{a}", "{b}"]),
        ("{a}{1,2}", ["{a}1", "{a}2"]),
        ("{print $1}", ["{print $1}"]),
        ("{a,b", ["{a,b"]),
        ("}{", ["}{"]),
        ("{0..1..0}", ["0", "1"]),
    ],
)
def test_braces_are_the_shells(pattern: str, expected: list[str]) -> None:
    assert storage.expand(f"https://h/{pattern}.tar?k=*") == [
        f"https://h/{text}.tar?k=*" for text in expected
    ]


def test_commands_expand_braces_and_no_globs() -> None:
    assert storage.expand("pipe:cat *-{0..1}.tar") == ["pipe:cat *-0.tar", "pipe:cat *-1.tar"]


def test_local_globs_are_sorted_within_each_brace(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a-1.tar", "a-0.tar"):
        (tmp_path / name).touch()
    found = storage.expand(f"{tmp_path}/{{b,a}}-*.tar")
    assert [Path(path).name for path in found] == ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]
    assert storage.expand(f"file://{tmp_path}/a-*.tar") == found[2:]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("{1,2}.tar", "x[1].tar"):
        (tmp_path / name).touch()
        assert storage.expand(str(tmp_path / name)) == [str(tmp_path / name)]


def test_a_location_without_a_pattern_is_itself() -> None:
    for location in ("/not/there.tar", "https://h/a.tar?b", "s3://b/a.tar"):
        assert storage.expand(location) == [location]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    for pattern in (f"{tmp_path}/*.tar", "memory://nothing/*.tar"):
        with pytest.raises(DataError, match=r"no file matches .*\*\.tar"):
            storage.expand(pattern)


def test_remote_globs_go_through_fsspec() -> None:
    for name in ("1", "0"):
        fsspec.filesystem("memory").pipe(f"/globbed/{name}.tar", b"x")
    assert storage.expand("memory://globbed/*.tar") == [
        "memory:///globbed/0.tar",
        "memory:///globbed/1.tar",
    ]


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..9999}{0..9999}", "{a,b}" * 40])
def test_patterns_are_bounded(pattern: str) -> None:
    with pytest.raises(DataError, match="more than 1000000 locations"):
        storage.expand(f"https://h/{pattern}")


def test_braces_are_bounded() -> None:
    with pytest.raises(DataError, match="more than 64 braces"):
        storage.expand("{" * 100_000)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("https://h/d", "https://h/d/x.tar"),
        ("https://h/d/", "https://h/d/x.tar"),
        ("https://h", "https://h/x.tar"),
        ("https://h/d/manifest.json?sig=a/b.tar#f", "https://h/d/x.tar?sig=a/b.tar"),
        ("s3://b/d/0.tar.gz", "s3://b/d/x.tar"),
        ("s3://b/d/manifest.json", "s3://b/d/x.tar"),
        ("s3://b", "s3://b/x.tar"),
        ("/d/manifest.json", "/d/x.tar"),
        ("file:///d/e", "/d/e/x.tar"),
    ],
)
def test_a_name_is_joined_below_a_folder_and_beside_a_file(base: str, expected: str) -> None:
    assert storage.join(base, "x.tar") == expected


def test_a_joined_name_stays_a_name() -> None:
    assert storage.join("https://h/d", "a b?#%2e.tar") == "https://h/d/a%20b%3F%23%252e.tar"
    assert storage.join("s3://b/d", "a b.tar") == "s3://b/d/a b.tar"
    with pytest.raises(DataError, match="is a command"):
        storage.join("pipe:cat a.tar", "b.tar")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "a\0", "a\n", "pipe:id", "x" * 256]
    + ["http://h/a", "PIPE:/bin/id", "\ud800/"],
)
def test_a_manifest_names_files_beside_it_only(name: str) -> None:
    with pytest.raises(DataError, match="must be a plain file name"):
        storage.check_name(name)
    with pytest.raises(DataError, match="must be a plain file name"):
        storage.join("https://h/d", name)


def test_plain_names_pass() -> None:
    for name in ("000.tar", "a b.tar", "...", "ümlaut.tar", "-x"):
        assert storage.check_name(name) == name


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://me:secret@h:1/a.tar?sig=secret#secret", "https://h:1/a.tar"),
        ("https://h/a@b.tar", "https://h/a@b.tar"),
        ("s3://secret:secret@b/a.tar", "s3://b/a.tar"),
        ("filecache::https://me:secret@h/a?secret", "filecache::https://h/a"),
        ("pipe:KEY=secret curl -H 'Auth: secret' https://h/d/0.tar?secret", "pipe:curl ... 0.tar"),
        ("pipe:K='a secret' cat", "pipe:cat"),
        ("pipe:cat 'secret", "pipe:..."),
        ("/a?b.tar", "/a?b.tar"),
    ],
)
def test_messages_show_no_secrets(location: str, expected: str) -> None:
    assert storage.shown(location) == expected


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPSERVE_CACHE", "~/x")
    assert storage.cache_root() == Path.home() / "x"
    monkeypatch.setenv("CLIPSERVE_CACHE", "")
    assert storage.cache_root() == Path.home() / ".cache" / "clipserve"
