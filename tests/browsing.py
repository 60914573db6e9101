"""The web page in a real Chromium: a uvicorn to serve it, and pages that watch what they do."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from served import build

from service.settings import load_settings

CHROMIUM = Path("/usr/bin/chromium")
PHONE = {"width": 360, "height": 740}

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of a server of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving(folder: Path, model_dir: Path, **settings: Any) -> Iterator[str]:
    """The address of the service of `served.build`, with these settings."""
    registry, app = build(folder, model_dir, load_settings(**settings))
    with listening(app) as address:
        yield address
    registry.close()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        options = {"executable_path": str(CHROMIUM), "args": ["--no-sandbox", "--disable-gpu"]}
        browser = started.chromium.launch(**options)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser: Any, address: str, **how: Any) -> Iterator[Any]:
    """The page, open; what it logs as an error, or asks of another origin, fails the test.

    But for refusals of the service, which Chromium logs and the page has to show.
    """
    page = browser.new_page(**how)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: _note(problems, message))
    page.on("request", lambda r: r.url.startswith((address, "blob:")) or problems.append(r.url))
    page.goto(address)
    yield page
    page.close()
    assert not problems


def see(page: Any, selector: str, word: str | re.Pattern[str]) -> None:
    """Wait until the element's text holds the word."""
    page.locator(selector, has_text=word).first.wait_for()


def captions(page: Any, within: str = "#search-hits") -> list[str]:
    return list(page.locator(f"{within} .caption").all_text_contents())


def file(name: str, content: bytes) -> dict[str, Any]:
    """A file to choose."""
    return {"name": name, "mimeType": "image/png", "buffer": content}


def _note(problems: list[str], message: Any) -> None:
    is_refusal = message.text.startswith("Failed to load resource: the server responded with a")
    if message.type in ("error", "warning") and not is_refusal:
        problems.append(message.text)
