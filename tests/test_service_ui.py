"""The web page, driven in a real Chromium against a real uvicorn."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from conftest import encode, make_picture
from test_service_app import COUNT, build

from service.settings import load_settings

CHROMIUM = Path("/usr/bin/chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    registry, app = build(tmp_path_factory.mktemp("ui"), model_dir, load_settings())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()
    registry.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        options = {"executable_path": str(CHROMIUM), "args": ["--no-sandbox", "--disable-gpu"]}
        chromium = started.chromium.launch(**options)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, open; anything the browser blocks or cannot run fails the test."""
    opened = browser.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda m: problems.append(m.text) if "Policy" in m.text else None)
    opened.on("request", lambda r: r.url.startswith((address, "blob:")) or problems.append(r.url))
    opened.goto(address)
    opened.wait_for_selector("#about code")
    yield opened
    opened.close()
    assert not problems


def loaded(page: Any) -> None:
    """Wait until every picture that shows is really there."""
    page.wait_for_function(
        "() => [...document.querySelectorAll('.hit img')].length && "
        "[...document.querySelectorAll('.hit img')].every(i => i.complete && i.naturalWidth)"
    )


def test_words_find_pictures(page: Any, tmp_path: Path):
    page.get_by_label("What should the picture show?").fill("a red heart")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('red')")
    loaded(page)
    assert page.locator(".hit").count() == COUNT
    scores = [float(text) for text in page.locator(".hit .score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    assert page.locator(".hit .caption").first.text_content().startswith("picture ")
    page.screenshot(path=tmp_path / "search.png")


def test_a_picture_and_labels_give_bars(page: Any, tmp_path: Path):
    file = tmp_path / "picture.png"
    file.write_bytes(encode(make_picture(seed=4)))
    page.set_input_files("#file", file)
    page.get_by_label("Labels, separated by commas").fill("cat, dog , red heart")
    page.get_by_role("button", name="Classify").click()
    page.wait_for_selector("#bars li")
    names = page.locator("#bars .name").all_text_contents()
    assert sorted(names) == ["cat", "dog", "red heart"]
    values = [float(t.removesuffix(" %")) for t in page.locator("#bars .value").all_text_contents()]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(100, abs=0.2)
    page.screenshot(path=tmp_path / "classify.png")


def test_a_picture_finds_itself_and_a_hit_finds_its_like(page: Any, tmp_path: Path):
    file = tmp_path / "picture.png"
    file.write_bytes(encode(make_picture(seed=4)))
    page.set_input_files("#file", file)
    page.get_by_role("button", name="Find similar", exact=True).click()
    page.wait_for_selector(".hit .score")
    assert page.locator(".hit .caption").first.text_content() == "picture 4"
    page.locator(".hit", has_text="picture 7").click()
    page.wait_for_function(
        "() => document.querySelector('.hit .caption').textContent === 'picture 7'"
    )


def test_an_error_of_the_api_is_shown_plainly(page: Any, tmp_path: Path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"no picture")
    page.set_input_files("#file", file)
    page.get_by_role("button", name="Find similar", exact=True).click()
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "not a picture" in alert.text_content()


def test_captions_are_text_and_never_markup(page: Any, address: str):
    import httpx2

    item = {"id": "<b>", "text": "x", "caption": "<img src=x onerror=alert(1)>"}
    url = f"{address}v1/collections/toys/items"
    assert httpx2.put(url, json={"items": [item]}).status_code == 200
    page.get_by_label("What should the picture show?").fill("x")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=onerror=alert(1)")
    assert page.locator(".hit img[src='x']").count() == 0
    assert httpx2.delete(f"{url}/%3Cb%3E").status_code == 200
