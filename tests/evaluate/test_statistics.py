"""Intervals and tests against published values, and on synthetic data whose truth is known."""

import time

import numpy as np
import pytest

from fastsae.evaluate.statistics import (
    FEWEST_DIALOGUES,
    Interval,
    detectable_difference,
    holm,
    newcombe,
    percentile_interval,
    resampled_ratios,
    sample_size_of_shares,
    sign_flip_p_values,
    two_shares_p_value,
    verdict,
    wilson,
)

N_DIALOGUES, N_SETS = 200, 1000


def heavy_tailed(generator, n=N_DIALOGUES, n_sets=N_SETS, effect=0.0):
    """Sums of two arms and lengths, `[n, n_sets]` each: one column is one held-out set.

    Lengths are log-normal: the longest of 200 dialogues is some 13 times as long as the median one. Some dialogues are harder
    for both arms. The error of the first arm per token is on average `effect` above that of the second one, which is 1.
    """
    lengths = np.ceil(np.exp(generator.normal(4.5, 1.0, (n, n_sets))))
    hardness = np.exp(generator.normal(-0.045, 0.3, (n, n_sets)))
    noise = np.exp(generator.normal(-0.02, 0.2, (2, n, n_sets)))
    return lengths * hardness * noise[0] * (1 + effect), lengths * hardness * noise[1], lengths


def intervals(above, below, **options):
    """Intervals `[n_sets, 2]` of the ratio of the sums of each column."""
    samples = resampled_ratios(above, below, **options)
    return np.array([percentile_interval(samples[:, i], len(above)) for i in range(samples.shape[1])])


def share_with(limits, truth):
    return ((limits[:, 0] <= truth) & (truth <= limits[:, 1])).mean()


@pytest.mark.parametrize(("n", "lowest"), [(16, 0.88), (50, 0.90), (200, 0.915)])
@pytest.mark.parametrize("effect", [0.0, 0.2])
def test_intervals_of_a_paired_difference_hold_the_truth_nearly_as_often_as_they_say(n, lowest, effect):
    a, b, lengths = heavy_tailed(np.random.default_rng(n), n, effect=effect)
    limits = intervals(a - b, lengths, resamples=1000)
    assert lowest <= share_with(limits, effect) <= 0.98


def test_intervals_of_a_difference_of_logs_hold_the_truth_nearly_as_often_as_they_say():
    a, b, lengths = heavy_tailed(np.random.default_rng(9), 100, effect=1.0)
    ratios = resampled_ratios(np.hstack([a, b]), np.hstack([lengths, lengths]), resamples=1000)
    samples = np.log2(ratios[:, :N_SETS]) - np.log2(ratios[:, N_SETS:])
    limits = np.array([percentile_interval(samples[:, i], 100) for i in range(N_SETS)])
    assert 0.91 <= share_with(limits, 1.0) <= 0.98


def test_intervals_of_normal_data_hold_the_truth_in_95_percent():
    data = np.random.default_rng(0).normal(3.0, 1.0, (40, 2000))
    assert share_with(intervals(data, np.ones_like(data), resamples=2000), 3.0) == pytest.approx(0.95, abs=0.015)


def test_a_pair_has_shorter_intervals_than_two_arms_by_themselves():
    a, b, lengths = heavy_tailed(np.random.default_rng(1), n_sets=1)
    samples = resampled_ratios(np.hstack([a, b]), np.hstack([lengths, lengths]))
    paired, alone = samples[:, 0] - samples[:, 1], samples[:, 0] - np.random.default_rng(2).permutation(samples[:, 1])
    assert paired.std() < 0.8 * alone.std()


@pytest.mark.parametrize("n", [8, 16, 50])
def test_the_sign_flip_test_rejects_as_often_as_it_says_where_there_is_no_difference(n):
    n_sets, flips = 4000, 3999  # all sets share the flips, so both numbers limit how well the rate is known
    a, b, _ = heavy_tailed(np.random.default_rng(3), n, n_sets)
    p = sign_flip_p_values(a - b, flips=flips)
    for alpha in (0.05, 0.2):
        error = np.sqrt(alpha * (1 - alpha) * (1 / n_sets + 1 / flips))
        assert (p <= alpha).mean() == pytest.approx(alpha, abs=4 * error)


def test_holm_keeps_the_rate_of_any_false_rejection_over_metrics_that_depend_on_each_other():
    generator, n_metrics, n_families = np.random.default_rng(4), 20, 500
    shared = generator.standard_t(3, (60, n_families, 1))
    data = shared + generator.standard_t(3, (60, n_families, n_metrics))
    p = sign_flip_p_values(data.reshape(60, -1), flips=1999).reshape(n_families, n_metrics)
    any_rejected = np.mean([min(holm(family)) <= 0.05 for family in p.tolist()])
    assert any_rejected <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_families)
    assert (p.min(1) <= 0.05).mean() > 0.3  # which is what Holm is there for


@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_the_detectable_difference_is_found_with_the_power_that_it_names(alpha):
    n, n_sets, spread = 100, 1500, 2.0
    effect = detectable_difference(spread / np.sqrt(n), alpha)
    data = np.random.default_rng(5).normal(effect, spread, (n, n_sets))
    assert (sign_flip_p_values(data, flips=1999) <= alpha).mean() == pytest.approx(0.8, abs=0.04)


def test_the_sign_flip_test_agrees_with_every_choice_of_signs():
    data = np.array([3.0, 1.0, -0.5, 2.0, 2.5, 0.25, 1.5])
    signs = np.array([[1 if i >> j & 1 else -1 for j in range(7)] for i in range(2**7)])
    exact = (np.abs(signs @ data) >= abs(data.sum()) * (1 - 1e-9)).mean()
    assert sign_flip_p_values(data[:, None], flips=50_000)[0] == pytest.approx(exact, abs=0.002)


def test_draws_are_those_of_the_seed_and_the_same_for_every_column():
    a, b, lengths = heavy_tailed(np.random.default_rng(6), n_sets=2)
    one = resampled_ratios(a, lengths, resamples=300, seed=1)
    assert np.array_equal(one, resampled_ratios(a, lengths, resamples=300, seed=1))
    assert not np.array_equal(one, resampled_ratios(a, lengths, resamples=300, seed=2))
    both = resampled_ratios(np.hstack([b, a]), np.hstack([lengths, lengths]), resamples=300, seed=1)
    np.testing.assert_allclose(both[:, 2:], one, rtol=1e-12)
    assert np.array_equal(sign_flip_p_values(a - b, seed=3), sign_flip_p_values(a - b, seed=3))


def test_chunks_change_nothing_but_the_memory(monkeypatch):
    a, _, lengths = heavy_tailed(np.random.default_rng(7), n=30, n_sets=1)
    monkeypatch.setattr("fastsae.evaluate.statistics._CHUNK_ELEMENTS", 10**9)
    at_once = resampled_ratios(a, lengths, resamples=100)
    monkeypatch.setattr("fastsae.evaluate.statistics._CHUNK_ELEMENTS", 64)
    in_pairs = resampled_ratios(a, lengths, resamples=100)
    np.testing.assert_allclose(in_pairs, at_once, rtol=1e-12)


def test_ten_thousand_resamples_of_500_dialogues_take_no_seconds():
    a, b, lengths = heavy_tailed(np.random.default_rng(8), n=500, n_sets=1)
    start = time.process_time()
    percentile_interval(resampled_ratios(a - b, lengths)[:, 0], 500)
    sign_flip_p_values(a - b)
    assert time.process_time() - start < 2  # 0.2 s on an idle core


# Newcombe, Statistics in Medicine 17, 1998, p. 857-872, table I, method 3
@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_limits(count, total, low, high):
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


# Newcombe, Statistics in Medicine 17, 1998, p. 873-890, table II, method 10
@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((0, 10, 0, 10), -0.2775, 0.2775),
        ((10, 10, 0, 20), 0.6791, 1.0),
        ((10, 10, 0, 10), 0.6075, 1.0),
    ],
)
def test_newcombe_gives_the_published_limits(counts, low, high):
    assert newcombe(*counts) == pytest.approx((low, high), abs=5e-5)


def test_shares_of_nothing_have_no_interval():
    assert wilson(0, 0) is None
    assert newcombe(0, 0, 1, 2) is None


def test_holm_gives_the_published_p_values():
    # the example of Wright, Biometrics 48, 1992, as R's p.adjust computes it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_sample_sizes_of_shares_are_those_of_the_textbook_formula():
    assert sample_size_of_shares(0.10, 0.15) == 686
    assert sample_size_of_shares(27 / 128, 13 / 128) == 172
    with pytest.raises(ValueError, match="two different shares"):
        sample_size_of_shares(0.1, 0.1)


def test_two_shares_are_told_apart_as_the_pooled_z_test_does():
    assert two_shares_p_value(27, 128, 13, 128) == pytest.approx(0.01596, abs=1e-5)  # z = 2.4099
    assert two_shares_p_value(0, 10, 0, 20) == 1.0


@pytest.mark.parametrize("n", range(1, FEWEST_DIALOGUES))
def test_few_dialogues_have_no_interval_and_no_small_p_value(n):
    data = np.full((n, 1), 5.0)
    assert percentile_interval(resampled_ratios(data, np.ones_like(data))[:, 0], n) is None
    assert sign_flip_p_values(data)[0] > 0.05


def test_resamples_without_the_class_are_left_out_of_the_interval():
    above = np.zeros((50, 1))
    above[:8] = np.arange(1, 9)[:, None]
    samples = resampled_ratios(above, (above > 0).astype(float), resamples=20_000)
    assert np.isnan(samples).any()
    assert 1 <= percentile_interval(samples[:, 0], 8).low < 4.5 < percentile_interval(samples[:, 0], 8).high <= 8


def test_arms_that_are_the_same_do_not_differ():
    assert sign_flip_p_values(np.zeros((50, 1)))[0] == 1.0
    assert percentile_interval(np.zeros(100), 50) == (0.0, 0.0)


def test_a_verdict_needs_the_interval_and_holm_and_the_seeds():
    below, seeds, others = Interval(-2.0, -1.0), [1.0, 1.1], [2.5, 2.6]
    assert verdict(below, 0.01, seeds, others) == ("lower", "")
    assert verdict(Interval(1.0, 2.0), 0.01, others, seeds) == ("higher", "")
    assert verdict(Interval(-2.0, 0.0), 0.01, seeds, others) == ("no difference shown", "the interval holds 0")
    assert verdict(below, 0.06, seeds, others) == ("no difference shown", "Holm does not reject")
    assert verdict(below, float("nan"), seeds, others) == ("no difference shown", "Holm does not reject")
    assert verdict(below, 0.01, seeds, [1.05, 9.0]) == ("no difference shown", "the seeds overlap")
    assert verdict(None, None, seeds, others) == ("no difference shown", "too few dialogues")
