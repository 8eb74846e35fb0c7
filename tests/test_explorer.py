"""The page of `flm.explore` in a browser: clicks, keys, colours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import functional_llm as flm
from browser import Browser, find_chromium
from configs import CONFIGS

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the PATH: apt-get install chromium, or set FLM_CHROMIUM to one",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a model, and one of the same with LoRA in one layer and without an MLP."""
    folder = tmp_path_factory.mktemp("pages")
    config = {**CONFIGS["llama_grouped"], "num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(config))
    model = flm.Backbone.from_preset(folder, load_weights=False)
    edited = flm.peft.lora(model, rank=2, targets="decoder_3/attention/query")
    edited = flm.rewire(edited, call=lambda layer, path, x, **_: x, where="decoder_5/mlp")
    written = {
        "model": flm.explore(model, folder / "model.html"),
        "edited": flm.explore(edited, folder / "edited.html", original=model),
    }
    return {name: page.path for name, page in written.items() if page.path is not None}


@pytest.fixture
def browser(pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, pages[request.param], size=(1280, 900)) as opened:
        yield opened
        assert opened.errors == []
        assert len(opened.requests) == 1  # the page itself


of = pytest.mark.parametrize


def head(title: str, inside: str = "#graph") -> str:
    """An expression in the page: the head of the first box with this title."""
    return (
        f"[...document.querySelectorAll('{inside} .head')].find((x) => "
        f"x.querySelector('b, i').textContent === {json.dumps(title)})"
    )


def is_shown(browser: Browser, title: str) -> bool:
    return bool(browser.run(f"Boolean({head(title)})"))


def details(browser: Browser) -> str:
    return str(browser.run("document.querySelector('#details').innerText"))


def color(browser: Browser, title: str) -> Any:
    return browser.run(f"getComputedStyle({head(title)}.parentElement).backgroundColor")


@of("browser", ["model"], indirect=True)
def test_clicks_open_and_close_boxes(browser: Browser) -> None:
    assert is_shown(browser, "decoder_0–5") and not is_shown(browser, "query")
    browser.click(head("attention"))
    assert is_shown(browser, "query")
    assert browser.run(f"{head('attention')}.getAttribute('aria-expanded')") == "true"
    browser.click(head("query"))
    text = details(browser)
    assert "decoder_0/attention/query" in text and "stands for 6 equal layers" in text
    assert "(48, 48)" in text and "float32" in text and "trains" in text
    browser.click(head("attention"))
    assert not is_shown(browser, "query")
    browser.click("document.querySelector('#open-all')")
    assert is_shown(browser, "query") and is_shown(browser, "gate")
    browser.click("document.querySelector('#close-all')")
    assert not is_shown(browser, "attention")


@of("browser", ["model"], indirect=True)
def test_arrows_lead_from_box_to_box(browser: Browser) -> None:
    browser.press("o")
    places = browser.run("""[...document.querySelectorAll(".level")].map((level) => {
        const paths = [...level.lastElementChild.querySelectorAll(":scope > path")];
        const origin = level.getBoundingClientRect();
        return level.box.arrows.map(([source, target], i) => {
            const line = paths[i], end = line.getPointAtLength(line.getTotalLength());
            const start = line.getPointAtLength(0);
            const near = (point, box) => {
                const place = box.element.getBoundingClientRect();
                const x = point.x + origin.left, y = point.y + origin.top;
                return x > place.left - 3 && x < place.right + 3 && y > place.top - 3
                    && y < place.bottom + 3;
            };
            return near(start, level.box.boxes[source]) && near(end, level.box.boxes[target]);
        });
    })""")
    assert sum(len(level) for level in places) > 20 and all(all(level) for level in places)
    assert browser.run("document.querySelectorAll('.level > svg text').length") == 0
    browser.press("s")
    texts = browser.run(
        "[...document.querySelectorAll('.level > svg text')].map((x) => x.textContent)"
    )
    assert "(·, ·, 48) float32" in texts


@of("browser", ["model"], indirect=True)
def test_search_finds_what_is_folded(browser: Browser) -> None:
    results = "[...document.querySelectorAll('#results li')].map((x) => x.innerText)"
    browser.press("/")
    browser.type("decoder_4/*/query")
    assert browser.run(results) == ["decoder_4/attention/query Dense (one of 6)"]
    browser.press("Enter")
    assert is_shown(browser, "query") and "decoder_4/attention/query" in details(browser)
    assert browser.run(f"{head('query')}.parentElement.classList.contains('selected')")
    browser.press("/")
    browser.run("document.querySelector('#search').select()")
    browser.type("AttentionDot")
    assert browser.run(results) == [
        "decoder_0/attention/dot_product AttentionDotProduct (one of 6)"
    ]
    browser.run("document.querySelector('#search').select()")
    browser.type("<b>")
    assert browser.run(results) == ["Nothing matches <b>."]
    browser.press("Escape")
    assert browser.run("document.querySelector('#results').hidden")


@of("browser", ["model"], indirect=True)
def test_keys_are_enough(browser: Browser) -> None:
    browser.run(f"{head('decoder_0–5')}.focus()")
    browser.press("ArrowLeft")
    assert not is_shown(browser, "attention")
    browser.press("Enter", "ArrowRight", "ArrowDown", "ArrowRight")
    assert is_shown(browser, "query")
    assert browser.run("document.activeElement.querySelector('b').textContent") == "attention"
    browser.press("ArrowRight", "ArrowDown", "ArrowDown")
    text = details(browser)
    assert "decoder_0/attention/" in text and "weights" in text
    browser.press("ArrowUp", "ArrowLeft", "ArrowLeft")
    assert not is_shown(browser, "query")
    before = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.press("t")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != before


@of("browser", ["edited"], indirect=True)
def test_changes_are_coloured_and_listed(browser: Browser, tmp_path: Path) -> None:
    assert is_shown(browser, "query")  # what changed is open at first
    assert color(browser, "query") == "rgb(255, 213, 138)"
    assert color(browser, "key") == "rgb(255, 255, 255)"
    assert color(browser, "decoder_3") == "rgb(255, 243, 214)"
    assert color(browser, "decoder_0–2") not in (
        color(browser, "query"),
        color(browser, "decoder_3"),
    )
    items = browser.run("[...document.querySelectorAll('#changes li')].map((x) => x.innerText)")
    assert items[0].startswith("decoder_3/attention/query Dense → LoRA; + lora_a 48 × 2 float32")
    assert "− mlp in decoder_5" in items
    browser.press("n")
    assert "decoder_3/attention/query" in details(browser)
    assert "frozen" in details(browser) and "lora_a" in details(browser)
    browser.press("p")
    assert browser.run("document.querySelector('#at').innerText").startswith(str(len(items)))
    assert "other than in the original" in browser.run("document.body.innerText")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_reader_who_prefers_the_dark_gets_it(pages: dict[str, Path]) -> None:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, pages["model"], dark=True) as browser:
        assert browser.run("document.documentElement.dataset.theme") == "dark"
        assert color(browser, "token_embedding") == "rgb(32, 37, 43)"


def test_the_page_in_a_notebooks_frame(pages: dict[str, Path], tmp_path: Path) -> None:
    page = pages["model"].read_text(encoding="utf-8")
    from functional_llm.graph.looking.page import Page

    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><body>{Page(page)._repr_html_()}</body>", encoding="utf-8")
    assert CHROMIUM is not None
    with Browser(CHROMIUM, outer, size=(900, 800)) as browser:
        inner = "document.querySelector('iframe').contentDocument"
        browser.wait(f"{inner}?.querySelectorAll('#graph .head').length > 5")
        assert browser.errors == []
