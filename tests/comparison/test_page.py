"""The page of a comparison: whole, self-contained, escaped, and right about what it says in words."""

import copy
import re
from pathlib import Path

import pytest

from fastsae.comparison.differences import analyse
from fastsae.comparison.metrics import METRICS
from fastsae.comparison.page import write_compare_page
from fastsae.comparison.paper import FIGURES
from fastsae.evaluate.dialogues import CLASSES
from tests.evaluate.test_report_page import Checker

ARMS = {"fast": 0.30, "bt-f": 0.45, "random-model": 0.6}
SECTIONS = (
    "What differs",
    "Arms",
    "Paired differences",
    "MSE by class of tokens",
    "L0 against MSE",
    "Leakage between dialogues",
    "Gradient signal-to-noise ratio",
    "Controls",
    "The paper's figures beside ours",
    "Definitions",
    "Configuration",
)


def arm(name, n_seeds):
    runs = [
        {"seed": seed, "training_tokens": 1000, "l0_own_data": 32.5, "seconds": 1.0, "saebench": {}}
        for seed in range(n_seeds)
    ]
    kind = {"is_control": name == "random-model", "is_another_model": name == "random-model"}
    about = f"How {name} is trained."
    return {"name": name, "description": about, "target_l0": 32.0, "runs": runs, "error": None} | kind


def made_up_result(made_up, n_seeds=2, n_dialogues=30):
    sums = {
        name: [
            made_up(n_dialogues, error + 0.001 * seed, seed=seed, scale=9.0 if name == "random-model" else 1.0)
            for seed in range(n_seeds)
        ]
        for name, error in ARMS.items()
    }
    dead = {name: [(10, 100)] * n_seeds for name in ARMS}
    values, differences = analyse(sums, [("bt-f", "fast"), ("random-model", "fast")], dead, resamples=1500)
    block = {"context": "block", "leak": 0.25, "low": 0.1, "high": 0.5, "tokens": 9}
    control = {"context": "packed", "distance": 1.0, "leak": 3e-9, "low": None, "high": None, "tokens": 9}
    gsnr = {"arm": "fast", "group": "W_enc", "unit": "token"}
    return {
        "model": "demo",
        "layer": 3,
        "dataset": "dialogues",
        "text_dataset": "plain text",
        "d_in": 64,
        "d_sae": 100,
        "architecture": "jumprelu",
        "seeds": list(range(n_seeds)),
        "held_out": {"dialogues": n_dialogues, "tokens": 4000, "sinks": n_dialogues},
        "arms": [arm(name, n_seeds) for name in ARMS],
        "values": values,
        "differences": differences,
        "leakage": [block | {"distance": d} for d in (0.0, 10.0)] + [control],
        "gsnr": [
            gsnr | {"features": kind, "median": median, "low": 0.001, "high": 0.1, "pooled": 0.002}
            for kind, median in (("live", 0.0123), ("dead", 0.0456))
        ],
        "warnings": ["A warning.", "Another one."],
        "config": {"seeds": n_seeds},
        "seconds": 12.5,
        "version": "1.2.3",
    }


@pytest.fixture(scope="module")
def result(made_up):
    return made_up_result(made_up)


def write(tmp_path, result):
    """The page, and its text in one line."""
    write_compare_page(tmp_path / "compare.html", result)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in checker.attributes}
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    text = " ".join(" ".join(checker.text).split())
    assert "nan" not in re.findall(r"[a-z]+", text.lower())
    assert "None" not in text
    return page, text


def changed(result, **changes):
    return copy.deepcopy(result) | changes


def test_every_section_is_there_and_nothing_is_loaded(tmp_path, result):
    page, text = write(tmp_path, result)
    assert re.findall(r"<h2>([^<]*)</h2>", page) == list(SECTIONS)
    assert "A warning. Another one." in text
    assert page.count('class="warnings"') == 1
    assert "measured on 4,000 tokens in 30 held-out dialogues, 30 of them attention sinks" in text
    assert [p.name for p in tmp_path.iterdir()] == ["compare.html"]


def test_l0_stands_in_the_row_of_every_arm_with_its_deviation(tmp_path, result):
    page, _ = write(tmp_path, result)
    table = page.split("<h2>Arms</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>.*?</tr>", table)[1:]
    assert len(rows) == len(ARMS)
    for row in rows:
        assert "target L0: 32.0" in row
        assert "+1.6 %" in row  # 32.5 on its own data
        assert row.count("%</small>") == 2


def test_an_arm_far_from_its_target_is_marked(tmp_path, result):
    missed = changed(result)
    missed["arms"][1]["target_l0"] = 16.0
    page, _ = write(tmp_path, missed)
    assert '<small class="higher">+103 %</small>' in page
    assert '<small class="higher">' not in write(tmp_path, result)[0].split("<h2>Paired")[0].split("<h2>Arms")[1]


def test_verdicts_are_never_called_better(tmp_path, result):
    page, text = write(tmp_path, result)
    assert '<span class="higher">higher</span>' in page
    assert "bt-f against fast" in text
    assert "not comparable" in text  # the MSE of another model's activations
    for sentence in re.findall(r"[^.]*\bbetter\b[^.]*\.", text):
        assert "Lower is better" in sentence or "at the same L0" in sentence


def test_names_are_escaped(tmp_path, made_up, result):
    evil = "<script>alert(1)</script>"
    attacked = changed(result, model=evil, dataset=evil, text_dataset=evil, warnings=[evil], config={evil: evil})
    attacked["architecture"] = attacked["version"] = evil
    for entry in attacked["arms"]:
        entry["description"] = entry["error"] = evil
    attacked["arms"][0]["name"] = evil
    for row in attacked["differences"]:
        row["arm"], row["reason"] = evil, evil
    for by_metric in attacked["values"].values():
        for by_arm in by_metric.values():
            by_arm[evil] = by_arm.pop("fast")
    for row in attacked["gsnr"]:
        row["arm"] = row["group"] = row["features"] = row["unit"] = evil
    page, text = write(tmp_path, attacked)
    assert "<script" not in page
    assert text.count(evil) > 20


def test_an_arm_that_failed_stands_in_the_table_with_its_reason(tmp_path, result):
    failed = changed(result)
    failed["arms"].append(arm("bt-p", 0) | {"error": "the plain text has 10 tokens"})
    failed["arms"][0] |= {"error": "seed 2 ran out of memory"}
    page, text = write(tmp_path, failed)
    assert "failed: the plain text has 10 tokens" in text
    assert "a seed failed: seed 2 ran out of memory" in text
    legends = re.findall(r'<p class="legend">.*?</p>', page)
    assert len(legends) == 2
    for legend in legends:  # no SAE, or another model's activations: no mark in the charts
        assert re.sub(r"<[^>]*>", " ", legend).split() == ["fast", "bt-f"]


def test_one_seed_is_said_to_be_one(tmp_path, made_up):
    _, text = write(tmp_path, made_up_result(made_up, n_seeds=1))
    assert "There is one seed" in text
    assert "one seed" in text.split("Paired differences")[0].split("Arms")[1]


def test_few_dialogues_have_no_intervals(tmp_path, made_up):
    _, text = write(tmp_path, made_up_result(made_up, n_dialogues=3))
    assert "no interval" in text
    assert "too few dialogues" in text


def test_what_was_not_measured_is_said_so(tmp_path, result):
    page, text = write(tmp_path, changed(result, leakage=[], gsnr=[], text_dataset=None, warnings=[]))
    assert text.count("Not measured in this comparison.") == 2
    assert re.findall(r"<h2>([^<]*)</h2>", page) == list(SECTIONS)
    assert "plain text plain text" not in text


def test_a_comparison_in_which_every_arm_failed_still_has_a_page(tmp_path, result):
    arms = [arm(name, 0) | {"error": "no memory"} for name in ARMS]
    _, text = write(tmp_path, changed(result, arms=arms, values={}, differences=[], leakage=[], gsnr=[]))
    assert text.count("failed: no memory") == len(ARMS)
    assert "No two arms could be compared." in text
    assert "No values to draw." in text


def test_arms_that_are_not_at_one_l0_are_marked_beside_their_verdicts(tmp_path, made_up):
    sums = {name: [made_up(30, 0.3, l0=l0)] for name, l0 in (("fast", 32.0), ("bt-f", 32.1), ("fast-paper", 180.0))}
    pairs = [("bt-f", "fast"), ("fast-paper", "fast")]
    values, differences = analyse(sums, pairs, {name: [(1, 10)] for name in sums}, resamples=200)
    result = made_up_result(made_up, n_seeds=1) | {"values": values, "differences": differences}
    page, _ = write(tmp_path, result | {"arms": [arm(name, 1) for name in sums]})
    assert re.findall(r"<small( class=\"higher\")?>L0 (\d+)", page) == [("", "32"), (' class="higher"', "180")]


def test_live_and_dead_features_have_their_own_ratios(tmp_path, result):
    page, _ = write(tmp_path, result)
    live, dead = page.split("Gradient signal-to-noise ratio</h2>")[1].split("<h2>")[0].split("<details>")
    assert "0.0123" in live
    assert "0.0456" not in live
    assert "0.0456" in dead


def test_the_leakage_control_is_given_in_words(tmp_path, result):
    page, text = write(tmp_path, result)
    assert "at most 3.0e−09" in text
    assert '<path class="area"' in page
    exact = changed(result)
    exact["leakage"][-1]["leak"] = 0.0
    assert "There it is 0." in write(tmp_path, exact)[1]


def test_the_papers_figures_stand_beside_ours(tmp_path, result):
    _, text = write(tmp_path, result)
    for figure in FIGURES:
        assert figure.paper in text
    fast = result["values"]["special_with_sinks"]["mse_log2"]["fast"]["value"]
    assert f"{fast:.4g}".replace("-", "−") in text
    row = next(r for r in result["differences"] if (r["class"], r["metric"]) == ("all_with_sinks", "mse_log2"))
    assert f"bt-f {2 ** row['difference']:.2f} times [" in text
    assert "not measured" in text


def test_the_documentation_has_every_figure_of_the_paper_and_every_definition():
    document = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    for figure in FIGURES:
        assert f"| {figure.name} | {figure.definition} | {figure.paper} |" in document
    for name, metric in METRICS.items():
        assert f"| `{name}` | {metric.formula} |" in document
    for name, meaning in CLASSES.items():
        assert f"| `{name}` | {meaning} |" in document
