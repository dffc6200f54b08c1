"""The report: well-formed, self-contained, escaped, and right about what it says in words."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.evaluate import Evaluation, plots, write_report
from fastsae.evaluate.dialogues import CLASSES, FIELDS, DialogueSums
from fastsae.evaluate.page import number, visible
from fastsae.summary import print_summary

VOID = {"meta"}
METRICS = {"fvu": 0.1234, "l0": 33.3, "dead_share": 0.25, "delta_loss_percent": -0.5, "recovered": None, "tokens": 1010}
METRICS |= {
    "sinks": 10,
    "sinks_beyond_position_0": 0,
    "mse_log2": 1.5,
    "mse_with_sinks_log2": 16.8,
    "special_fvu": 0.25,
}
CONFIG = {"model": "demo", "layer": 3, "note": "<script>alert(1)</script>"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; every element must be closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def history(n: int) -> list[dict]:
    rows = [
        {"step": i, "tokens": 4096 * (i + 1), "loss": 5.0 / (i + 1), "mse_loss": 4.0 / (i + 1), "l0": 900.0 / (i + 1)}
        | {"fvu": 1.0 / (i + 1), "lr": 1e-3, "l0_coefficient": 0.1, "dead_share": 0.01, "tokens_per_second": 1e4}
        for i in range(n)
    ]
    rows[-1] |= {"loss": float("nan"), "fvu": None}
    return rows


def evaluation() -> Evaluation:
    context = {
        "dialogue": 7,
        "position": 12,
        "peak": 1,
        "max_activation": 3.0,
        "tokens": ["<|im_start|>", "<script>", "\n"],
        "activations": [0.0, 3.0, 1.5],
    }
    feature = {
        "feature": 17,
        "mean_activation": 1.25,
        "mean_activation_by_token": {"<|im_start|>": 1.25, "user": 0.0},
        "share_special": 0.5,
        "share_other": 0.001,
        "contexts": [context],
    }
    row = {"token": "<|im_start|>", "count": 12, "mse": 0.5, "fvu": None, "l0": 20.0, "norm": 8.0}
    return Evaluation(
        metrics=METRICS | {"dialogues": 10},
        feature_counts=torch.tensor([0, 1, 10, 500, 1000]),
        special_tokens=[row, row | {"token": "attention sinks"}],
        top_special_features=[feature],
        dialogues=DialogueSums(8, np.zeros((1, len(CLASSES), len(FIELDS))), np.array([3])),
    )


def write(tmp_path: Path, **changes) -> tuple[str, Checker]:
    arguments = {"config": CONFIG, "metrics": METRICS, "history": history(30), "evaluation": evaluation()} | changes
    write_report(tmp_path / "report.html", **arguments)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return page, checker


def test_the_page_is_well_formed_and_loads_nothing(tmp_path):
    page, checker = write(tmp_path)
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in checker.attributes}
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.lower())
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no temporary file stays


def test_tokens_and_configuration_are_escaped(tmp_path):
    page, checker = write(tmp_path)
    assert "<script" not in page
    assert "<|im_start|>" not in page
    text = "".join(checker.text)
    assert "<|im_start|>" in text
    assert "<script>alert(1)</script>" in text
    assert "↵" in text


def test_it_says_what_was_measured(tmp_path):
    _, checker = write(tmp_path)
    text = "".join(checker.text)
    assert "1 of 5 features (20.0 %) never fired on 1,000 tokens" in text
    assert "2 fire on more than a tenth" in text
    assert "Feature 17" in text
    assert "fires on 50.0 % of special tokens and 0.100 % of others" in text
    cards = dict(re.findall(r'"name">([^<]+)</div><div class="value">([^<]+)', (tmp_path / "report.html").read_text()))
    assert cards["FVU"] == "0.123"
    assert cards["Dead features"].strip() == "25.0"
    assert cards["Delta loss"].strip() == "−0.500"
    assert cards["Loss recovered"] == "n/a"


def gradients(control: bool) -> dict:
    """What GSNR and leakage are, with numbers that are undefined among them."""
    quartiles = {"pooled": 0.2, "mean": 0.3, "lower_quartile": 0.1, "median": 0.25, "upper_quartile": 0.5}
    undefined = dict.fromkeys(quartiles)
    ratios = {
        name: {"pooled": 0.0625, "live": quartiles, "dead": undefined}
        for name in ("W_enc", "W_dec", "b_enc", "threshold")
    }
    ratios["b_dec"] = {"pooled": None, "all": undefined}
    gsnr = {"coefficient": 0.5, "tokens": 1200, "dialogues": 9, "sampled_features": 256}
    leaks = {name: {"tokens": 10, **quartiles} for name in ("activation", "W_enc", "W_dec", "b_enc", "b_dec")}
    undefined_leaks = {name: {"tokens": 0, **undefined} for name in leaks}
    bins = [{"from": 0, "to": 0, **leaks}, {"from": 1, "to": 1, **leaks}, {"from": 2, "to": 3, **undefined_leaks}]
    places = ("begins_the_block", "begins_behind_another", "begins_before_the_block")
    way = {"sinks": undefined_leaks, **{place: {**leaks, "bins": bins} for place in places}}
    leakage = {"coefficient": 0.0, "model_dtype": "float32", "block_length": 2048, "block": way}
    return {
        "gsnr": {**gsnr, "per_token": ratios, "per_dialogue": ratios},
        "leakage": {**leakage, "packed": way if control else None},
    }


@pytest.mark.parametrize("control", [True, False])
def test_gradients_have_their_sections(tmp_path, control):
    page, checker = write(tmp_path, metrics=METRICS | gradients(control))
    text = " ".join(checker.text)
    assert "0.0625 0.250 0.100 to 0.500" in text
    assert "the squared error and 0.500 times the sparsity term" in text
    assert "The loss is the squared error alone" in text
    assert "a block of 2,048 tokens" in text
    assert "0.250 (0.200)" in text
    assert "n/a (n/a)" in text
    assert ("packed (control)" in text) is control
    assert "None" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.lower())
    assert "Gradient signal" not in write(tmp_path)[0]


def test_trained_and_evaluated_tokens_are_told_apart(tmp_path):
    _, checker = write(tmp_path, metrics={"tokens": 4096, "tokens_evaluated": 1010})
    text = " ".join(checker.text)
    assert "evaluated on 1,010 tokens in 10 dialogues" in text
    assert "4,096 tokens trained on" in text
    _, checker = write(tmp_path, metrics={"tokens": 1010})
    assert "1,010 tokens evaluated" in " ".join(checker.text)


def test_figures_with_sinks_stand_beside_the_headline(tmp_path):
    page, checker = write(tmp_path)
    cards = re.findall(r'<div class="card"><div class="name">([^<]+)</div>(.*?)<div class="meaning">', page)
    shown = {name: re.findall(r">([^<>]+)<", rest) for name, rest in cards}
    assert shown["MSE, log2"] == ["1.50", "16.8 with attention sinks"]
    assert shown["Special-token FVU"] == ["0.250"]
    assert "10 tokens are attention sinks and left out unless a figure says otherwise" in "".join(checker.text)
    assert "more than ten times" not in "".join(checker.text).partition("All metrics")[0]
    _, checker = write(tmp_path, metrics=METRICS | {"sinks": 12, "sinks_beyond_position_0": 2})
    assert "the first token of each dialogue, and 2 that are more than ten times as long" in "".join(checker.text)


def test_warnings_stand_before_the_headline(tmp_path):
    warnings = ["L0 is 38.1, 19 % above the target of 32; <b>", "3 % of the dialogues were dropped"]
    metrics = METRICS | {"warnings": warnings, "target_l0": 32, "l0_missed_percent": 19.1}
    _, checker = write(tmp_path, metrics=metrics)
    text = "\n".join(checker.text)
    for warning in warnings:
        assert text.count(warning) == 1
        assert text.index(warning) < text.index("FVU")
    assert "target: 32" in text
    assert 'class="warnings"' not in write(tmp_path, metrics=METRICS | {"warnings": []})[0]


def test_the_summary_shows_both_figures_and_the_warnings(capsys):
    metrics = METRICS | {"mse": 3.93, "mse_with_sinks": 1.16e5, "special_mse": None, "special_mse_with_sinks": 4.17e6}
    print_summary(metrics | {"warnings": ["L0 is 38.1, 19 % above the target of 32"]})
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {meaning: value for value, meaning in lines}
    assert shown["squared error per element, averaged per dialogue (MSE)"] == "3.93"
    assert shown["squared error per element on special tokens"] == "undefined"
    assert [value for value, meaning in lines if meaning == "the same with attention sinks"] == ["1.16e+05", "4.17e+06"]
    assert lines[-1] == ["warning:", "L0 is 38.1, 19 % above the target of 32"]
    print_summary(METRICS)
    assert "warning" not in capsys.readouterr().out


def test_dialogues_that_could_not_be_used_are_listed(tmp_path):
    of_the_data = {
        "dialogues_dropped": 1203,
        "dropped_by_reason": {"it has no text": 3, "the template <refused> it": 1200},
        "dropped_first_rows": {"it has no text": 41, "the template <refused> it": 0},
        "unknown_roles": {"bing": 7},
    }
    page, checker = write(tmp_path, metrics=METRICS | of_the_data)
    rows = dict(re.findall(r'<tr><td>([^"]+)</td><td class="number">([^<]+)</td></tr>', page))
    assert rows == {
        "could not be used because it has no text, such as row 41": "3",
        "could not be used because the template &lt;refused&gt; it, such as row 0": "1,200",
        "have the unknown role <code>bing</code>": "7",
    }
    assert "dialogues_dropped 1,203 dialogues that could not be used" in " ".join(checker.text)
    nothing = {"dialogues_dropped": 0, "dropped_by_reason": {}, "dropped_first_rows": {}, "unknown_roles": {}}
    assert "Unusual dialogues" not in write(tmp_path, metrics=METRICS | nothing)[0]
    assert "Unusual dialogues" not in write(tmp_path)[0]


def test_values_that_are_missing_are_no_part_of_a_curve(tmp_path):
    rows = history(4)
    for row in rows[1:]:
        row["fvu"] = None
    rows[2]["loss"] = rows[2]["l0"] = None
    page, _ = write(tmp_path, history=rows)
    assert page.count("<circle") == 1  # the only FVU
    _, checker = write(tmp_path, history=[row | {"fvu": None} for row in rows])
    assert "No values to draw." in "".join(checker.text)


def test_activation_decides_the_background(tmp_path):
    page, _ = write(tmp_path)
    shades = [float(a) for a in re.findall(r"--a:([\d.]+)", page)]
    assert len(shades) == 2  # the token on which the feature does not fire has none
    assert shades[0] > shades[1] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"history": []},
        {"history": history(1)},
        {"history": [{"step": 0, "tokens": 10}]},
        {"evaluation": None},
        {"metrics": {}, "config": {}},
        {"history": history(5000)},
    ],
    ids=["no history", "one row", "row without values", "no evaluation", "nothing", "long"],
)
def test_missing_parts_leave_a_page(tmp_path, changes):
    page, checker = write(tmp_path, **changes)
    assert "Sparse autoencoder report" in "".join(checker.text)
    assert len(page) < 100_000


def test_an_existing_report_is_replaced(tmp_path):
    (tmp_path / "report.html").write_text("old")
    page, _ = write(tmp_path)
    assert "old</" not in page


def test_linear_ticks_are_round_and_inside():
    assert plots.linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert plots.linear_ticks(0, 37) == [0, 10, 20, 30]
    assert plots.linear_ticks(-4.0, 0) == [-4, -3, -2, -1, 0]
    assert plots.linear_ticks(2, 2) == [2]


def test_line_chart_puts_zero_at_the_bottom_and_the_top_at_the_top():
    svg = plots.line_chart({"a": [(0, 0.0), (10, 4.0)]}, x_label="x", y_label="y")
    assert f"M{plots.LEFT:.1f} {plots.HEIGHT - plots.BOTTOM:.1f}" in svg
    assert f"L{plots.WIDTH - plots.RIGHT:.1f} {plots.TOP:.1f}" in svg


def test_numbers_of_ticks_fit_left_of_a_chart():
    values = [0, 0.05, -2.5, 1500, 99_999, 1e5, -2e5, 1.5e6, 1e9, -1e30, 1e-6]
    texts = ["0", "0.05", "−2.5", "1,500", "99,999", "100k", "−200k", "1.5M", "1e9", "−1e30", "1e-6"]
    assert [plots.tick_text(value) for value in values] == texts


@pytest.mark.parametrize("values", [(1e-3, 1e9), (3.0, 3.0), (0.4, 0.6), (10, 1000), (1.0, 1e30)])
def test_log_axis_holds_its_values(values):
    ticks, low, high = plots.log_ticks(min(values), max(values))
    assert low <= min(values) <= max(values) <= high
    assert low < high
    assert len(ticks) <= 13


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (2e-5, "2.00e−05"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (-0.5, "−0.500"),
        (0, "0"),
        (0.0, "0"),
        (None, "n/a"),
        (float("nan"), "n/a"),
        (99.96, "100.0"),
        (33.33, "33.3"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_visible():
    assert visible("a\n\tb") == "a↵⇥b"
