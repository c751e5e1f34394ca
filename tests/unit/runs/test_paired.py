"""One test for p-value and interval of paired answers: against its definition, published tables and exact rates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats import contingency_tables

from verl_aqn.runs.stats.paired import Changes, Strictest, of_items

BOUND = stats.norm.isf(0.025)


def by_definition(gained, lost, n, difference):
    """Compute the score statistic; search for the most likely fraction of lost items under `difference`."""

    def unlikely(q):
        cells = ((gained, q + difference), (lost, q), (n - gained - lost, 1 - 2 * q - difference))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    ends = (max(0.0, -difference), (1 - difference) / 2)
    q = optimize.minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize("table", [(7, 1, 21), (16, 4, 120), (3, 9, 50), (40, 40, 100)])
@pytest.mark.parametrize("difference", [-0.3, -0.05, 0.0, 0.1, 0.4])
def test_the_statistic_is_the_score_test_by_its_definition(table, difference):
    assert Changes(*table).statistic(difference) == pytest.approx(by_definition(*table, difference), rel=1e-4)


def test_the_interval_of_a_published_table():
    """Airway hyper-responsiveness, table 1 of Fagerland et al. 2014: Tango's interval is 0.026 to 0.517."""
    assert Changes(7, 1, 21).interval() == pytest.approx((0.026, 0.517), abs=5e-4)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400))
def test_p_is_mcnemars_without_correction(gained, lost, equal):
    changed = [[equal, gained], [lost, 1]]
    theirs = contingency_tables.mcnemar(changed, exact=False, correction=False).pvalue if gained + lost else 1.0
    assert Changes(gained, lost, equal + gained + lost + 1).p_value == pytest.approx(theirs, rel=1e-9)


@given(
    st.integers(0, 80), st.integers(0, 80), st.integers(0, 400), st.floats(1e-4, 0.5), st.floats(0.3, 1.0),
)  # fmt: skip
def test_interval_and_p_agree_at_every_level(gained, lost, equal, level, part):
    """This holds for fractional counts and for the strictest of two tests, too."""
    found = Changes(part * gained, part * lost, gained + lost + equal + 1)
    both = Strictest((found, Changes(gained, lost, gained + lost + equal + 1)))
    for one in (found, both):
        low, high = one.interval(level)
        assert -1 <= low <= one.value + 1e-9
        assert one.value - 1e-9 <= high <= 1
        if abs(one.p_value / level - 1) > 1e-6:
            assert (low > 0 or high < 0) == (one.p_value < level)


def test_the_line_that_contradicted_itself_does_not_any_more():
    """The line was +31.2 points, interval +4.4 to +51.2, p = 0.062: 16 items, five gained, none lost."""
    found = Changes(5, 0, 16)
    assert found.value == 0.3125
    assert (found.interval()[0] > 0) == (found.p_value < 0.05)


def statistics(gained, lost, n, difference):
    """Return `Changes.statistic` of arrays."""
    b = (2 * n - gained + lost) * difference - gained - lost
    root = np.sqrt(np.maximum(b * b + 8 * n * lost * difference * (1 - difference), 0))
    spread = n * ((root - b) / (2 * n) + difference * (1 - difference))
    above = gained - lost - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 1e-12, above / np.sqrt(spread), np.where(abs(above) < 1e-9, 0, np.inf))


def rejected(n, gain, loss):
    """Return how often the true difference is rejected at 5 %, over all possible tables: no simulation."""
    changed = gain + loss
    ends = [int(stats.binom.ppf(tail, n, changed)) for tail in (1e-9, 1 - 1e-9)]
    rate = 0.0
    for count in range(ends[0], ends[1] + 1):
        gained = np.arange(count + 1)
        weight = stats.binom.pmf(count, n, changed) * stats.binom.pmf(gained, count, gain / changed)
        rate += weight[abs(statistics(gained, count - gained, n, gain - loss)) > BOUND].sum()
    return rate


def test_the_rates_are_of_the_statistic_that_is_used():
    for table in [(7, 1, 21), (0, 4, 50), (3, 3, 10)]:
        for difference in (-0.2, 0.0, 0.3):
            expected = Changes(*table).statistic(difference)
            assert statistics(*map(np.array, table[:2]), table[2], difference) == pytest.approx(expected)


@pytest.mark.parametrize("n", [50, 100, 192, 384, 1319])
def test_false_positives_and_coverage_are_exact(n):
    sizes = [rejected(n, changed / 2, changed / 2) for changed in (0.02, 0.04, 0.06, 0.1, 0.2, 0.3, 0.5)]
    assert min(sizes) >= 0.002
    assert max(sizes) <= 0.0545
    missed = [
        rejected(n, loss + difference, loss)
        for difference in (0.01, 0.02, 0.05, 0.1, 0.2)
        for loss in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    ]
    assert max(missed) <= 0.067


@pytest.mark.parametrize("n", [8, 12, 16, 24, 32, 40])
def test_of_few_items_the_test_errs_little_more_often(n):
    assert max(rejected(n, changed / 2, changed / 2) for changed in np.arange(0.02, 1, 0.04)) <= 0.067


def test_right_and_wrong_answers_are_counted():
    differences = np.array([1, 0, -1, 1, 0, 0, 1.0])
    assert of_items(differences) == (3, 1, 7)
    assert of_items(np.zeros(5)) == (0, 0, 5)


def test_scores_between_keep_mean_and_variance():
    differences = np.random.default_rng(0).choice([-0.5, -0.25, 0, 0, 0.25, 0.5, 1], 200)
    found = of_items(differences)
    assert found.value == pytest.approx(differences.mean())
    under_null = (found.gained + found.lost) / found.items**2
    assert under_null == pytest.approx((differences**2).sum() / 200**2)
    assert found.items > 200


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_of_several_answers_the_interval_is_clustered_by_problem(effect):
    """Eight responses to each of 200 problems: counted as 1600 problems, the interval would cover too little."""
    rng = np.random.default_rng(1)

    def drawn(problems):
        chance = rng.beta(0.5, 0.5, problems)
        return chance, np.clip(chance + effect + rng.normal(0, 0.15, problems), 0, 1)

    chance, other = drawn(500_000)
    truth = float((other - chance).mean())
    covered = naive = 0
    for _ in range(400):
        control, treated = (rng.binomial(8, share) / 8 for share in drawn(200))
        low, high = of_items(treated - control).interval()
        covered += low <= truth <= high
        half = BOUND * math.sqrt((treated * (1 - treated) + control * (1 - control)).mean() / 1600)
        naive += abs(treated.mean() - control.mean() - truth) <= half
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.9
