"""The page of steering in a browser: texts that want to run, prompts by key, light and dark, narrow screens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser

from fastsae.steering.order import text_rows
from fastsae.steering.page import write_steer_page
from tests.steering.steer_examples import FEATURE, HOSTILE, PROMPTS, changed, result, run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "steer.html"
    write_steer_page(path, result())
    return path


@pytest.fixture
def tab(chromium: Browser, page: Path) -> Iterator[Browser]:
    """The page as a new reader sees it; whatever a test does, nothing is loaded, no text runs and nothing fails."""
    chromium.faults.clear()
    chromium.requests.clear()
    chromium.resize(1200)
    chromium.prefer("light")
    chromium.open(page)
    chromium.evaluate("localStorage.clear()")
    chromium.wait("document.querySelector('.one')")
    yield chromium
    assert chromium.evaluate("window.hacked") is None
    assert chromium.evaluate("document.images.length + document.querySelectorAll('link, iframe, object').length") == 0
    assert chromium.evaluate("document.scripts.length") == 2  # the data and the page's own
    assert {url.partition("#")[0] for url in chromium.requests} <= {"about:blank", page.as_uri()}
    assert chromium.faults == []


def shown_prompt(tab: Browser) -> int:
    selected = "[...document.querySelectorAll('[role=tab]')].findIndex(tab => tab.ariaSelected === 'true')"
    chosen = tab.evaluate(selected)
    assert tab.evaluate("document.querySelector('.prompt').textContent").startswith(PROMPTS[chosen].partition("\n")[0])
    return chosen


def test_all_texts_of_a_prompt_stand_beside_each_other_with_their_measures(tab: Browser) -> None:
    assert shown_prompt(tab) == 0
    n = sum(len(row.runs) for row in text_rows(result()))
    assert tab.evaluate("document.querySelectorAll('.one').length") == n
    assert tab.evaluate("document.querySelectorAll('.one dl').length") == n
    tops = (
        "[...document.querySelectorAll('.texts')].map(row => new Set([...row.children].map(one => one.offsetTop)).size)"
    )
    assert tab.evaluate(tops)[:2] == [1, 1]
    first = "document.querySelectorAll('.one')[2].innerText"
    for part in (
        "feature 13794, alpha 15 · texts of this dose hold on average",
        "mean KL",
        "0.116",
        "3.18\u00a0%",
        "40, cut off",
    ):
        assert part in tab.evaluate(first)
    tab.resize(400)
    assert tab.evaluate(tops)[:2] == [2, 2]  # a list


def test_prompts_are_chosen_by_key_tab_and_address(tab: Browser, page: Path) -> None:
    for key, expected in (("j", 1), ("ArrowRight", 2), ("j", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
        tab.press(key)
        assert shown_prompt(tab) == expected
    tab.evaluate("document.getElementById('tab-2').click()")
    tab.settle()
    assert shown_prompt(tab) == 2
    tab.evaluate("document.getElementById('tab-2').focus()")
    tab.press("ArrowLeft")
    assert tab.evaluate("document.activeElement.id") == "tab-1"
    assert tab.evaluate("[...document.querySelectorAll('[role=tab]')].map(tab => tab.tabIndex)") == [-1, 0, -1]
    for hash_, expected in (("#prompt-3", 2), ("#prompt-99", 0), ("#prompt-0", 0), ("#other", 0)):
        tab.open(page, hash_)
        tab.wait("document.querySelector('.one')")
        assert shown_prompt(tab) == expected


def test_tokens_are_shaded_by_their_kl_and_say_it_under_the_pointer(tab: Browser) -> None:
    shades = tab.evaluate(
        "[...document.querySelectorAll('.one')[2].querySelectorAll('.text span')].map(s => s.style.getPropertyValue('--a'))"
    )
    kl = result()["runs"][4]["texts"][0]["kl"]
    assert len(shades) == len(kl)
    order = sorted(range(len(kl)), key=lambda i: kl[i])
    assert [float(shades[i]) for i in order] == sorted(map(float, shades))
    fourth = "document.querySelectorAll('.one')[2].querySelectorAll('.text span')[3]"
    tab.evaluate(f"{fourth}.scrollIntoView({{ block: 'center' }})")
    tab.settle()
    box = tab.evaluate(f"(box => [box.x + 8, box.y + 5])({fourth}.getClientRects()[0])")
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    tab.settle()
    text = tab.evaluate("document.querySelector('.tip:not([hidden])').textContent")
    for part in (f"KL {kl[3]:.3g}", "alpha 15", "activation ", "token 4"):
        assert part in text
    shaded = "[...document.querySelectorAll('.one')[1].querySelectorAll('.text span')].filter(one => one.style.cssText).length"
    assert tab.evaluate(shaded) == 0  # the prompted text has no KL


def test_hostile_texts_are_whole_and_what_is_empty_is_said(tab: Browser) -> None:
    text = tab.evaluate("document.querySelectorAll('.one')[4].querySelector('.text').textContent")
    for part in (
        HOSTILE[0],
        HOSTILE[1],
        "[U+202E]gnp.exe",
        " שלום",
        "你好,世界",
        "👩‍👩‍👧",
        "[U+001B][2J",
        "[U+2028]",
        "↵\n↵\n",
        "∅",
        "&lt;b&gt;",
    ):
        assert part in text
    tab.evaluate("location.hash = 'prompt-3'")
    tab.settle()
    first = "document.querySelector('.one').textContent"
    assert "[end]" in tab.evaluate(first)
    assert "22, ended" in tab.evaluate(first)
    assert "nothing was written" in tab.evaluate("document.getElementById('panel').textContent")


def test_light_and_dark_by_setting_and_by_switch(tab: Browser, page: Path) -> None:
    colours = """[document.body, document.querySelector('.one'), document.querySelector('svg .stable')]
      .map(one => getComputedStyle(one)[one.tagName === 'path' ? 'fill' : 'backgroundColor'])"""
    light = tab.evaluate(colours)
    tab.prefer("dark")
    dark = tab.evaluate(colours)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    tab.evaluate("theme.click()")
    assert tab.evaluate(colours) == light
    tab.evaluate("localStorage.clear()")


@pytest.mark.parametrize("width", [320, 400])
def test_nothing_is_wider_than_a_telephone(width: int, tab: Browser) -> None:
    tab.resize(width)
    for prompt in range(len(PROMPTS)):
        tab.evaluate(f"location.hash = 'prompt-{prompt + 1}'")
        tab.evaluate("document.querySelectorAll('details').forEach(one => (one.open = true))")
        tab.settle()
        assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_every_control_has_a_name(tab: Browser) -> None:
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "tab", "tabpanel", "tablist", "image", "region"}
    named = [n for n in nodes if n.get("role", {}).get("value") in controls and not n["ignored"]]
    assert len(named) > 20
    assert [n["role"]["value"] for n in named if not n.get("name", {}).get("value", "").strip()] == []


@pytest.mark.parametrize(
    ("changes", "tabs", "texts"),
    [
        ({"runs": [], "prompts": [], "stable": [], "features": []}, [], 0),
        (
            {"runs": [run(FEATURE, "decay", 1e30, 0.1, 0)], "prompts": ["", "\u202e", "x" * 500]},
            ["1 ∅", "2 [U+202E]", "3 xxx"],
            1,
        ),
        ({"prompts": [*PROMPTS, *"abcdefgh"]}, [str(i) for i in range(1, 12)], 16),
    ],
)
def test_odd_results_open_without_a_fault(
    chromium: Browser, tmp_path: Path, changes: dict, tabs: list[str], texts: int
) -> None:
    write_steer_page(tmp_path / "steer.html", changed(**changes))
    chromium.faults.clear()
    chromium.open(tmp_path / "steer.html")
    chromium.wait("state.data")
    chromium.settle()
    names = chromium.evaluate("[...document.querySelectorAll('[role=tab]')].map(tab => tab.textContent)")
    assert len(names) == len(tabs)
    assert all(name.startswith(start) for name, start in zip(names, tabs, strict=True))
    assert chromium.evaluate("document.querySelectorAll('.one').length") == texts
    for _ in range(len(tabs)):
        chromium.press("j")
    assert chromium.faults == []
    assert chromium.evaluate("window.hacked") is None
