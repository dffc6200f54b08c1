"""The page of steering: what it says in words and draws, and what it does in a browser with texts that want to run."""

from __future__ import annotations

import copy
import gzip
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

import fastsae
from fastsae.evaluate import plots
from fastsae.steering.charts import Level, Series, chart
from fastsae.steering.order import alike, alphas, text_rows
from fastsae.steering.page import write_steer_page
from fastsae.steering.page_sections import over_length
from fastsae.steering.words import MEASURES, MODES, stable_ends, stable_sentence
from tests.evaluate.test_report import Checker
from tests.steering.steer_examples import ALPHAS, FEATURE, FIXED_LIKE_CAPPED, HOSTILE, PROMPTS, result, run

ROOT = Path(__file__).parents[2]


def written(tmp_path: Path, found: dict[str, Any]) -> tuple[str, str]:
    """The page, and its visible text with single spaces."""
    write_steer_page(tmp_path / "steer.html", found)
    page = (tmp_path / "steer.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page.partition("<script")[0].partition("</head>")[2] + "</body>")
    return page, " ".join("".join(checker.text).split())


def data_of(page: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)<', page)
    assert packed is not None
    return json.loads(gzip.decompress(b64decode(packed[1])))


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(result()) | changes


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    page, _ = written(tmp_path, result())
    checker = Checker()
    checker.feed(page.partition("<script")[0] + page.rpartition("</script>")[2])
    assert checker.open == []
    assert page.count("<script") == page.count("</script>") == 2
    assert re.findall(r"(?:src|href)=|https?://", page.partition("<script>")[0].replace("&lt;img src=x", "")) == []
    assert "script-src 'sha256-" in page
    assert [sign for sign in HOSTILE if len(sign) > 4 and "&" not in sign and sign in page] == []


def test_style_and_script_are_packed_into_the_wheel() -> None:
    packed = re.findall(r'"([^"]+)"', (ROOT / "pyproject.toml").read_text().partition("package-data]\nfastsae =")[2])
    folder = Path(fastsae.__file__).parent
    found = [str(path.relative_to(folder)) for kind in ("*.css", "*.js") for path in folder.rglob(kind)]
    assert {"steering/steer.css", "steering/steer.js", "evaluate/interactive.js"} <= set(found)
    assert [path for path in found if not any(fnmatch(path, pattern) for pattern in packed)] == []


def test_the_header_says_what_was_steered_and_how_it_was_chosen(tmp_path: Path) -> None:
    _, text = written(tmp_path, result())
    for part in (
        "Steering features 13794, 7",
        "SmolLM2-135M-<b>Instruct</b>",
        "layer 15 model.layers.15",
        "at all tokens",
        "Feature 13794: strongest at <|im_start|>, score 39.9; its largest activation seen is 51.2",
        "Feature 7: --feature",
        "Alpha auto found 37.5, where the p95 KL is 1.02 nats",
        "10 (0.0800), 37.5 (1.02)",
        "Alpha times the feature's decoder row is added to the residual stream.",
        "“prompted” is the unsteered model, asked in words instead: Use words such as <sea> in your answer.",
    ):
        assert part in text
    _, text = written(
        tmp_path, changed(auto=None, features=[], temperature=0.5, seed=3, positions="special", unit="max")
    )
    for part in (
        "temperature 0.5, seed 3",
        "at the special tokens",
        "Alpha times the feature's maximum times the feature's",
    ):
        assert part in text
    assert "Alpha auto" not in text


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_explained(tmp_path: Path, mode: str) -> None:
    _, text = written(tmp_path, changed(mode=mode))
    assert MODES[mode].format("alpha")[1:] in text


def test_each_measure_is_drawn_and_explained_beside_what_is_not_steered(tmp_path: Path) -> None:
    page, text = written(tmp_path, result())
    figures = re.findall(r"<figure>.*?</figure>", page)
    assert len(figures) == len(MEASURES) + 2  # and KL and strength over the length
    for measure, figure in zip(MEASURES, figures, strict=False):
        assert measure.meaning in text
        assert figure.count('class="line') == 2  # the number of a dynamic dose is no alpha
        assert figure.count("<rect") == 1
    assert "The unsteered text stands at 3.00, the prompted baseline at 4.05." in text
    assert "The unsteered text stands at 2.00 %, the prompted baseline at 5.75 %." in text
    assert "n/a" not in text.partition("All figures in a table")[0]
    assert figures[2].count('class="level') == 2  # perplexity of both; where KL is 0 or undefined there is no line
    assert figures[0].count('class="level') == 0


def test_the_stable_range_is_shaded_where_it_is_and_said_in_words(tmp_path: Path) -> None:
    page, text = written(tmp_path, result())
    x, width = map(float, re.findall(r'<rect class="stable" x="([\d.]+)" y="12" width="([\d.]+)"', page)[0])
    whole = plots.WIDTH - plots.RIGHT - plots.LEFT
    assert (x, width) == (plots.LEFT, pytest.approx(whole * 50 / 200, abs=0.06))
    assert "feature 13794, fixed: the texts hold from alpha 0 to 50 (at 100 repeats pass 20 %)." in text
    assert "feature 13794, decay: the texts hold at no dose of the grid (repeats pass 20 %)." in text
    assert "<rect class" not in written(tmp_path, changed(stable=result()["stable"][2:]))[0]


@pytest.mark.parametrize(
    ("lowest", "highest", "ends", "words"),
    [
        (None, None, None, "hold at no dose of the grid"),
        (0.0, 0.0, (0.0, 0.0), "hold at alpha 0 alone"),
        (None, 15.0, (0.0, 15.0), "hold from alpha 0 to 15"),
        (-15.0, None, (-15.0, 0.0), "hold from alpha −15 to 0"),
        (-15.0, 7.5, (-15.0, 7.5), "hold from alpha −15 to 7.5"),
        (1e-7, 1e30, (1e-7, 1e30), "hold from alpha 1e−07 to 1e+30"),
    ],
)
def test_ends_of_a_stable_range(lowest: float | None, highest: float | None, ends: object, words: str) -> None:
    row = {"arm": FEATURE, "dose": "fixed", "lowest": lowest, "highest": highest, "breaks": [], "reason": ""}
    assert stable_ends(row) == ends
    assert stable_sentence(row) == f"feature 13794, fixed: the texts {words}."
    if ends:
        assert f"the texts {words}, but not at 2.5, 5." in stable_sentence({**row, "breaks": [2.5, 5.0]})


def test_a_grid_without_0_begins_at_the_unsteered_text(tmp_path: Path) -> None:
    runs = [one for one in result()["runs"] if one["alpha"] or one["arm"] == "unsteered"]
    fixed = "feature 13794, fixed, 0: 0<"
    assert fixed in written(tmp_path, changed(runs=runs))[0]
    assert fixed not in written(tmp_path, changed(runs=runs, mode="clamp"))[0]  # a clamp to 0 is not the unsteered text


def test_a_chart_holds_negative_alphas_and_leaves_out_what_is_no_number() -> None:
    points = [(-10.0, 2.0), (0.0, 0.0), (5.0, float("nan")), (10.0, float("inf")), (20.0, 4.0)]
    svg = chart([Series(0, "one", points)], x_label="alpha", y_label="KL", stable=(-10.0, 0.0))
    assert "nan" not in svg
    assert "inf" not in svg
    xs = [float(x) for x in re.findall(r'translate\(([\d.]+) [\d.]+\)"><title>one', svg)]
    span = plots.WIDTH - plots.RIGHT - plots.LEFT
    assert xs == pytest.approx([plots.LEFT, plots.LEFT + span / 3, plots.LEFT + span], abs=0.1)
    assert "No values" in chart([Series(0, "one", [(1.0, float("nan"))])], x_label="alpha", y_label="KL")
    assert "No values" in chart([Series(0, "one", [(1.0, 0.0)])], x_label="alpha", y_label="KL", log=True)
    assert "<rect" in chart([Series(0, "one", [(0.0, 1.0)])], x_label="alpha", y_label="KL", stable=(0.0, 0.0))


def test_a_line_far_above_all_points_is_left_out() -> None:
    series = [Series(0, "one", [(0.0, 1.0), (1.0, 2.0)])]
    for value, log, n in ((3.9, False, 1), (4.1, False, 0), (4.1, True, 1)):
        svg = chart(series, x_label="alpha", y_label="KL", log=log, levels=[Level("prompted", "prompted", value)])
        assert svg.count('class="level') == n


def test_a_dynamic_dose_stands_beside_the_fixed_one_of_like_kl(tmp_path: Path) -> None:
    found = alike(result())
    assert [(one.fixed["arm"], one.fixed["alpha"]) for one in found] == [(FEATURE, FIXED_LIKE_CAPPED)]
    assert [one["dose"] for one in found[0].dynamic] == ["decay", "kl_cap", "set_point"]
    _, text = written(tmp_path, result())
    assert "Like feature 13794, alpha 50" in text
    for name in ("decay, from 100", "KL cap, budget 0.5 nats", "set point, target 12"):
        assert f"feature 13794, {name}" in text
    assert "is not at like KL" not in text
    runs = [*result()["runs"], run(FEATURE, "decay", 300.0, 90.0, 5)]
    fixed, *dynamic = (one for pair in alike(changed(runs=runs))[1:] for one in (pair.fixed, *pair.dynamic))
    assert (fixed["alpha"], [one["alpha"] for one in dynamic]) == (200.0, [300.0])
    _, text = written(tmp_path, changed(runs=runs))
    assert re.search(
        r"decay, from 300 is not at like KL: no fixed dose of the grid comes closer than 1\d\.\d times\.", text
    )


def test_windows_over_the_length_are_means_over_the_texts_that_are_that_long() -> None:
    texts = [[1.0, 3.0, 5.0, 7.0, 9.0], [3.0, 5.0], []]
    assert over_length(texts, 2) == [(1.5, 3.0), (3.5, 6.0), (5.0, 9.0)]
    assert over_length([], 2) == []


def test_a_fixed_dose_is_its_alpha_at_every_token_and_others_are_their_scale() -> None:
    runs = result()["runs"]
    assert alphas(runs[4], runs[4]["texts"][0]) == [15.0] * 40
    assert alphas(runs[-3], runs[-3]["texts"][0])[:2] == [100.0, 97.0]
    text = runs[0]["texts"][0] | {"strengths": [0.0, 0.0]}
    assert alphas(runs[0], text) == [0.0, 0.0]


def test_texts_of_one_alpha_stand_in_one_row(tmp_path: Path) -> None:
    runs = result()["runs"]
    rows = text_rows(result())
    assert [row.title for row in rows] == [
        "Not steered",
        *(f"alpha {alpha:g}" for alpha in ALPHAS[1:]),
        "Doses at the KL of alpha 50",
    ]
    assert [runs[i]["arm"] for i in rows[0].runs] == ["unsteered", "prompted"]
    assert [runs[i]["arm"] for i in rows[-2].runs] == [FEATURE, "random direction"]
    assert [runs[i]["dose"] for i in rows[-1].runs] == ["fixed", "decay", "kl_cap", "set_point"]
    lone = text_rows(changed(runs=[run(FEATURE, "decay", 9.0, 0.1, 0)]))
    assert lone == [("Other doses", [0])]
    other = result()
    other["runs"][2]["texts"][0]["text"] = "something else"  # alpha 0 that is not the unsteered text is shown
    assert [row.title for row in text_rows(other)][1] == "alpha 0"


def test_the_data_holds_every_token_with_three_digits(tmp_path: Path) -> None:
    page, _ = written(tmp_path, result())
    data, found = data_of(page), result()
    assert data["prompts"] == PROMPTS
    for packed, one in zip(data["runs"], found["runs"], strict=True):
        for text in one["texts"]:
            of_text = packed["texts"][str(text["prompt"])]
            assert of_text["pieces"] == text["pieces"]
            for key in ("kl", "acts"):
                assert of_text[key] == pytest.approx(text[key], rel=0.006)
    assert data["runs"][1]["texts"]["0"]["measures"][0] == ["mean KL", "n/a"]
    holds = [one["holds"] for one in data["runs"][2:]]
    assert sum(holds) == 4 + 5


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": [], "prompts": [], "stable": [], "features": []},
        {"runs": [run("unsteered", "fixed", 0.0, 0.0, 0)], "stable": []},
        {"runs": [run(FEATURE, "fixed", 0.0, 0.0, 0)]},
        {"runs": [run(FEATURE, "kl_cap", 1e30, 600, 0) | {"mean_kl": 1e38, "perplexity": float("inf")}]},
        {"runs": [run(FEATURE, "fixed", a, 0.1, 0) for a in (-1e-9, -25.0, 1e12)]},
        {"runs": [{**run(FEATURE, dose, 1.0, 0.1, 0), "texts": []} for dose in ("fixed", "decay")]},
        {"mode": "a mode to come", "unit": "new", "positions": "mask", "architecture": "<b>"},
    ],
)
def test_odd_results_make_a_page(tmp_path: Path, changes: dict[str, Any]) -> None:
    page, text = written(tmp_path, changed(**changes))
    assert "How far one can push" in text
    assert "nan" not in page.partition("<script")[0].partition("</head>")[2]


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
