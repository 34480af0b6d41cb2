"""The search page in a real Chromium, by keyboard, on a desktop and on a phone."""

from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Dialog, Page, Route, expect

from acebert.serving.bundle import Bundle


def opened(browser: Browser, address: str, width: int, height: int) -> tuple[Page, list[str]]:
    """The page, and the addresses that it asks for and errors that it has, as they come."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.goto(address)
    return page, seen


@pytest.mark.slow
def test_a_shopper_searches_filters_and_looks_at_similar_items_by_keyboard_alone(
    browser: Browser, address: str
) -> None:
    page, seen = opened(browser, address, 1280, 900)
    page.keyboard.press("/")
    page.keyboard.insert_text("red shoe")  # at once: half a word is a search too
    cards = page.locator(".card")
    expect(cards).to_have_count(40)
    expect(page.locator("#status")).to_contain_text("40 products")
    expect(page.locator("#status")).to_contain_text("ms in the service")
    first = cards.first.locator("img")
    first.evaluate("image => image.decode()")
    sides = first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert max(sides) == 64  # the photo itself
    page.keyboard.press("ArrowDown")
    expect(cards.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(1)).to_be_focused()
    title = cards.nth(1).locator(".title").inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Similar to")
    expect(page.locator("#status")).to_contain_text("similar items")
    assert "like=" in page.url
    page.go_back()
    expect(cards.nth(1).locator(".title")).to_have_text(title)
    page.locator("#category").select_option(index=1)
    name = page.locator("#category").input_value()
    expect(page.locator(".category").first).to_have_text(name)
    assert set(page.locator(".card .category").all_inner_texts()) == {name}
    assert all(url.startswith((address, "data:")) for url in seen), seen
    page.close()


@pytest.mark.slow
def test_what_is_typed_before_the_categories_have_come_is_kept(
    browser: Browser, address: str
) -> None:
    page = browser.new_page()
    held: list[Route] = []
    page.route("**/categories", lambda route: held.append(route))
    page.goto(address)
    page.keyboard.insert_text("red shoe")
    while not held:  # the page asks for them when it has loaded
        page.wait_for_timeout(20)
    held[0].continue_()
    expect(page.locator("#category option")).not_to_have_count(1)
    expect(page.locator(".card")).to_have_count(40)
    assert page.locator("#query").input_value() == "red shoe"
    page.close()


@pytest.mark.slow
def test_on_a_phone_two_products_stand_beside_each_other_and_nothing_runs_over(
    browser: Browser, address: str
) -> None:
    page, _ = opened(browser, f"{address}/?q=blue+bag", 390, 844)
    cards = page.locator(".card")
    expect(cards.first).to_be_visible()
    expect(page.locator("#query")).to_have_value("blue bag")
    boxes = [cards.nth(i).bounding_box() for i in range(3)]
    assert all(boxes)
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"]  # type: ignore[index]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


@pytest.mark.slow
def test_a_title_is_text_and_no_markup(browser: Browser, address: str) -> None:
    page, seen = opened(browser, address, 800, 600)
    page.evaluate(
        """() => fetch("/products/evil", {method: "PUT",
            headers: {"content-type": "application/json"},
            body: JSON.stringify({title: "<img src=x onerror=alert(1)>", category: "evil"})})"""
    )
    page.wait_for_timeout(1000)
    page.goto(f"{address}/?q=x&category=evil")
    expect(page.locator(".card .title")).to_have_text("<img src=x onerror=alert(1)>")
    assert not [line for line in seen if line.startswith("error")]
    page.close()


@pytest.mark.slow
def test_a_query_whose_vector_was_there_is_shown_as_hot_and_another_as_encoded(
    browser: Browser, address: str, world: Any
) -> None:
    hot = next(iter(Bundle(world.bundle).hot))
    for query, shown in ((hot, "hot query"), ("purple zebra", "encoded now")):
        page, _ = opened(browser, f"{address}/?{urlencode({'q': query})}", 800, 600)
        status = page.locator("#status")
        expect(status).to_contain_text("·")
        assert f"· {shown} ·" in status.inner_text()
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["secret"], indirect=True)
def test_the_key_is_asked_for_once(browser: Browser, address: str) -> None:
    page = browser.new_page()
    asked: list[str] = []

    def give(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.accept("secret")

    page.on("dialog", give)
    page.goto(f"{address}/?q=red+shoe")
    expect(page.locator(".card")).to_have_count(40)
    page.wait_for_function("document.querySelectorAll('#category option').length > 1")
    assert asked == ["API key"]
    page.close()


@pytest.mark.slow
def test_an_answer_that_is_no_json_is_told_by_its_status(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.route("**/search?*", lambda route: route.fulfill(status=502, body="<html>Bad Gateway"))
    page.goto(f"{address}/?q=red+shoe")
    expect(page.locator("#status")).not_to_be_empty()
    assert page.locator("#status").inner_text() == "The service answered 502: try again."
    page.close()
