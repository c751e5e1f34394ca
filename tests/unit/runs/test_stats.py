"""Intervals and tests against scipy and published examples; sentences against what the numbers allow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from verl_aqn.config.schema import TargetConfig
from verl_aqn.errors import DataError
from verl_aqn.runs.stats.intervals import accuracy_text, ratio_interval, validation_text, wilson
from verl_aqn.runs.stats.verdict import compare_before_after, target_verdict

counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(count, confidence):
    successes, n = count
    exact = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((exact.low, exact.high), abs=1e-12)


@given(counts, st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_statsmodels(count, confidence):
    low, high = wilson(*count, confidence)
    assert proportion_confint(*count, alpha=1 - confidence, method="wilson") == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("n", [192, 1319])
def test_wilson_covers_the_true_share(n):
    """Exact, from the binomial distribution: coverage near 95 % for each fraction, and 95 % on average."""
    shares, successes = np.linspace(0.05, 0.95, 181), np.arange(n + 1)
    low, high = np.array([wilson(count, n) for count in successes]).T
    within = (low <= shares[:, None]) & (shares[:, None] <= high)
    covered = (stats.binom.pmf(successes, n, shares[:, None]) * within).sum(1)
    assert covered.min() >= 0.925
    assert covered.mean() == pytest.approx(0.95, abs=0.003)


def test_wilson_of_newcombes_examples():
    """Newcombe 1998, table I, method 3."""
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_gsm8k_interval_is_five_points_wide():
    low, high = wilson(956, 1319)
    assert (high - low) / 2 == pytest.approx(0.024, abs=0.001)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_accuracy_without_items(successes, n):
    with pytest.raises(DataError):
        wilson(successes, n)


def test_accuracy_text():
    assert accuracy_text(956, 1319) == "72.5 % (956 of 1319; 95 % interval 70.0–74.8 %)"
    assert accuracy_text(0, 20) == "0.0 % (0 of 20; 95 % interval 0.0–16.1 %)"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_before_and_after_interval_p_and_words_are_of_one_test(pairs):
    before, after = zip(*pairs, strict=True)
    result = compare_before_after(before, after)
    low, high = result.interval
    assert -1 <= low <= high <= 1
    assert result.after - result.before == pytest.approx((result.gained - result.lost) / len(pairs))
    assert (low > 0 or high < 0) == (result.p_value < 0.05) == ("more than chance" in result.text)


@pytest.mark.parametrize(("gained", "lost"), [(0.1, 0.1), (0.15, 0.05), (0.03, 0.01), (0.3, 0.05)])
def test_paired_interval_covers_the_true_difference(gained, lost):
    rng, truth = np.random.default_rng(0), gained - lost
    covered = 0
    for _ in range(1000):
        kind = rng.choice(3, 192, p=[gained, lost, 1 - gained - lost])
        low, high = compare_before_after(kind == 1, kind == 0).interval
        covered += low <= truth <= high
    assert 0.935 <= covered / 1000 <= 0.98


def test_ratio_interval():
    rng = np.random.default_rng(1)
    sums, counts = rng.normal(-3, 1, 200), np.full(200, 10.0)
    middle, low, high = ratio_interval(sums, counts)
    assert low < middle < high < 0
    # 1.96 standard errors of the mean, and tenths because each item weighs ten.
    assert high - low == pytest.approx(2 * 1.96 * sums.std() / np.sqrt(200) / 10, rel=0.05)
    assert ratio_interval(sums, counts) == (middle, low, high)
    assert ratio_interval(sums, counts, seed=1) != (middle, low, high)
    assert ratio_interval(np.zeros(9), np.ones(9)) == (0, 0, 0)


@pytest.mark.parametrize(("items", "least"), [(60, 0.91), (16, 0.86)])
def test_ratio_interval_covers_the_truth_as_often_as_it_says(items, least):
    """Skewed values that all tokens of an item share, and items of different length.

    With few items the coverage is lower.
    """
    rng, covered = np.random.default_rng(0), 0
    for seed in range(400):
        counts = rng.integers(5, 25, items).astype(float)
        low, high = ratio_interval(counts * rng.exponential(1.0, items), counts, resamples=500, seed=seed)[1:]
        covered += low <= 1.0 <= high
    assert least <= covered / 400 <= 0.98


def test_a_change_in_words():
    before = [True] * 90 + [True] * 4 + [False] * 16 + [False] * 10
    after = [True] * 90 + [False] * 4 + [True] * 16 + [False] * 10
    assert compare_before_after(before, after).text == (
        "78.3 % -> 88.3 % on the same 120 items: +10.0 points (95 % interval +3.0 to +17.8); 16 gained, 4 lost, "
        "McNemar p = 0.0073: more than chance."
    )
    few = compare_before_after([True, False] * 20, [True] * 3 + [False, True] * 18 + [False])
    assert "chance alone may explain it" in few.text
    several = compare_before_after([0.125, 0.5, 1.0], [0.25, 0.5, 1.0])
    assert (several.gained, several.lost) == (1, 0)
    assert "score test over items, p = " in several.text


def test_different_items_cannot_be_paired():
    with pytest.raises(DataError, match="2 items before and 1 after"):
        compare_before_after([True, False], [True])
    with pytest.raises(DataError):
        compare_before_after([], [])


@pytest.mark.parametrize(
    ("successes", "says"),
    [
        (957, ["is met", "contains 72.48 %", "does not show"]),
        (956, ["is not met", "contains 72.48 %"]),  # 72.479 %
        (1010, ["is met", "excludes 72.48 %"]),
        (850, ["is not met", "excludes 72.48 %"]),
    ],
)
def test_verdict_on_gsm8k(successes, says):
    text = target_verdict({"accuracy": successes / 1319, "items": 1319}, TargetConfig(0.7248), comparable=True)
    assert all(part in text for part in says), text


def test_the_verdict_on_several_responses_has_the_figures_of_the_step_s_line():
    """The share of right responses is no count of problems: 14.6 of 32 problems are not 15."""
    record = {"accuracy": 117 / 256, "items": 32, "samples": 8, "pass_at": {"1": 117 / 256, "8": 0.75}}
    line = "avg@8 45.7 % (32 problems × 8 responses; 95 % interval at most 29.8–62.5 %), pass@8 75.0 %"
    assert validation_text(record) == line
    assert target_verdict(record, TargetConfig(0.45), comparable=True) == (
        f"{line}: the recipe's target (above 45.00 %) is met by avg@8, but the interval contains 45.00 %: this run "
        "alone does not show a difference from it."
    )
    assert "(above 46.00 %) is not met by avg@8" in target_verdict(record, TargetConfig(0.46), comparable=True)
    assert target_verdict(record, TargetConfig(0.2), comparable=True).endswith("and the interval excludes 20.00 %.")
    assert target_verdict(record, TargetConfig(None), comparable=False) == f"{line}."


def test_verdict_on_another_task_judges_nothing():
    text = target_verdict({"accuracy": 0.9, "items": 200}, TargetConfig(0.7248, "Qwen"), comparable=False)
    assert "not comparable" in text
    assert "is met" not in text
