"""The web page for everyone: without a mouse, in the dark, on a phone, with a key, with nothing."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browsing import MARKS, PHONE, captions, file, listening, open_page, see, serving
from conftest import encode, make_picture
from served import COUNT

import clipserve
from index.collection import Collection
from service.app import create_app
from service.keys import add_key
from service.registry import Registry
from service.settings import load_settings

pytestmark = MARKS

VIEWS = ["search", "classify", "collections", "jobs", "status"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("states")
    with serving(folder, model_dir, jobs_dir=folder / "jobs") as address:
        yield address


def focused(page: Any) -> str:
    return str(page.evaluate("() => document.activeElement.getAttribute('aria-label')"))


# Keyboard


def test_hits_are_found_walked_and_opened_by_keys_alone(page: Any):
    page.keyboard.press("/")
    page.keyboard.type("a red heart")
    page.keyboard.press("Enter")
    see(page, "#search-status", "a red heart")
    found = captions(page)
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith(found[0])
    page.keyboard.press("ArrowRight")
    assert focused(page).startswith(found[1])
    page.keyboard.press("Enter")
    see(page, "#item-dialog[open] #item-title", found[1])
    page.keyboard.press("Escape")
    page.wait_for_selector("#item-dialog", state="hidden")
    page.keyboard.press("m")
    see(page, "#search-status", f"for {found[1]}")


def test_up_from_the_first_row_is_the_search_box_and_escape_leaves_it(page: Any):
    page.locator(".hit").first.focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#query").evaluate("e => e === document.activeElement")
    page.keyboard.press("Escape")
    assert page.locator("#query").evaluate("e => e !== document.activeElement")


def test_digits_change_the_view_and_a_question_mark_helps(page: Any):
    page.keyboard.press("2")
    page.wait_for_selector("#view-classify")
    page.focus("#labels")
    page.keyboard.type("3 dogs?")  # neither changes the view nor helps
    assert page.locator("#view-classify").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help-dialog", state="hidden")
    page.go_back()
    page.wait_for_selector("#view-search")


# What there is, and what there is not


def test_without_a_collection_there_is_no_search_but_classification(
    browser: Any, model_dir: Path, tmp_path: Path
):
    registry = Registry(load_settings())
    registry.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"), model_dir)
    with (
        listening(create_app(load_settings(), registry)) as address,
        open_page(browser, address) as page,
    ):
        see(page, "#search-notice", "No collection is served.")
        assert page.locator("#query").is_disabled()
        page.keyboard.press("3")
        see(page, "#collections-notice", "No collection is served.")
        page.keyboard.press("2")
        page.set_input_files("#files", [file("0.png", encode(make_picture()))])
        page.fill("#labels", "a, b")
        page.get_by_role("button", name="Classify").click()
        page.wait_for_selector(".bars li")
    registry.close()


def test_a_collection_that_is_not_served_says_why_and_can_be_dropped(
    browser: Any, model_dir: Path, tmp_path: Path
):
    registry = Registry(load_settings(collections_root=tmp_path))
    registry.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"), model_dir)
    path = tmp_path / "old"
    Collection.create(path, fingerprint="f" * 64, model_name="older", embed_dim=16).close()
    registry.find_collection(path)
    with (
        listening(create_app(load_settings(), registry)) as address,
        open_page(browser, address) as page,
    ):
        page.keyboard.press("3")
        see(page, "#collection-list", "It is not served: it was made by model 'older'")
        page.get_by_role("button", name="Drop old").click()
        see(page, "#drop-text", "All items and the index are removed")
        page.fill("#drop-name", "old")
        page.click("#drop-go")
        see(page, "#collections-notice", "No collection is served.")
    assert not path.exists()
    registry.close()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: Any, model_dir: Path, tmp_path: Path
):
    token = add_key(tmp_path / "keys", "reader", "read")
    with (
        serving(tmp_path, model_dir, api_keys_file=tmp_path / "keys") as address,
        open_page(browser, address) as page,
    ):
        see(page, "#banner", "This service needs an API key.")
        page.get_by_role("button", name="Enter a key").click()
        page.fill("#key", "csk_wrong_key")
        page.keyboard.press("Enter")
        see(page, "#banner", "This API key is not known here.")
        page.get_by_role("button", name="Enter a key").click()
        page.fill("#key", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("#banner", state="hidden")
        page.wait_for_function(
            "() => document.querySelectorAll('.hit img').length === 12 &&"
            " [...document.querySelectorAll('.hit img')].every(i => i.naturalWidth)"
        )
        kept = page.evaluate("() => [sessionStorage, localStorage].map(s => JSON.stringify(s))")
        assert token in kept[0]
        assert token not in kept[1]
        assert not page.context.cookies()
        page.keyboard.press("3")  # what this key may not do is said
        page.locator("#browser-hits .hit").first.click()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("button", name="for good?").click()
        see(page, "#item-dialog", "This may not be deleted here.")
        page.keyboard.press("Escape")
        page.click("#key-button")
        page.get_by_role("button", name="Forget it").click()
        see(page, "#banner", "This service needs an API key.")
        assert page.evaluate("() => sessionStorage.length") == 0


def test_a_failed_search_is_told_and_can_be_tried_again(page: Any):
    refusal = '{"error": {"message": "come back later", "code": "overloaded"}}'
    page.route("**/v1/search", lambda r: r.fulfill(status=429, body=refusal), times=1)
    page.fill("#query", "x")
    page.keyboard.press("Enter")
    see(page, "#search-notice [role=alert]", "come back later")
    page.get_by_role("button", name="Try again").click()
    see(page, "#search-status", f"{COUNT} hits")


def test_grey_cards_wait_for_the_first_items(browser: Any, address: str):
    page = browser.new_page()
    held = []
    page.route("**/items?*", lambda route: held.append(route))
    page.goto(address)
    page.wait_for_selector(".card.waiting")
    see(page, "#search-status", "Searching ...")
    held[0].continue_()
    see(page, "#search-status", "Some of what is in toys")
    assert page.locator(".card.waiting").count() == 0
    page.close()


# Status


def test_status_draws_what_happens_and_only_while_it_is_seen(browser: Any, address: str):
    with open_page(browser, address) as page:
        page.clock.install()
        readings: list[str] = []
        page.on("request", lambda r: readings.append(r.url) if "metrics" in r.url else None)
        page.keyboard.press("5")
        see(page, "#health", "Ready")
        page.wait_for_selector("#tiles dd")
        texts = [f"text {i}" for i in range(100)]
        httpx2.post(f"{address}v1/embeddings", json={"input": texts}).raise_for_status()
        page.clock.run_for(2000)
        page.wait_for_function(  # the canary's text alone would not raise the axis so far
            "() => [...document.querySelector('.chart').querySelectorAll('text')]"
            ".some(tick => Number(tick.textContent) > 2)"
        )
        see(page, "#models-table", "tiny")
        see(page, "#routes-table", "/v1/embeddings")
        page.keyboard.press("1")
        page.wait_for_selector("#view-search")
        so_far = len(readings)
        page.clock.run_for(20_000)
        assert len(readings) == so_far


def test_metrics_are_read_as_prometheus_reads_them(page: Any):
    text = "\n".join(
        [
            "# HELP h Some help",
            'c_total{a="x\\"y,\\n{}",b="1"} 3.0',
            'c_total{a="z"} 1e+01 1700000000',
            'h_bucket{le="0.1"} 10.0',
            'h_bucket{le="0.5"} 30.0',
            'h_bucket{le="+Inf"} 40.0',
            "g NaN",
        ]
    )
    got = page.evaluate(
        """async (text) => {
          const m = await import(new URL("ui/metrics.js", document.baseURI).href);
          const samples = m.parse(text);
          const counts = m.buckets(samples, "h");
          return {
            label: samples[0].labels.a,
            total: m.total(samples, "c_total"),
            grown: m.growth([{ name: "c_total", labels: {}, value: 20 }], samples, "c_total"),
            quantiles: [0.125, 0.5, 0.99].map((q) => m.quantile(q, counts)),
            none: m.quantile(0.5, []),
          };
        }""",
        text,
    )
    assert got["label"] == 'x"y,\n{}'
    assert got["total"] == 13
    assert got["grown"] == 13  # a counter that shrank began anew
    assert got["quantiles"] == pytest.approx([0.05, 0.3, 0.5])
    assert got["none"] is None


# Colours, widths, and everyone


def test_dark_follows_the_system_until_it_is_switched_and_is_kept(browser: Any, address: str):
    ground = "() => getComputedStyle(document.body).backgroundColor"
    with open_page(browser, address, color_scheme="dark") as page:
        dark = page.evaluate(ground)
        page.get_by_role("button", name="Colours: as the system").click()
        page.get_by_role("button", name="Colours: light").wait_for()
        light = page.evaluate(ground)
        assert light != dark
        page.reload()
        assert page.evaluate(ground) == light
        page.get_by_role("button", name="Colours: light").click()
        assert page.evaluate(ground) == dark


def fill_view(page: Any, view: str) -> None:
    """Something in the view, so that what is looked at is not empty."""
    page.evaluate("view => { location.hash = view; }", view)
    if view == "search":
        page.get_by_role("button", name="Add picture 3 to the search").click()
        page.click("#options-button")
        page.fill("#filter-field", "even")
        page.fill("#filter-value", "true")
        page.get_by_role("button", name="Add", exact=True).click()
        see(page, "#search-status", "for picture 3")
    if view == "classify":
        good = file("a" * 80 + ".png", encode(make_picture()))
        page.set_input_files("#files", [good, file("bad.png", b"")])
        page.fill("#labels", "cat, " + "donaudampfschiff" * 6)
        page.get_by_role("button", name="Classify").click()
        see(page, "#classify-status", "could not be read")
    if view == "collections":
        see(page, "#browser-status", "of 12 items")
    if view == "jobs":
        fill_jobs(page)
    if view == "status":
        see(page, "#health", "Ready")
        page.wait_for_selector("#tiles dd")


def fill_jobs(page: Any) -> None:
    """Jobs in every state, with a long name and failures, and the form with an error."""
    common = {"created": 1700000000, "total": 9, "done": 4, "failed": [], "error": None}
    speed = {"items_per_second": 12.5, "eta_s": 400, "num_failed": 3}
    states = ["open", "queued", "running", "done", "failed", "cancelled"]
    jobs = [{"id": name, "state": name, "collection": "toys" * 25} for name in states]
    jobs = [{**job, **common, **speed} for job in jobs]
    jobs[4]["error"] = "the collection was dropped and made anew since the job was sent"
    failed = [{"index": 7, "error": {"message": "item.image is not a picture" + "x" * 80}}]
    page.route("**/v1/jobs", lambda route: route.fulfill(json={"data": jobs}))
    page.route("**/v1/jobs/*", lambda route: route.fulfill(json={"failed": failed}))
    see(page, ".state", "Cancelled")
    page.locator("summary").nth(2).click()
    see(page, ".failed", "not a picture")
    page.get_by_role("button", name="Start the job").click()
    see(page, "#job-notice", "Choose a file first.")


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_a_phone(browser: Any, address: str, view: str):
    with open_page(browser, address, viewport=PHONE) as page:
        page.wait_for_selector(".hit img")
        fill_view(page, view)
        widths = "() => [document.documentElement.scrollWidth, innerWidth]"
        inside, outside = page.evaluate(widths)
        assert inside <= outside
        nav, last = (
            "document.querySelector('#views')",
            "document.querySelector('#views a:last-child')",
        )
        right = "e => e.getBoundingClientRect().right"
        assert page.evaluate(f"({right})({last}) <= ({right})({nav})")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "how",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": PHONE}],
    ids=["light", "dark", "phone"],
)
def test_axe_finds_no_serious_violation(browser: Any, address: str, view: str, how: dict[str, Any]):
    with open_page(browser, address, **how) as page:
        page.wait_for_selector(".hit img")
        fill_view(page, view)
        assert violations(page) == []


@pytest.mark.parametrize("how", [{"color_scheme": "light"}, {"color_scheme": "dark"}])
@pytest.mark.parametrize(
    ("view", "opener"),
    [
        ("search", "#key-button"),
        ("search", "#help-button"),
        ("search", ".hit"),
        ("collections", "#new-collection"),
        ("collections", "[aria-label='Drop toys']"),
    ],
)
def test_axe_finds_no_serious_violation_in_a_dialog(
    browser: Any, address: str, view: str, opener: str, how: dict[str, Any]
):
    with open_page(browser, address, **how) as page:
        page.wait_for_selector(".hit img")
        page.evaluate("view => { location.hash = view; }", view)
        page.locator(opener).first.click()
        page.wait_for_selector("dialog[open]")
        assert violations(page) == []


def violations(page: Any) -> list[tuple[str, list[str]]]:
    """The serious and critical ones, as axe-core sees them, with where they are."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-playwright-python, which brings axe-core, is not installed")
    axe = (Path(spec.origin).parent / "axe.min.js").read_text()
    page.evaluate(f"{axe};0")
    found = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    return [
        (one["id"], [str(node["target"]) for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
