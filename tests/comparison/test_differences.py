"""From sums of dialogues to values, differences and verdicts."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from fastsae.comparison.differences import NOT_TESTED, TESTED, analyse
from fastsae.comparison.metrics import METRICS, saebench_metrics
from fastsae.errors import FastsaeError
from fastsae.evaluate.dialogues import CLASSES, FIELDS, DialogueSums

DEAD = {"fast": [(10, 100), (20, 100)], "bt-f": [(10, 100), (22, 100)], "bt-p": [(60, 100), (70, 100)]}


def row(rows, token_class, metric, reference):
    return next(r for r in rows if (r["class"], r["metric"], r["reference"]) == (token_class, metric, reference))


def without(sums, token_class, keep=slice(0)):
    """The same sums without the tokens of a class, but for some dialogues."""
    values = sums.values.copy()
    gone = np.ones(len(values), dtype=bool)
    gone[keep] = False
    values[gone, list(CLASSES).index(token_class)] = 0
    return replace(sums, values=values)


@pytest.fixture(scope="module")
def analysed(made_up):
    arms = {
        name: [made_up(60, error * (1 + 0.01 * seed), seed=seed) for seed in range(2)]
        for name, error in (("fast", 0.300), ("bt-f", 0.303), ("bt-p", 0.45))
    }
    pairs = [("fast", "bt-f"), ("fast", "bt-p"), ("fast", "missing")]
    return arms, *analyse(arms, pairs, DEAD, resamples=2000)


def test_metrics_are_the_ratios_that_their_formulas_say(analysed):
    arms, values, _ = analysed
    sums = arms["fast"][1]
    tokens, error = sums.get("tokens", "special"), sums.get("squared_error", "special")
    macro = (error / (tokens * sums.d_in)).mean()
    clean, spliced, zero = (sums.get(name, "special").sum() for name in ("ce", "ce_spliced", "ce_zero"))
    targets = sums.get("targets", "special").sum()
    expected = {
        "mse": macro,
        "mse_log2": np.log2(macro),
        "mse_micro": error.sum() / tokens.sum() / sums.d_in,
        "mse_micro_log2": np.log2(error.sum() / tokens.sum() / sums.d_in),
        "fvu": error.sum() / sums.get("variance", "special").sum(),
        "l0": sums.get("l0", "special").sum() / tokens.sum(),
        "ce": clean / targets,
        "ce_spliced": spliced / targets,
        "ce_zero": zero / targets,
        "delta_loss_percent": 100 * (spliced - clean) / clean,
        "recovered": (zero - spliced) / (zero - clean),
        "kl": sums.get("kl", "special").sum() / targets,
    }
    assert expected.keys() == METRICS.keys()
    for name, number in expected.items():
        value = values["special"][name]["fast"]
        assert value["seeds"][1] == pytest.approx(number, rel=1e-12)
        assert value["value"] == pytest.approx(np.mean(value["seeds"]))
        assert value["low"] <= value["value"] <= value["high"]


def test_a_large_difference_is_shown_and_a_small_one_is_not(analysed):
    _, _, rows = analysed
    far, near = (row(rows, "all", "fvu", reference) for reference in ("bt-p", "bt-f"))
    assert (far["verdict"], near["verdict"]) == ("lower", "no difference shown")
    assert far["low"] < far["difference"] < far["high"] < 0
    assert far["p"] <= far["p_holm"] <= 0.05 < near["p_holm"]
    assert row(rows, "features", "dead_share", "bt-p")["verdict"] == "lower"
    assert row(rows, "features", "dead_share", "bt-f")["verdict"] == "no difference shown"


def test_no_verdict_goes_against_its_interval_or_holm(analysed):
    _, _, rows = analysed
    for r in rows:
        if r["verdict"] in ("lower", "higher"):
            assert not r["low"] <= 0 <= r["high"]
            assert r["p_holm"] <= 0.05
        if r["verdict"] == "no difference shown":
            assert r["reason"]


def test_the_family_is_every_tested_metric_of_every_pair(analysed):
    _, _, rows = analysed
    tested = [r for r in rows if r["p"] is not None]
    assert len(tested) == 2 * len(TESTED)
    smallest = min(tested, key=lambda r: r["p"])
    assert smallest["p_holm"] == pytest.approx(len(tested) * smallest["p"])
    for r in rows:
        if (r["class"], r["metric"]) in NOT_TESTED:
            assert (r["p"], r["p_holm"], r["verdict"]) == (None, None, None)
            assert r["low"] < r["high"]


def test_the_result_is_json_and_the_same_for_the_same_seed(analysed, made_up):
    _, values, rows = analysed
    assert json.loads(json.dumps([values, rows], allow_nan=False)) == [values, rows]
    arms = {name: [made_up(20, 0.3 + 0.1 * i)] for i, name in enumerate(("fast", "bt-f"))}
    once, again = (analyse(arms, [("fast", "bt-f")], DEAD, resamples=300, seed=5) for _ in range(2))
    assert once == again


def test_two_arms_that_are_the_same_do_not_differ(made_up):
    arms = {name: [made_up(30, 0.3)] for name in ("fast", "bt-f")}
    _, rows = analyse(arms, [("fast", "bt-f")], DEAD | {"fast": DEAD["bt-f"]}, resamples=300)
    for r in rows:
        assert (r["difference"], r["verdict"] in (None, "no difference shown")) == (0, True)


def test_arms_of_equal_quality_are_seldom_said_to_differ(made_up):
    """Every arm draws its own noise about one FVU: at most one family in twenty may hold a false verdict."""
    n_families, false = 40, 0
    for family in range(n_families):
        arms = {name: [made_up(30, 0.3, seed=2 * family + i, spread=0.3)] for i, name in enumerate(("fast", "bt-f"))}
        _, rows = analyse(arms, [("fast", "bt-f")], DEAD, resamples=500, seed=family)
        false += any(r["verdict"] in ("lower", "higher") for r in rows)
    assert false <= 6  # at 5 % each, chance alone gives seven or more of 40 once in about 300 times


def test_arms_without_dead_features_could_still_have_differed(made_up):
    arms = {name: [made_up(10, 0.3)] for name in ("fast", "bt-f")}
    _, rows = analyse(arms, [("bt-f", "fast")], {name: [(0, 512)] for name in arms}, resamples=200)
    found = row(rows, "features", "dead_share", "fast")
    assert (found["difference"], found["verdict"]) == (0, "no difference shown")
    assert 0.005 < found["detectable"] < 0.02


def test_one_dialogue_gives_values_and_no_interval(made_up):
    arms = {name: [made_up(1, error)] for name, error in (("fast", 0.3), ("bt-f", 0.9))}
    values, rows = analyse(arms, [("fast", "bt-f")], DEAD, resamples=100)
    assert values["all"]["fvu"]["fast"]["low"] is None
    assert {r["reason"] for r in rows if r["class"] == "all" and r["metric"] == "fvu"} == {"too few dialogues"}


def test_a_class_that_no_dialogue_has_is_undefined(made_up):
    arms = {name: [without(made_up(30, error), "special")] for name, error in (("fast", 0.3), ("bt-f", 0.9))}
    values, rows = analyse(arms, [("fast", "bt-f")], DEAD, resamples=100)
    assert set(itertools.chain(*(v.values() for v in values["special"].values()))) == {None}
    assert not [r for r in rows if r["class"] == "special"]


def test_dialogues_without_a_class_count_for_nothing_in_it(made_up):
    kept = slice(0, 9)
    arms = {name: [without(made_up(30, error), "special", kept)] for name, error in (("fast", 0.3), ("bt-f", 0.9))}
    alone = {
        name: [DialogueSums(s.d_in, s.values[kept], s.dialogues[kept]) for s in seeds] for name, seeds in arms.items()
    }
    (some, rows), (few, few_rows) = (analyse(a, [("fast", "bt-f")], DEAD, resamples=3000) for a in (arms, alone))
    for name in ("mse", "fvu"):
        a, b = some["special"][name]["fast"], few["special"][name]["fast"]
        assert a["value"] == pytest.approx(b["value"])
        assert a["high"] - a["low"] == pytest.approx(b["high"] - b["low"], rel=0.25)
    p, q = (row(r, "special", "fvu", "bt-f")["p"] for r in (rows, few_rows))
    assert p == pytest.approx(q, abs=0.005)


def test_a_perfect_sae_has_no_log_of_its_error(made_up):
    perfect = made_up(30, 0.3)
    values = perfect.values.copy()
    values[:, :, list(FIELDS).index("squared_error")] = 0
    arms = {"fast": [replace(perfect, values=values)], "bt-f": [perfect]}
    found, rows = analyse(arms, [("fast", "bt-f")], DEAD, resamples=1000)
    assert found["all"]["mse"]["fast"]["value"] == 0
    assert found["all"]["mse_log2"]["fast"] is None
    assert not [r for r in rows if r["metric"] == "mse_log2"]
    assert row(rows, "all", "fvu", "bt-f")["verdict"] == "lower"


def test_another_models_activations_are_compared_without_their_scale(made_up):
    arms = {"fast": [made_up(30, 0.3)], "random-model": [made_up(30, 0.5, scale=9.0)]}
    dead = {name: [(1, 10)] for name in arms}
    _, rows = analyse(arms, [("fast", "random-model")], dead, resamples=300)
    assert {r["metric"] for r in rows} == {"fvu", "l0", "dead_share"}
    assert row(rows, "all", "fvu", "random-model")["verdict"] == "lower"


def test_arms_measured_on_other_dialogues_are_refused(made_up):
    arms = {"fast": [made_up(30, 0.3)], "bt-f": [made_up(31, 0.3)]}
    with pytest.raises(FastsaeError, match=r"same held-out dialogues, but those of 'bt-f'"):
        analyse(arms, [], DEAD)
    with pytest.raises(FastsaeError, match="at least one arm"):
        analyse({}, [], {})
    with pytest.raises(FastsaeError, match="at least one SAE"):
        analyse({"fast": []}, [], {})


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_sums_that_are_not_finite_are_refused_by_name(made_up, number):
    values = made_up(5, 0.3).values
    values[3, list(CLASSES).index("user"), list(FIELDS).index("kl")] = number
    with pytest.raises(FastsaeError, match=rf"'kl' over the tokens 'user' of held-out dialogue 3 is {number}"):
        DialogueSums(64, values, np.arange(len(values)))


def test_sums_of_another_shape_are_refused(made_up):
    for values in (np.zeros((3, 2, 9)), np.zeros((0, len(CLASSES), len(FIELDS))), -made_up(2, 0.3).values):
        with pytest.raises(FastsaeError, match="sums of dialogues: expected"):
            DialogueSums(64, values, np.arange(len(values)))


def test_saebench_gets_its_own_names_and_definitions(made_up):
    sums = made_up(20, 0.3)
    found = saebench_metrics(sums, n_dead=10, n_features=40)
    error, variance, tokens = (sums.get(name, "all").sum() for name in ("squared_error", "variance", "tokens"))
    assert found["reconstruction_quality"] == pytest.approx(
        {"explained_variance": 1 - error / variance, "mse": error / tokens}
    )
    assert found["misc_metrics"] == {"frac_alive": 0.75}
    losses = found["model_performance_preservation"]
    zero, spliced, clean = (losses[f"ce_loss_{name}"] for name in ("with_ablation", "with_sae", "without_sae"))
    assert losses["ce_loss_score"] == pytest.approx((zero - spliced) / (zero - clean))
    nothing = DialogueSums(4, np.zeros((1, len(CLASSES), len(FIELDS))), np.arange(1))
    assert saebench_metrics(nothing, 0, 1)["model_performance_preservation"]["ce_loss_score"] is None
