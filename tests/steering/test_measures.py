"""Measures of texts against counts by hand, and the stable range of grids."""

from __future__ import annotations

import math

import pytest

from fastsae.steering.measures import (
    Measures,
    measure,
    measure_all,
    other_script,
    percentile,
    repeated_ngrams,
    stable_range,
)
from fastsae.steering.rollout import Rollout

WHOLE: Measures = {
    "mean_kl": 0.1,
    "p95_kl": 0.5,
    "perplexity": 2.0,
    "repeated_3grams": 0.05,
    "other_script": 0.0,
    "n_tokens": 40.0,
}


def test_measures_of_one_text() -> None:
    rollout = Rollout([1, 2, 3, 1, 2, 3], "abc где", kl=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], surprise=[math.log(3)] * 6)
    measured = measure(rollout, "What is it?")
    assert (measured["mean_kl"], measured["p95_kl"], measured["n_tokens"]) == (2.5, 5.0, 6)
    assert measured["perplexity"] == pytest.approx(3.0)
    assert measured["repeated_3grams"] == 0.5  # 123 stands twice among 123, 231, 312, 123
    assert measured["other_script"] == 0.5


def test_an_empty_text_has_no_means() -> None:
    measured = measure(Rollout(), "What?")
    assert measured == {**dict.fromkeys(measured), "n_tokens": 0}
    assert measure_all([], []) == {**dict.fromkeys(measured), "n_tokens": 0}


def test_a_surprise_beyond_all_floats_is_an_infinite_perplexity() -> None:
    assert measure(Rollout([1], "a", kl=[0.0], surprise=[800.0]), "a")["perplexity"] == math.inf
    assert measure(Rollout([1], "a", kl=[0.0], surprise=[math.inf]), "a")["perplexity"] == math.inf


def test_means_over_texts_leave_out_what_is_undefined_and_pool_the_tokens_of_the_percentile() -> None:
    long = Rollout([1] * 39, "a", kl=[0.0] * 38 + [2.0], surprise=[0.0] * 39)
    short = Rollout([7], "", kl=[3.0], surprise=[math.log(5)])
    measured = measure_all([long, short], ["a", "a"])
    assert measured["p95_kl"] == 0.0  # 38 of 40 tokens are 95 %
    assert measured["mean_kl"] == pytest.approx((2 / 39 + 3) / 2)
    assert measured["perplexity"] == pytest.approx(3.0)
    assert (measured["repeated_3grams"], measured["other_script"]) == (1.0, 0.0)
    assert measured["n_tokens"] == 20


def test_the_percentile_is_one_of_the_values() -> None:
    assert percentile([]) is None
    assert percentile([4.0]) == 4.0
    assert percentile([float(i) for i in range(1, 101)]) == 95.0
    assert percentile([0.0] * 19 + [math.inf]) == 0.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_repeated_ngrams() -> None:
    assert repeated_ngrams([]) is None
    assert repeated_ngrams([1, 2]) is None
    assert repeated_ngrams([1, 2, 3]) == 0.0
    assert repeated_ngrams([8] * 10) == 1.0
    assert repeated_ngrams([1, 2, 1, 2, 5], n=2) == 0.5


@pytest.mark.parametrize(
    ("text", "prompt", "share"),
    [
        ("good day", "What?", 0.0),
        ("дom", "What?", 1 / 3),
        ("1234 ... !?", "What?", None),  # no letter at all
        ("", "What?", None),
        ("any", "12 + 30 = ?", None),  # the prompt has no script to compare with
        ("день good", "What is день?", 0.0),
        ("天气", "What?", 1.0),
        ("今日はカレー", "今日は何", 0.0),  # Japanese is written in three
        ("天気", "なに", 0.0),
        ("これは天", "天气怎么样", 0.75),  # kana behind Chinese is a change of the language
        ("ﾊﾝｶｸ ー 々", "かな", 0.0),
        ("안녕 天", "무엇", 1 / 3),
        ("ㄅ天", "天", 0.0),
        ("\uff26\uff55\uff4c\uff4c \U0001d41b\U0001d428", "plain", 0.0),
        ("e\u0301t\u00e9 na\u00efve", "plain", 0.0),
        ("नमस्ते", "what", 1.0),
        ("\ue000 \u0378 🙂 \u02bc", "what", None),  # private, unassigned, a picture, a modifier: of no script
    ],
)
def test_other_script(text: str, prompt: str, share: float | None) -> None:
    assert other_script(text, prompt) == (share if share is None else pytest.approx(share))


def test_the_stable_range_ends_where_all_that_is_beyond_breaks() -> None:
    broken = Measures(**{**WHOLE, "repeated_3grams": 0.45})
    grid = [(100.0, broken), (0.0, WHOLE), (15.0, WHOLE), (200.0, broken), (50.0, WHOLE)]
    why = "45 % of the 3-grams are repeated, above the limit of 20 %"
    assert stable_range(grid, WHOLE) == (0.0, 50.0, (), f"at 100, {why}")
    chance = [(15.0, broken) if alpha == 15 else (alpha, one) for alpha, one in grid]
    assert stable_range(chance, WHOLE) == (0.0, 50.0, (15.0,), f"at 15, {why}; at 100, {why}")


def test_the_stable_range_goes_below_0_too() -> None:
    foreign = Measures(**{**WHOLE, "other_script": 0.3})
    odd = Measures(**{**WHOLE, "perplexity": 30.0})
    found = stable_range([(-50.0, foreign), (-15.0, WHOLE), (15.0, WHOLE), (25.0, odd)], WHOLE)
    assert found[:3] == (-15.0, 15.0, ())
    assert "at -50, 30 % of the letters are of another script, above the limit of 10 %; at" in found.reason
    assert "at 25, the perplexity is 30, above the limit of 6" in found.reason


def test_no_alpha_holds_or_none_breaks() -> None:
    broken = Measures(**{**WHOLE, "repeated_3grams": 1.0})
    found = stable_range([(25.0, broken), (15.0, broken)], WHOLE)
    assert found[:3] == (None, None, ())
    assert found.reason.startswith("at 15, 100 % of the 3-grams")
    assert stable_range([(15.0, WHOLE), (25.0, WHOLE)], WHOLE) == (15.0, 25.0, (), "no alpha of the grid breaks them")


def test_limits_follow_the_unsteered_texts() -> None:
    dull = Measures(**{**WHOLE, "repeated_3grams": 0.4, "other_script": 0.5, "perplexity": 10.0})
    at_the_limits = Measures(**{**WHOLE, "repeated_3grams": 0.5, "other_script": 0.6, "perplexity": 30.0})
    assert stable_range([(1.0, at_the_limits)], dull).highest == 1.0
    assert stable_range([(1.0, at_the_limits)], WHOLE).highest is None


def test_what_could_not_be_measured_breaks_nothing() -> None:
    nothing = Measures(**{**dict.fromkeys(WHOLE), "n_tokens": 1.0})
    assert stable_range([(1.0, nothing)], WHOLE).highest == 1.0
    assert stable_range([(1.0, WHOLE)], nothing).highest == 1.0
