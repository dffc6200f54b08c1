"""The page of features: what it holds, and what it does in a browser with texts that want to run."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from page_examples import HOSTILE, examples, page_features, token_text

from fastsae.interpret.features_page import PageHeader, write_features_page
from fastsae.interpret.page_data import PageFeature, intervals, rounded
from fastsae.interpret.windows import FeatureExamples

N = 24
HEADER = PageHeader(
    "Features of </script><script>window.hacked = 5</script>",
    [("model", "<img src=x onerror='window.hacked = 6'>"), ("a path", "a/very/long/path/" * 20)],
    ["The judge </script> reads single words."],
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "features.html"
    write_features_page(path, HEADER, page_features(N), token_text)
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
    yield chromium
    assert chromium.evaluate("window.hacked") is None
    assert chromium.evaluate("document.images.length + document.querySelectorAll('link, iframe, object').length") == 0
    assert chromium.evaluate("document.scripts.length") == 2  # the data and the page's own
    assert {url.partition("#")[0] for url in chromium.requests} <= {"about:blank", page.as_uri()}
    assert chromium.faults == []


def data_of(path: Path) -> dict:
    packed = re.search(r'id="data">([^<]*)<', path.read_text())
    assert packed is not None
    return json.loads(gzip.decompress(b64decode(packed[1])))


def rows(tab: Browser) -> list[int]:
    return tab.evaluate("[...document.querySelectorAll('.rows .id')].map(e => Number(e.textContent))")


def search(tab: Browser, text: str) -> list[int]:
    tab.evaluate(f"search.value = {json.dumps(text)}; search.dispatchEvent(new Event('input'))")
    tab.settle()
    return rows(tab)


def order(tab: Browser, value: str) -> list[int]:
    tab.evaluate(f"order.value = {json.dumps(value)}; order.dispatchEvent(new Event('change'))")
    return rows(tab)


def background(tab: Browser) -> str:
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


def test_no_text_of_a_dialogue_stands_in_the_page_itself(page: Path) -> None:
    text = page.read_text()
    assert [sign for sign in HOSTILE if len(sign) > 4 and sign in text] == []
    assert text.count("<script") == text.count("</script>") == 2
    assert re.findall(r"(?:src|href)=|https?://", text.partition("<script>")[0]) == []
    assert "script-src 'sha256-" in text


def test_tokens_stand_once_and_windows_return(page: Path) -> None:
    data, feature = data_of(page), page_features(N)[2]
    assert len(data["tokens"]) == len(set(data["tokens"]))
    packed = data["features"][2]
    assert packed["id"] == feature.examples.feature
    for place, window in zip(packed["top"], feature.examples.top, strict=True):
        dialogue, start, peak, tokens, kinds, acts = packed["windows"][place]
        assert (dialogue, start, peak) == (window.dialogue, window.start, window.peak)
        assert [data["tokens"][token] for token in tokens] == [token_text(token) for token in window.tokens]
        assert [data["kinds"][int(digit)] for digit in kinds] == list(window.kinds)
        assert acts == pytest.approx(window.activations, rel=0.006)


def test_a_window_that_is_both_top_and_sampled_is_stored_once(tmp_path: Path) -> None:
    one = examples(3)
    both = FeatureExamples(**{**vars(one), "sampled": (*one.top[:2], *one.sampled)})
    write_features_page(tmp_path / "page.html", HEADER, [PageFeature(both)], token_text)
    (packed,) = data_of(tmp_path / "page.html")["features"]
    assert len(packed["windows"]) == len(one.top) + len(one.sampled)
    assert packed["intervals"][0][3][:2] == [0, 1]


def test_200_features_take_less_than_5_mb(tmp_path: Path) -> None:
    write_features_page(tmp_path / "page.html", HEADER, page_features(200), token_text)
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_shares_of_intervals_are_read_off_the_histogram() -> None:
    one = examples(3, n_sampled=0)
    # half of the tokens from 0.1 to 1, half from 1 to 10
    halves = FeatureExamples(**{**vars(one), "maximum": 10.0, "edges": (0.1, 1.0, 10.0), "histogram": (50, 50)})
    found = intervals(halves, 2)
    assert [(i.low, i.high) for i in found] == [(5.0, 10.0), (0.0, 5.0)]
    assert [i.share for i in found] == pytest.approx([0.5 * 0.30103, 1 - 0.5 * 0.30103], rel=1e-4)
    assert sum(i.share for i in intervals(one)) == pytest.approx(1)
    linear = FeatureExamples(**{**vars(one), "maximum": 10.0, "edges": (0.0, 8.0, 10.0), "histogram": (80, 20)})
    assert [i.share for i in intervals(linear, 5)] == pytest.approx([0.2] * 5)


def test_every_sampled_window_lies_in_its_interval() -> None:
    one = examples(5)
    found = intervals(one)
    assert sum(len(i.windows) for i in found) == len(one.sampled)
    assert all(i.low <= w.value <= i.high for i in found for w in i.windows)


@pytest.mark.parametrize(
    ("value", "expected"), [(1.23456, 1.23), (0.0, 0), (float("nan"), None), (float("inf"), None), (None, None)]
)
def test_numbers_are_rounded_and_those_that_are_none_left_out(value: float | None, expected: float | None) -> None:
    assert rounded(value) == expected


def test_the_list_shows_all_features_and_their_figures(tab: Browser) -> None:
    assert rows(tab) == [7 * i for i in range(N)]
    assert tab.evaluate("document.querySelector('h1').textContent") == HEADER.title
    assert tab.evaluate("document.querySelector('.warnings').textContent") == HEADER.warnings[0]
    assert "no explanation" in tab.evaluate("document.querySelectorAll('.rows li')[3].textContent")


def test_search_by_explanation_token_and_number(tab: Browser) -> None:
    assert search(tab, "Zebra") == [49, 119]
    assert tab.evaluate("document.querySelector('[role=status]').textContent") == "2 of 24 features match"
    assert search(tab, "42")[0] == 42
    assert search(tab, "#7")[0] == 7
    assert len(search(tab, "🦓 not there")) == 0
    tab.press("Escape")  # not in the field: nothing to leave
    tab.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.press("Escape")
    assert tab.evaluate("document.activeElement.id") == ""
    assert len(rows(tab)) == N


def test_a_search_from_a_feature_returns_to_the_list(tab: Browser) -> None:
    tab.evaluate("location.hash = 'feature-7'")
    tab.press("/")
    for sign in "zeb":
        tab.press(sign)
    assert rows(tab) == [49, 119]
    assert tab.evaluate("document.activeElement.id") == "search"


def test_order_by_density_score_and_special_mean(tab: Browser, page: Path) -> None:
    features = {feature["id"]: feature for feature in data_of(page)["features"]}
    for key in ("density", "special"):
        values = [features[i][key] for i in order(tab, f"{key} down")]
        assert values == sorted(values, reverse=True)
    found = order(tab, "score detection up")
    values = [next((s[1] for s in features[i]["scores"] if s[0] == "detection"), None) for i in found]
    known = [value for value in values if value is not None]
    assert values == [*sorted(known), None, None]  # what has no score stands last
    assert order(tab, "id up") == sorted(features)


def test_keys_go_through_list_and_features(tab: Browser) -> None:
    tab.press("j")
    tab.press("j")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#feature-7"
    tab.press("Enter")
    assert tab.evaluate("document.querySelector('h1').textContent") == "Feature 7"
    for key, expected in (("j", 14), ("ArrowRight", 21), ("k", 14), ("ArrowLeft", 7), ("k", 0), ("k", 0)):
        tab.press(key)
        assert tab.evaluate("document.querySelector('h1').textContent") == f"Feature {expected}"
    tab.press("Escape")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#feature-0"


def test_next_follows_the_order_and_the_search(tab: Browser) -> None:
    shown = order(tab, "score detection down")
    tab.evaluate(f"location.hash = 'feature-{shown[4]}'")
    tab.settle()
    tab.press("j")
    assert tab.evaluate("location.hash") == f"#feature-{shown[5]}"
    assert f"6 of {N}" in tab.evaluate("document.querySelector('.steps').textContent")


def test_a_link_to_a_feature_opens_it_and_an_unknown_one_says_so(tab: Browser, page: Path) -> None:
    tab.open(page, "#feature-14")
    assert tab.evaluate("document.querySelector('h1').textContent") == "Feature 14"
    tab.open(page, "#feature-999999")
    assert "Feature 999999 is not among the 24" in tab.evaluate("document.querySelector('.warnings').textContent")
    assert len(rows(tab)) == N


def test_a_feature_shows_all_that_is_known_of_it(tab: Browser) -> None:
    tab.evaluate("location.hash = 'feature-14'")
    tab.settle()
    feature = page_features(N)[2]
    text = tab.evaluate("document.querySelector('#main').textContent")
    assert feature.explanation is not None
    for part in (feature.explanation.text, feature.explanation.method, "detection", "chance 0.5", "Nearest features"):
        assert part in text
    assert tab.evaluate("document.querySelectorAll('.logits li').length") == 20
    assert tab.evaluate("document.querySelectorAll('.figures rect').length") == len(feature.examples.histogram)
    assert tab.evaluate("document.querySelectorAll('.examples h3').length") == 5
    tab.evaluate("[...document.querySelectorAll('.examples button')].forEach(button => button.click())")
    assert tab.evaluate("document.querySelectorAll('.context').length") == 20 + 40
    assert tab.evaluate("document.querySelectorAll('.context .top').length") == 20 + 40


def test_texts_are_whole_and_invisible_signs_visible(tab: Browser) -> None:
    shown = tab.evaluate("state.data.tokens.map(visible)")
    assert "</script><script>window.hacked = 1</script>" in shown
    assert {"[U+2028]", "[U+202E]gnp.exe", "[U+200B]", "∅", "↵↵", "⇥", " שלום", "👩‍👩‍👧"} <= set(shown)


def test_a_token_under_the_pointer_says_what_it_is(tab: Browser) -> None:
    tab.evaluate("location.hash = 'feature-14'")
    tab.settle()
    box = tab.evaluate("(b => [b.x + 3, b.y + 5])(document.querySelector('.context .top').getClientRects()[0])")
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    tab.settle()
    window = page_features(N)[2].examples.top[0]
    text = tab.evaluate("document.querySelector('.tip:not([hidden])').textContent")
    assert f"dialogue {window.dialogue}, token {window.start + window.peak}" in text
    assert "activation" in text
    assert window.kinds[window.peak].replace("_", " ") in text


def test_dead_and_bare_features_are_shown(tab: Browser) -> None:
    for feature in (7 * (N - 2), 7 * (N - 1)):
        tab.evaluate(f"location.hash = 'feature-{feature}'")
        tab.settle()
        assert tab.evaluate("document.querySelector('h1').textContent") == f"Feature {feature}"
    tab.evaluate(f"location.hash = 'feature-{7 * (N - 2)}'")
    tab.settle()
    assert "It fires on no token." in tab.evaluate("document.querySelector('#main').textContent")


def test_light_and_dark_by_setting_and_by_switch(tab: Browser, page: Path) -> None:
    light = background(tab)
    tab.prefer("dark")
    dark = background(tab)
    assert light != dark
    tab.open(page)
    tab.evaluate("theme.click()")
    assert background(tab) == light
    tab.open(page)  # the choice is remembered
    assert background(tab) == light
    tab.evaluate("theme.click()")
    tab.prefer("light")
    assert background(tab) == dark
    tab.evaluate("localStorage.clear()")


@pytest.mark.parametrize("width", [320, 400])
def test_nothing_is_wider_than_a_telephone(width: int, tab: Browser) -> None:
    tab.resize(width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    widths = """state.data.features.map(feature => {
      showFeature(feature);
      document.querySelectorAll('.examples button').forEach(button => button.click());
      return document.documentElement.scrollWidth;
    })"""
    assert tab.evaluate(widths) == [width] * N


def test_every_control_has_a_name(tab: Browser) -> None:
    for hash_ in ("", "feature-14"):
        tab.evaluate(f"location.hash = '{hash_}'")
        tab.settle()
        nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
        controls = {"button", "link", "searchbox", "combobox", "image", "navigation", "region"}
        named = [n for n in nodes if n.get("role", {}).get("value") in controls and not n["ignored"]]
        assert len(named) > 5
        nameless = [n["role"]["value"] for n in named if not n.get("name", {}).get("value", "").strip()]
        assert nameless == []
