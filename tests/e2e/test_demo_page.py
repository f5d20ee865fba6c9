"""The demo's page in a real browser: a person switches a domain off and sees completions and token losses change.

Skipped only where no Chromium is installed; tests/unit/test_server.py has the endpoints of sgtm/demo/server.py.
"""

from __future__ import annotations

import json

import pytest
from browser import CHROMIUM, Tab, browser
from demo_servers import serving
from text_models import byte_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
TEXT = "<b>El año</b>"
TAB, ENTER, SPACE = ("Tab", "", 9), ("Enter", "\r", 13), (" ", " ", 32)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = byte_run(tmp_path_factory.mktemp("demo"))
    with serving(run) as server:
        yield server


@pytest.fixture(scope="module")
def tab(tmp_path_factory, server):
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def page(tab, server) -> Tab:
    """The page as a person opens it."""
    tab.problems.clear()
    tab.open(server.url)
    return tab


def completions(page: Tab) -> list[list[str]]:
    """Heading and text of each column."""
    return page.value(
        "[...document.querySelectorAll('#completions section')].map((column) => "
        "[column.querySelector('h3').textContent, column.querySelector('.completion').textContent])"
    )


def expected(server, prompt: str, removed: list[str], tokens: int) -> list[list[str]]:
    answer = server.demo.complete({"prompt": prompt, "removed": removed, "tokens": tokens})
    return [[of["name"], prompt + of["text"]] for of in answer["completions"]]


def fill(page: Tab, selector: str, text: str) -> None:
    page.click(selector)
    page.value(f"document.querySelector({json.dumps(selector)}).select()")
    page.write(text)


def shown(page: Tab, columns: int) -> None:
    page.wait(
        f"document.querySelectorAll('#completions section').length === {columns} && "
        "document.querySelector('[role=status]').textContent === ''"
    )


def test_switching_a_domain_off_changes_completions(page, server):
    fill(page, "#prompt", "El")
    fill(page, "#tokens", "7")
    page.click("#complete button")
    shown(page, 1)
    assert completions(page) == expected(server, "El", [], 7)
    page.click("input[value=es]")
    shown(page, 2)
    without = completions(page)
    assert without == expected(server, "El", ["es"], 7) and without[0][1] != without[1][1]
    page.click("input[value=fr]")
    page.wait("document.querySelectorAll('#completions h3')[1]?.textContent === 'without es,fr'")
    assert completions(page) == expected(server, "El", ["es", "fr"], 7)
    page.click("input[value=es]")
    page.click("input[value=fr]")
    shown(page, 1)
    assert completions(page) == expected(server, "El", [], 7) and page.problems == []


def test_switching_a_domain_off_changes_the_colours_of_the_losses(page, server):
    fill(page, "#text", TEXT)
    page.click("#losses button")
    page.wait("!document.querySelector('#result').hidden")
    spans = "[...document.querySelectorAll('#passage span')]"
    assert page.value(f"{spans}.map((span) => span.className).join('')") == ""
    page.click("input[value=es]")
    page.wait(f"{spans}.some((span) => span.className)")
    answer = server.demo.losses({"text": TEXT, "removed": ["es"]})
    tokens = page.value(
        f"{spans}.map((span) => [span.textContent, span.className, span.style.getPropertyValue('--shade'), span.title])"
    )
    assert tokens == [[t["text"], t["direction"], f"{t['shade']}%", t["tooltip"]] for t in answer["tokens"]]
    assert page.value("document.querySelector('#passage').textContent") == TEXT
    assert page.value("document.querySelector('#passage b') === null"), "text is never HTML"
    rows = (
        "[...document.querySelectorAll('#means tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert page.value(rows) == [[of["name"], f"{of['nats']:.3f}"] for of in answer["means"]]
    table = rows.replace("#means", "#table")
    assert page.value(table)[1] == [
        answer["tokens"][1]["text"],
        *(f"{loss:.3f}" for loss in answer["tokens"][1]["losses"]),
    ]
    darkest = max(range(len(tokens)), key=lambda i: answer["tokens"][i]["shade"])
    coloured = f"getComputedStyle({spans}[{darkest}]).backgroundColor"
    assert page.value(coloured) not in ("rgba(0, 0, 0, 0)", "") and page.problems == []


def test_the_keyboard_reaches_and_operates_every_control(page, server):
    focus = "document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
    order = []
    for _ in range(7):
        page.press(*TAB)
        order.append(page.value(focus))
        if order[-1] in ("prompt", "text"):
            page.write("El")
    assert order == ["es", "fr", "prompt", "tokens", "Complete", "text", "Token losses"]
    page.press(*ENTER)
    page.wait("!document.querySelector('#result').hidden")
    page.value("document.querySelector('input[value=es]').focus()")
    page.press(*SPACE)
    page.wait("document.querySelectorAll('#means tbody tr').length === 2")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.value(outline) == "solid"
    names = page.value(
        "[...document.querySelectorAll('input, textarea')].map((control) => control.labels[0].innerText.trim())"
    )
    assert names == ["es", "fr", "Prompt", "Tokens", "Text"]


def test_an_error_is_a_sentence_on_the_page_and_the_next_request_works(page):
    fill(page, "#prompt", "x" * 20)
    page.click("#complete button")
    page.wait("document.querySelector('.failed') !== null")
    message = "document.querySelector('[role=status]').textContent"
    assert page.value(message).startswith("the prompt has 20 tokens, and the context of full holds 16")
    fill(page, "#prompt", "El")
    page.click("#complete button")
    shown(page, 1)
    assert page.value("document.querySelector('.failed') === null")


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_on_a_phone_in_light_and_dark(tmp_path, server, dark):
    with browser(tmp_path, width=390, dark=dark) as page:
        page.open(server.url)
        page.click("input[value=es]")
        fill(page, "#prompt", "El")
        page.click("#complete button")
        shown(page, 2)
        fill(page, "#text", TEXT)
        page.click("#losses button")
        page.wait("!document.querySelector('#result').hidden")
        assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        tops = page.value(
            "[...document.querySelectorAll('#completions section')].map((e) => e.getBoundingClientRect().top)"
        )
        assert tops[1] > tops[0], "the columns are one below the other"
        heights = (
            "[...document.querySelectorAll('input, textarea, button')].map((e) => e.getBoundingClientRect().height)"
        )
        assert min(page.value(heights)) >= 24
        for selector in ("body", "textarea", "button", "h3", ".muted"):
            assert contrast(page, selector) >= 4.5, selector


COLOURS = """(() => {
    let element = document.querySelector(SELECTOR);
    const text = getComputedStyle(element).color, ground = () => getComputedStyle(element).backgroundColor;
    while (ground() === 'rgba(0, 0, 0, 0)') element = element.parentElement;
    return [text, ground()].map((colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number));
})()"""


def contrast(page: Tab, selector: str) -> float:
    """Of an element's text and its background, as WCAG 2 defines it."""
    colours = page.value(COLOURS.replace("SELECTOR", json.dumps(selector)))

    def luminance(colour: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
