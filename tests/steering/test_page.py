"""The page of steering: what it says in words and draws."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import fastsae
from fastsae.evaluate import plots
from fastsae.steering.charts import Level, Series, chart
from fastsae.steering.order import alike, alphas, text_rows
from fastsae.steering.page import write_steer_page
from fastsae.steering.page_sections import over_length
from fastsae.steering.words import MEASURES, MODES, stable_ends, stable_sentence
from tests.evaluate.test_report_page import Checker
from tests.steering.steer_examples import ALPHAS, FEATURE, FIXED_LIKE_CAPPED, HOSTILE, PROMPTS, changed, result, run

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
