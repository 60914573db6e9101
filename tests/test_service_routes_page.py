"""GET / and the page's files: by a list, typed, kept by their ETag, and under a strict policy."""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from served import World, serving

from service.settings import load_settings

TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
NAMES = sorted(
    file.name for file in resources.files("service.ui").iterdir() if file.name[-3:] != ".py"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[World]:
    with serving(tmp_path_factory.mktemp("page"), model_dir, load_settings()) as world:
        yield world


def served_files() -> list[str]:
    return [name for name in NAMES if "." in name and name != "index.html"]


@pytest.mark.parametrize("name", served_files())
def test_every_file_is_served_with_its_type_and_not_sent_twice(world: World, name: str):
    answer = world.get(f"/ui/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(TYPES[name.rpartition(".")[2]])
    again = world.client.get(f"/ui/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["__init__.py", "index.html", "nothing.js", "..%2Fapp.py", ""])
def test_no_other_file_is_served(world: World, name: str):
    assert world.get(f"/ui/{name}").status_code == 404


def test_the_page_and_its_modules_name_no_file_that_is_not_served(world: World):
    page = world.get("/").text
    named = set(re.findall(r'(?:src|href)="ui/([^"]+)"', page))
    for name in served_files():
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([^"]+)"', world.get(f"/ui/{name}").text))
    assert named == set(served_files())


def test_the_policy_allows_no_inline_code_no_markup_from_text_and_no_other_origin(world: World):
    answer = world.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", answer.text)
