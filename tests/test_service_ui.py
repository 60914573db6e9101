"""What people do on the web page, in a real Chromium against a real uvicorn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browsing import MARKS, captions, file, open_page, see, serving
from conftest import encode, make_picture
from served import COUNT

pytestmark = MARKS

ALL = [f"picture {i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("ui")
    sets = folder / "sets.json"
    sets.write_text('{"pets": ["cat", "dog", "fish"]}')
    with serving(folder, model_dir, label_sets=sets) as address:
        yield address


def picture(seed: int) -> dict[str, Any]:
    return file(f"{seed}.png", encode(make_picture(seed=seed)))


def search(page: Any, words: str) -> None:
    page.fill("#query", words)
    page.keyboard.press("Enter")
    see(page, "#search-status", f"\u201c{words}\u201d")


def classify(page: Any, *files: dict[str, Any], labels: str = "cat, dog , red heart") -> None:
    page.get_by_role("link", name="Classify").click()
    page.set_input_files("#files", list(files))
    page.fill("#labels", labels)
    page.get_by_role("button", name="Classify").click()


def shares(page: Any) -> list[float]:
    texts = page.locator(".bars .value").all_text_contents()
    return [float(text.removesuffix(" %")) for text in texts]


# Search


def test_words_find_pictures_best_first(page: Any):
    search(page, "a red heart")
    assert sorted(captions(page)) == sorted(ALL)
    scores = [float(text) for text in page.locator(".score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.hit img')].every(i => i.complete && i.naturalWidth)"
    )


def test_a_picture_finds_itself(page: Any):
    page.set_input_files("#query-file", picture(4))
    see(page, "#search-status", "for a picture")
    assert captions(page)[0] == "picture 4"


def test_more_like_an_item_leaves_the_item_out(page: Any):
    page.get_by_role("button", name="More like picture 7").click()
    see(page, "#search-status", "for picture 7")
    assert sorted(captions(page)) == sorted(set(ALL) - {"picture 7"})


def test_this_but_in_red_mixes_an_item_and_words_by_their_weights(page: Any):
    page.get_by_role("button", name="Add picture 3 to the search").click()
    see(page, "#parts", "picture 3")
    page.get_by_label("Weight of picture 3").fill("0.5")
    page.get_by_role("button", name="More words").click()
    page.get_by_role("textbox", name="More words").fill("blue")
    page.get_by_label("Weight of these words").fill("-1")
    page.fill("#query", "in red")
    with page.expect_request("**/v1/search") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json["queries"] == [
        {"text": "in red", "weight": 1},
        {"id": "toys/3", "weight": 0.5},
        {"text": "blue", "weight": -1},
    ]
    see(page, "#search-status", "\u201cin red\u201d + picture 3 + not \u201cblue\u201d")
    assert sorted(captions(page)) == sorted(set(ALL) - {"picture 3"})


def test_chips_and_json_filter_together(page: Any):
    page.click("#options-button")
    page.fill("#filter-json", '{"n": {"gte": 7}}')
    see(page, "#filter-note", "Holds for 5 items.")
    page.fill("#filter-field", "even")
    page.fill("#filter-value", "true")
    page.keyboard.press("Enter")
    see(page, "#filter-note", "Holds for 2 items.")
    search(page, "x")
    assert sorted(captions(page)) == ["picture 10", "picture 8"]
    page.get_by_role("button", name="Remove even = true").click()
    see(page, "#search-status", "5 hits")


def test_metadata_of_a_hit_becomes_a_filter(page: Any):
    page.locator(".hit", has_text="picture 5").click()
    page.get_by_role("button", name="Only items where n is 5").click()
    see(page, "#chips", "n = 5")
    see(page, "#search-status", "1 hit")
    assert captions(page) == ["picture 5"]


@pytest.mark.parametrize(
    ("written", "told"),
    [('{"n": ', "not JSON"), ("[1]", "must be a JSON object"), ('{"n": {"near": 1}}', "near")],
)
def test_a_wrong_filter_is_told_beside_its_box(page: Any, written: str, told: str):
    page.click("#options-button")
    page.fill("#filter-json", written)
    see(page, "#filter-note.bad", told)
    page.fill("#query", "x")
    page.click("#search-form .primary")
    see(page, "#search-notice [role=alert]", told)
    assert page.locator("#filter-json").get_attribute("aria-invalid") == "true"


def test_pages_go_on_and_back(page: Any):
    page.click("#options-button")
    page.select_option("#page-size", "12")
    search(page, "x")
    page.get_by_role("button", name="Next page").click()
    see(page, "#search-notice", "no more hits")
    page.get_by_role("button", name="Back to the first").click()
    see(page, "#search-status", "12 hits")


def test_a_score_that_nothing_reaches_leaves_nothing(page: Any):
    page.click("#options-button")
    page.fill("#min-score", "1")
    page.fill("#query", "x")
    page.keyboard.press("Enter")
    see(page, "#search-notice", "Nothing was found.")


def test_captions_are_text_and_never_markup(page: Any, address: str):
    item = {"id": "<b>", "text": "x", "caption": "<img src=x onerror=alert(1)>"}
    url = f"{address}v1/collections/toys/items"
    assert httpx2.put(url, json={"items": [item]}).status_code == 200
    try:
        search(page, "x")
        see(page, ".caption", "onerror=alert(1)")
        assert page.locator(".hit img[src='x']").count() == 0
    finally:
        assert httpx2.delete(f"{url}/%3Cb%3E").status_code == 200


def test_a_search_that_is_superseded_is_aborted_and_not_shown(page: Any):
    held = []
    page.route("**/v1/search", lambda route: held.append(route), times=1)
    page.fill("#query", "first")
    with page.expect_request("**/v1/search"):
        page.keyboard.press("Enter")
    with page.expect_event("requestfailed") as failed:
        search(page, "second")
    assert "ERR_ABORTED" in failed.value.failure
    assert page.locator("#search-notice").text_content() == ""


# Classification


def test_a_picture_and_labels_give_bars(page: Any):
    classify(page, picture(4))
    page.wait_for_selector(".bars li")
    assert sorted(page.locator(".bars .label").all_text_contents()) == ["cat", "dog", "red heart"]
    assert shares(page) == sorted(shares(page), reverse=True)
    assert sum(shares(page)) == pytest.approx(100, abs=0.2)


def test_a_bad_picture_gets_its_error_beside_the_others(page: Any):
    classify(page, picture(1), file("bad.png", b"no picture"), picture(2))
    see(page, ".answer .bad", "not a picture")
    assert page.locator(".answer").count() == 3
    assert page.locator(".bars").count() == 2
    see(page, "#classify-status", "1 picture could not be read")


def test_pictures_that_are_all_bad_get_an_error_each(page: Any):
    classify(page, file("a.png", b"a"), file("b.png", b"b"))
    see(page, "#classify-status", "2 pictures could not be read")
    assert page.locator(".answer .bad").count() == 2


def test_a_label_set_own_templates_and_a_temperature_are_asked_for(page: Any):
    page.get_by_role("link", name="Classify").click()
    page.set_input_files("#files", [picture(4)])
    page.select_option("#label-set", "pets")
    see(page, "#label-set-note", "cat, dog, fish")
    page.select_option("#templates", "own")
    page.fill("#own-templates", "a drawing of a {}.")
    page.get_by_role("button", name="Classify").click()
    page.wait_for_selector(".bars li")
    assert sorted(page.locator(".bars .label").all_text_contents()) == ["cat", "dog", "fish"]
    as_trained = shares(page)
    page.get_by_label("Temperature").fill("1")
    with page.expect_response("**/v1/classify"):
        page.get_by_role("button", name="Classify").click()
    page.wait_for_selector(".bars li")
    assert shares(page)[0] < as_trained[0]


def test_no_label_that_is_probable_enough_is_said(page: Any):
    page.get_by_role("link", name="Classify").click()
    page.fill("#min-probability", "100")
    classify(page, picture(4))
    see(page, ".answer", "No label is probable enough.")


def test_what_is_missing_is_asked_for(page: Any):
    page.get_by_role("link", name="Classify").click()
    page.get_by_role("button", name="Classify").click()
    see(page, "#classify-notice", "Choose a picture first.")
    classify(page, picture(4), labels=" , ")
    see(page, "#classify-notice", "Name at least one label.")


def test_pasted_pictures_are_taken_and_no_object_url_is_left(browser: Any, address: str):
    with open_page(browser, address) as page:
        see(page, "#search-status", "Some of what is in toys")
        page.evaluate("""() => {
          window.urls = new Set();
          const [make, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
          URL.createObjectURL = (b) => { const u = make(b); window.urls.add(u); return u; };
          URL.revokeObjectURL = (u) => { window.urls.delete(u); revoke(u); };
        }""")
        page.get_by_role("link", name="Classify").click()
        page.evaluate("""() => {
          const data = new DataTransfer();
          data.items.add(new File(["no picture"], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""")
        page.wait_for_selector("#chosen li")
        classify(page, picture(4))
        page.wait_for_selector(".bars li")
        page.wait_for_function("() => window.urls.size === 0")


# Collections


def test_a_collection_is_described_and_browsed(page: Any):
    page.get_by_role("link", name="Collections").click()
    see(page, ".collection", "none: every vector is compared")
    see(page, "#browser-status", f"1\u2013{COUNT} of {COUNT} items")
    assert sorted(captions(page, "#browser-hits")) == sorted(ALL)
    page.locator("#browser-hits").get_by_role("button", name="More like picture 2").click()
    see(page, "#search-status", "for picture 2")


def test_an_item_is_deleted_when_it_is_said_twice(page: Any, address: str):
    item = {"id": "a/extra?", "text": "x", "caption": "one too many"}
    url = f"{address}v1/collections/toys/items"
    assert httpx2.put(url, json={"items": [item]}).status_code == 200
    page.get_by_role("link", name="Collections").click()
    page.locator("#browser-hits .hit", has_text="one too many").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    # Not by its path, which a browser changes where the id is "..".
    with page.expect_request("**/v1/collections/toys/items:delete") as asked:
        page.get_by_role("button", name="Delete one too many for good?").click()
    assert asked.value.post_data_json == {"ids": ["a/extra?"]}
    see(page, "#browser-status", f"of {COUNT} items")
    assert sorted(captions(page, "#browser-hits")) == sorted(ALL)
