"""Jobs and collections that are made, filled and dropped on the web page, in a real Chromium."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browsing import MARKS, open_page, see, serving
from served import COUNT

from service.keys import add_key

pytestmark = MARKS


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("jobs")
    settings = {"collections_root": folder, "jobs_dir": folder / ".jobs"}
    with serving(folder, model_dir, **settings) as address:
        yield address


@pytest.fixture
def shop(address: str) -> Iterator[str]:
    """An empty collection of its own, and no job."""
    url = f"{address}v1/collections/shop"
    assert httpx2.put(url).status_code == 201
    yield "shop"
    httpx2.delete(url)
    for job in httpx2.get(f"{address}v1/jobs").json()["data"]:
        for _ in range(2):  # cancelled, then forgotten
            httpx2.delete(f"{address}v1/jobs/{job['id']}")


def text_file(*lines: str) -> dict[str, Any]:
    return {"name": "items.ndjson", "mimeType": "", "buffer": "\n".join(lines).encode()}


def items(count: int) -> list[str]:
    return [json.dumps({"id": f"i{n}", "text": f"text {n}"}) for n in range(count)]


def start(page: Any, *lines: str, into: str = "shop") -> None:
    page.get_by_role("link", name="Jobs").click()
    page.select_option("#job-collection", into)
    page.set_input_files("#job-file", [text_file(*lines)])
    page.get_by_role("button", name="Start the job").click()


def count(address: str, name: str = "shop") -> int:
    found: int = httpx2.get(f"{address}v1/collections/{name}").json()["count"]
    return found


def focused(page: Any) -> str:
    return str(page.evaluate("() => document.activeElement.id"))


# Jobs


def test_a_file_of_items_is_stored_and_its_end_is_told(shop: str, page: Any, address: str):
    page.get_by_role("link", name="Jobs").click()
    see(page, "#jobs-notice", "No jobs yet.")
    start(page, *items(70))
    see(page, ".job .state", "Done")
    see(page, ".job", "70 of 70 items")
    see(page, "#jobs-status", "The job into shop: Done, 70 of 70 items.")
    see(page, "#job-collection", "shop (70)")  # what is served was read again
    assert count(address) == 70


def test_a_file_larger_than_a_part_is_sent_in_parts(shop: str, page: Any, address: str):
    text = {"caption": "x" * (2**20 - 100)}  # all but the largest item
    lines = [json.dumps({"id": f"i{n}", "text": "a", **text}) for n in range(9)]
    parts: list[str] = []
    page.on("request", lambda r: parts.append(r.url) if ":append" in r.url else None)
    start(page, *lines)
    see(page, ".job", "9 of 9 items")
    assert len(parts) == 3
    assert count(address) == 9


def test_urls_become_items_and_what_fails_is_shown_by_its_place(shop: str, page: Any):
    start(page, "", "https://example.org/a.jpg", '{"id": "good", "text": "a"}', "nonsense")
    see(page, ".job", "3 of 3 items, 2 failed")
    page.get_by_text("What failed").click()
    see(page, ".failed", "Item 0")
    see(page, ".failed", "is a URL, and this service fetches none")
    see(page, ".failed", "Item 2")


def test_the_report_of_a_job_is_downloaded(shop: str, page: Any, tmp_path: Path):
    start(page, *items(2), '{"id": 3}')
    see(page, ".job .state", "Done")
    with page.expect_download() as got:
        page.get_by_role("button", name="Download the report of the job into shop").click()
    got.value.save_as(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["state"], report["done"], report["num_failed"]) == ("done", 3, 1)
    assert [one["index"] for one in report["failed"]] == [2]
    assert got.value.suggested_filename == f"{report['id']}.json"


def test_a_job_is_cancelled_when_it_is_said_twice_and_then_forgotten(
    shop: str, page: Any, address: str
):
    body = {"collection": "shop", "start": False, "items": [{"id": "a", "text": "b"}]}
    assert httpx2.post(f"{address}v1/jobs", json=body).status_code == 202
    page.keyboard.press("4")
    see(page, ".job .state", "Being sent")
    page.get_by_role("button", name="Cancel the job into shop").click()
    page.get_by_role("button", name="Cancel the job into shop? What is stored stays").click()
    see(page, ".job .state", "Cancelled")
    assert page.evaluate("() => document.activeElement.textContent") == "Download report"
    page.get_by_role("button", name="Forget the job into shop").click()
    see(page, "#jobs-notice", "No jobs yet.")
    assert focused(page) == "job-file"


def test_a_file_that_is_no_list_leaves_no_job(shop: str, page: Any, address: str):
    start(page, "\x89PNG")
    see(page, "#job-notice [role=alert]", "This file is no list of items.")
    assert httpx2.get(f"{address}v1/jobs").json()["data"] == []


def test_sending_goes_on_when_there_was_no_room_for_a_part(shop: str, page: Any, address: str):
    refusal = '{"error": {"message": "come back later", "code": "overloaded"}}'
    headers = {"Retry-After": "1"}
    answer = {"status": 429, "body": refusal, "headers": headers}
    page.route("**/v1/jobs/*:append", lambda r: r.fulfill(**answer), times=1)
    start(page, *items(3))
    see(page, ".job", "3 of 3 items")
    assert count(address) == 3


def test_sending_that_is_stopped_leaves_nothing(shop: str, page: Any, address: str):
    held: list[Any] = []
    page.route("**/v1/jobs/*:append", lambda route: held.append(route))
    start(page, *items(3))
    page.get_by_role("button", name="Stop").click()
    see(page, "#job-notice", "It was not sent.")
    assert httpx2.get(f"{address}v1/jobs").json()["data"] == []
    assert page.locator("#job-start").is_enabled()


def test_jobs_are_read_only_while_they_are_seen(shop: str, browser: Any, address: str):
    with open_page(browser, address) as page:
        page.clock.install()
        readings: list[str] = []
        page.on("request", lambda r: readings.append(r.url) if r.url.endswith("/jobs") else None)
        page.keyboard.press("4")
        see(page, "#jobs-notice", "No jobs yet.")
        with page.expect_response("**/v1/jobs"):
            page.clock.run_for(6000)
        page.keyboard.press("1")
        page.wait_for_selector("#view-search")
        so_far = len(readings)
        page.clock.run_for(20_000)
        assert len(readings) == so_far


def test_jobs_that_cannot_be_read_are_told_and_tried_again(shop: str, page: Any):
    page.route("**/v1/jobs", lambda route: route.fulfill(status=500, body="no"), times=1)
    page.keyboard.press("4")
    see(page, "#jobs-notice [role=alert]", "The jobs cannot be read.")
    page.get_by_role("button", name="Try again").click()
    see(page, "#jobs-notice", "No jobs yet.")


def test_a_service_that_takes_no_jobs_says_so(browser: Any, tmp_path: Path, model_dir: Path):
    with serving(tmp_path, model_dir) as address, open_page(browser, address) as page:
        see(page, "#search-status", "Some of what is in toys")
        start(page, *items(1), into="toys")
        see(page, "#job-notice [role=alert]", "CLIPSERVE_JOBS_DIR")


# Collections


def test_collections_read_anew_keep_the_focus(page: Any):
    held: list[Any] = []
    card = page.locator(".collection", has_text="toys").first
    card.wait_for(state="attached")
    page.route("**/v1/collections", lambda route: held.append(route))
    with page.expect_request("**/v1/collections"):
        page.keyboard.press("3")
    before = card.element_handle()
    page.get_by_role("button", name="Drop toys").focus()
    held[0].continue_()
    page.wait_for_function("card => !card.isConnected", arg=before)
    assert page.evaluate("document.activeElement.ariaLabel") == "Drop toys"


def test_a_collection_is_made_filled_and_dropped_by_keys_alone(page: Any, address: str):
    page.keyboard.press("3")
    see(page, ".collection", "toys")
    page.focus("#new-collection")
    page.keyboard.press("Enter")
    page.wait_for_selector("#make-dialog[open]")
    page.keyboard.type("hats")
    page.keyboard.press("Enter")
    see(page, "#browser-title", "Items of hats")
    assert count(address, "hats") == 0
    page.get_by_role("button", name="Fill hats").press("Enter")
    page.wait_for_selector("#view-jobs")
    assert page.locator("#job-collection").input_value() == "hats"
    assert focused(page) == "job-file"
    page.keyboard.press("3")
    page.get_by_role("button", name="Drop hats").press("Enter")
    page.wait_for_selector("#drop-dialog[open]")
    page.keyboard.type("hat")
    page.keyboard.press("Enter")  # not the whole name: nothing happens
    assert page.locator("#drop-go").is_disabled()
    assert count(address, "hats") == 0
    page.keyboard.type("s")
    page.keyboard.press("Enter")
    page.wait_for_selector("#drop-dialog", state="hidden")
    page.wait_for_function("() => document.querySelectorAll('.collection').length === 1")
    assert focused(page) == "new-collection"
    assert httpx2.get(f"{address}v1/collections/hats").status_code == 404


def test_dropping_is_called_off_by_escape(shop: str, page: Any, address: str):
    page.keyboard.press("3")
    page.get_by_role("button", name="Drop shop").click()
    page.keyboard.type("shop")
    page.keyboard.press("Escape")
    page.wait_for_selector("#drop-dialog", state="hidden")
    page.get_by_role("button", name="Drop toys").click()
    see(page, "#drop-text", f"{COUNT} items")
    assert page.locator("#drop-name").input_value() == ""
    assert page.locator("#drop-go").is_disabled()
    assert count(address) == 0


def test_a_name_that_is_taken_is_told_and_can_be_mended(shop: str, page: Any):
    page.keyboard.press("3")
    page.click("#new-collection")
    page.keyboard.type("shop")
    page.keyboard.press("Enter")
    see(page, "#make-notice [role=alert]", "there is a collection of that name")
    assert focused(page) == "make-name"
    assert page.locator("#make-go").is_enabled()


def test_what_was_searched_with_an_item_goes_on_without_it(shop: str, page: Any, address: str):
    url = f"{address}v1/collections/shop/items"
    item = {"id": "a", "text": "x", "caption": "only one"}
    assert httpx2.put(url, json={"items": [item]}).status_code == 200
    page.keyboard.press("3")
    page.get_by_role("button", name="Search in shop").click()
    page.get_by_role("button", name="Add only one to the search").click()
    see(page, "#parts", "only one")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    page.get_by_role("button", name="Drop shop").click()
    page.keyboard.type("shop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#drop-dialog", state="hidden")
    page.keyboard.press("1")
    see(page, "#search-status", "Some of what is in toys")


@pytest.mark.parametrize(
    ("scope", "allowed"), [("read", []), ("write", ["make", "start"])], ids=["read", "write"]
)
def test_what_a_key_may_not_do_is_said(
    browser: Any, tmp_path: Path, model_dir: Path, scope: Any, allowed: list[str]
):
    token = add_key(tmp_path / "keys", "one", scope)
    settings = {"collections_root": tmp_path, "jobs_dir": tmp_path / ".jobs"}
    with (
        serving(tmp_path, model_dir, api_keys_file=tmp_path / "keys", **settings) as address,
        open_page(browser, address) as page,
    ):
        page.get_by_role("button", name="Enter a key").click()
        page.fill("#key", token)
        page.keyboard.press("Enter")
        see(page, "#search-status", "Some of what is in toys")
        refused = re.compile("This API key may not do that.*scope")
        page.keyboard.press("3")
        page.click("#new-collection")
        page.keyboard.type("new")
        page.keyboard.press("Enter")
        if "make" in allowed:
            see(page, "#browser-title", "Items of new")
        else:
            see(page, "#make-notice", refused)
            page.keyboard.press("Escape")
        page.get_by_role("button", name="Drop toys").click()
        page.keyboard.type("toys")
        page.keyboard.press("Enter")
        see(page, "#drop-notice", refused)
        page.keyboard.press("Escape")
        start(page, *items(1), into="toys")
        if "start" in allowed:
            see(page, ".job .state", "Done")
        else:
            see(page, "#job-notice", refused)
