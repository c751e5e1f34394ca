"""Statistics of `verl-aqn compare` against scipy and on simulated runs, and the verdicts on them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from verl_aqn.runs.arms import Arm, Run
from verl_aqn.runs.compare import compare, table
from verl_aqn.runs.crossed import bootstrap, detectable, detectable_by_pairs, holm, seeds_needed, spread
from verl_aqn.runs.stats import mcnemar, wilson

# ---------------------------------------------------------------- statistics


def simulate(seeds, items, seed_sd, rng, effect=0.0):
    """(treated, control), [seeds, items]: logits of items, of items in an arm, of seeds, and chance."""
    shared = rng.normal(0.8, 1.5, items)
    return tuple(
        rng.random((count, items))
        < 1 / (1 + np.exp(-(shared + shift + rng.normal(0, 0.5, items) + rng.normal(0, seed_sd, (count, 1)))))
        for count, shift in zip(seeds, (effect, 0.0), strict=True)
    )


def test_with_endless_items_it_is_welchs_test():
    rng = np.random.default_rng(0)
    for seeds in [(2, 2), (3, 5), (6, 2)]:
        means = [rng.normal(0.7, 0.02 * (1 + arm), count) for arm, count in enumerate(seeds)]
        found = spread(*(np.repeat(mean[:, None], 50, axis=1) for mean in means))
        welch = stats.ttest_ind(*means, equal_var=False)
        assert found.p_value == pytest.approx(welch.pvalue, rel=1e-6)
        assert found.interval() == pytest.approx(tuple(welch.confidence_interval()), rel=1e-6)


def test_with_seeds_that_agree_it_is_the_paired_t_test_of_items():
    rng = np.random.default_rng(1)
    treated, control = rng.random(80) < 0.8, rng.random(80) < 0.6
    found = spread(np.tile(treated, (3, 1)), np.tile(control, (2, 1)))
    paired = stats.ttest_rel(treated.astype(float), control.astype(float))
    assert found.p_value == pytest.approx(paired.pvalue, rel=1e-6)
    assert found.interval() == pytest.approx(tuple(paired.confidence_interval()), rel=1e-6)


def test_one_arm_whose_seeds_agree_has_the_t_interval_of_its_items():
    answers = np.random.default_rng(2).random(150) < 0.7
    expected = stats.ttest_1samp(answers.astype(float), 0).confidence_interval()
    assert spread(np.tile(answers, (4, 1))).interval() == pytest.approx(tuple(expected), rel=1e-6)


def test_nothing_differs_and_everything_does():
    right = np.ones((2, 10), dtype=bool)
    assert spread(right, right).p_value == 1
    assert spread(right, ~right).p_value == 0


def test_of_pairs_with_endless_items_it_is_the_paired_t_test():
    rng = np.random.default_rng(15)
    treated, control = rng.normal(0.7, 0.02, (2, 6, 1)).repeat(50, axis=2)
    found = spread(treated - control)
    paired = stats.ttest_rel(treated[:, 0], control[:, 0])
    assert found.p_value == pytest.approx(paired.pvalue, rel=1e-6)
    assert found.interval() == pytest.approx(tuple(paired.confidence_interval()), rel=1e-6)


def simulate_pairs(seeds, items, seed_sd, common_sd, rng):
    """As `simulate`, of no effect, where a seed moves both arms by `common_sd` and each by `seed_sd` of its own."""
    problems, common = rng.normal(0.8, 1.5, items), rng.normal(0, common_sd, (seeds, 1))
    return tuple(
        rng.random((seeds, items))
        < 1 / (1 + np.exp(-(problems + common + rng.normal(0, 0.5, items) + rng.normal(0, seed_sd, (seeds, 1)))))
        for _ in range(2)
    )


@pytest.mark.parametrize(("seed_sd", "common_sd"), [(0.0, 0.0), (0.3, 0.0), (0.15, 0.5)])
def test_pairs_of_seeds_keep_five_percent_and_find_more_where_seeds_have_much_in_common(seed_sd, common_sd):
    rng = np.random.default_rng(16)
    drawn = [simulate_pairs(5, 384, seed_sd, common_sd, rng) for _ in range(1000)]
    pairs = [spread(treated.astype(float) - control) for treated, control in drawn]
    assert 0.002 <= np.mean([found.p_value < 0.05 for found in pairs]) <= 0.07
    apart = [spread(*tables) for tables in drawn]
    narrower = np.median(
        [detectable(p.error, p.freedom) / detectable(a.error, a.freedom) for p, a in zip(pairs, apart, strict=True)]
    )
    assert narrower < 0.6 if common_sd else 0.9 < narrower < 1.3


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "low", "high"),
    # Careful where seeds hardly differ (no test knows that from a few), near 5 % where they do.
    [((2, 2), 0.3, 0.02, 0.08), ((3, 3), 0.0, 0.002, 0.06), ((3, 3), 0.3, 0.025, 0.08), ((5, 5), 0.3, 0.025, 0.08)],
)
def test_false_positives_are_near_five_percent(seeds, seed_sd, low, high):
    rng = np.random.default_rng(3)
    rate = np.mean([spread(*simulate(seeds, 192, seed_sd, rng)).p_value < 0.05 for _ in range(1000)])
    assert low <= rate <= high


def test_a_test_of_items_alone_would_take_seeds_for_the_method():
    rng = np.random.default_rng(4)
    pairs = (simulate((3, 3), 192, 0.3, rng) for _ in range(300))
    rate = np.mean([stats.ttest_rel(t.mean(0), c.mean(0)).pvalue < 0.05 for t, c in pairs])
    assert rate > 0.2


def test_mcnemar_of_one_seed_each_keeps_five_percent():
    """Of two runs of one policy on the same items: the null that it tests. An exact test stays below its level."""
    rng = np.random.default_rng(5)
    ps = 1 / (1 + np.exp(-rng.normal(0.8, 1.5, 192)))
    rate = np.mean([mcnemar(rng.random(192) < ps, rng.random(192) < ps).p_value < 0.05 for _ in range(1000)])
    assert 0.01 <= rate <= 0.06


@pytest.mark.parametrize(("seeds", "seed_sd"), [((2, 2), 0.3), ((3, 3), 0.1), ((5, 5), 0.3)])
def test_intervals_cover_the_true_difference(seeds, seed_sd):
    rng, effect = np.random.default_rng(6), 0.6
    # The true difference: over all items and seeds there could be.
    logits = np.random.default_rng(8).normal(0.8, math.sqrt(1.5**2 + 0.5**2 + seed_sd**2), 1_000_000)
    truth = np.mean(1 / (1 + np.exp(-logits - effect)) - 1 / (1 + np.exp(-logits)))
    intervals = [spread(*simulate(seeds, 192, seed_sd, rng, effect)).interval() for _ in range(800)]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.995


def test_the_bootstrap_of_one_seed_each_is_scipys():
    treated, control = simulate((1, 1), 300, 0.0, np.random.default_rng(9), effect=0.5)
    data = (treated[0].astype(float), control[0].astype(float))
    theirs = stats.bootstrap(
        data, lambda t, c, axis: t.mean(axis) - c.mean(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(10),
    ).confidence_interval  # fmt: skip
    assert bootstrap(treated, control) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert bootstrap(treated, control) == bootstrap(treated, control)


def test_the_bootstrap_covers_with_many_seeds_and_not_with_two_where_the_interval_that_decides_does():
    rng = np.random.default_rng(11)
    # Seeds so far apart that items hardly count; with seeds that agree it covers nearly always.
    many = [low <= 0 <= high for low, high in (bootstrap(*simulate((8, 8), 96, 1.0, rng)) for _ in range(150))]
    assert 0.87 <= np.mean(many) <= 0.99
    pairs = [simulate((2, 2), 96, 1.0, rng) for _ in range(80)]
    by_draws, by_t = (
        np.mean([low <= 0 <= high for low, high in intervals])
        for intervals in ((bootstrap(*pair) for pair in pairs), (spread(*pair).interval() for pair in pairs))
    )
    assert by_draws < 0.87 <= by_t


def test_holm_is_closed_testing_and_rs_p_adjust():
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])  # p.adjust(…, "holm") of R
    assert holm([0.3]) == [0.3]
    assert holm([]) == []
    ps = list(np.random.default_rng(12).random(4) ** 3)
    for index, found in enumerate(holm(ps)):
        others = [other for other in range(4) if other != index]
        families = [(index, *rest) for size in range(4) for rest in itertools.combinations(others, size)]
        assert found == pytest.approx(max(min(1, len(f) * min(ps[member] for member in f)) for f in families))


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_holm_is_statsmodels(size):
    ps = list(np.random.default_rng(size).random(size).round(1) ** 3)  # with ties
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1], abs=1e-12)


def test_the_detectable_difference_is_found_in_80_percent():
    for level, freedom in itertools.product((0.05, 0.05 / 3, 0.05 / 5), (4, 8, 30, 500)):
        shift = detectable(1.0, freedom, level)
        assert stats.nct.sf(stats.t.isf(level / 2, freedom), freedom, shift) == pytest.approx(0.8, abs=0.051)


def test_one_of_three_tests_finds_it_in_80_percent_at_the_level_of_holms_first_step():
    values = np.random.default_rng(18).standard_t(1000, (3000, 3))
    for level, low, high in ((0.05 / 3, 0.78, 0.83), (0.05, 0.6, 0.72)):
        shifted = values + np.array([detectable(1.0, 1000, level), 0.0, 0.0])
        found = [holm(ps)[0] < 0.05 for ps in 2 * stats.t.sf(abs(shifted), 1000)]
        assert low < np.mean(found) < high


def test_the_detectable_difference_of_pairs_is_connors():
    """p10 = 0.45, p01 = 0.05 take 22.3 pairs (Connor 1987, his formula), and that many find a difference of 0.4."""
    for level, least in ((0.05, 23), (0.05 / 3, 30)):
        by_level, by_power = stats.norm.isf(level / 2) * math.sqrt(0.5), stats.norm.isf(0.2) * math.sqrt(0.5 - 0.4**2)
        pairs = ((by_level + by_power) / 0.4) ** 2
        assert math.ceil(pairs) == least
        changed = 0.5 * (pairs + 2) - 1  # less the half items that are added
        assert detectable_by_pairs(changed - 1, 1, pairs, level) == pytest.approx(0.4)


def test_seeds_needed_is_the_least_number_that_does():
    per_seed, items = [0.03**2, 0.03**2], 1319
    needed = seeds_needed(1e-5, per_seed, items, 0.05)
    reach = [detectable(math.sqrt(1e-5 + sum(per_seed) / n), 2 * (n - 1)) for n in (needed - 1, needed + 1)]
    assert reach[0] > 0.05 > reach[1]
    assert seeds_needed(0.03**2, per_seed, items, 0.05) is None  # items alone blur more than 5 points
    assert seeds_needed(0.0, [0.0, 0.0], items, 0.05) == 2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(4, 60),
    st.lists(st.sampled_from([0.0, 0.05, 0.3]), min_size=2, max_size=2), st.booleans(),
)  # fmt: skip
def test_so_many_seeds_are_needed_as_find_the_difference(seed, seeds, items, seed_sds, paired):
    """Whatever arms scatter, alike or not: the seeds that were run are enough for what they detect, and for no less."""
    rng = np.random.default_rng(seed)
    shares = rng.random(items)
    treated, control = (rng.random((seeds, items)) < shares + rng.normal(0, sd, (seeds, 1)) for sd in seed_sds)
    found = spread(treated.astype(float) - control) if paired else spread(treated, control)
    assume(found.error > 0)
    reach = detectable(found.error, found.freedom)
    enough, more = (
        seeds_needed(found.shared, found.per_seed, items, difference, found.residual)
        for difference in (reach, 0.999 * reach)
    )
    assert enough <= seeds < (more or math.inf)


# ---------------------------------------------------------------- verdicts


def _arms(control, *treated):
    made = []
    for place, right in enumerate((control, *treated)):
        settings = {"aqn.noise.enabled": bool(place), "aqn.noise.sigma_start": 0.01 * place}
        runs = tuple(Run(f"runs/{place}-{seed}", f"arm{place}", seed, settings, {}) for seed in range(len(right)))
        made.append(Arm(f"arm{place}", runs, np.asarray(right)))
    return made


def _verdict(seeds, items, seed_sd, effect, seed=0):
    treated, control = simulate((seeds, seeds), items, seed_sd, np.random.default_rng(seed), effect)
    return compare(_arms(control, treated)).arms[0]


def test_the_four_verdicts():
    helps, hurts = _verdict(4, 1319, 0.05, 1.0), _verdict(4, 1319, 0.05, -1.0)
    assert (helps.verdict, hurts.verdict) == ("helps", "hurts")
    assert helps.difference > 0 > hurts.difference
    same = _verdict(8, 1319, 0.05, 0.0)
    assert same.verdict == "no significant difference"
    assert same.detectable <= 0.05
    assert "smaller ones may be there" in same.text
    few = _verdict(2, 60, 0.3, 0.0)
    assert few.verdict == "not enough data"
    assert few.detectable > 0.05


def test_not_enough_data_says_how_many_seeds_would_be():
    found = _verdict(2, 1319, 0.3, 0.0, seed=1)
    assert found.verdict == "not enough data"
    assert found.seeds_needed > 2
    assert f"to find 5 points takes {found.seeds_needed} seeds an arm" in found.text


def test_seeds_that_are_there_and_not_enough_are_not_named_as_enough():
    # The first k of 1000 items are right. One arm scatters and the other does not: of four seeds each, three degrees
    # of freedom, not six.
    right = np.arange(1000) < np.array([669, 690, 710, 731])[:, None]
    found = compare(_arms(np.tile(right[1], (4, 1)), right)).arms[0]
    assert (found.verdict, found.seeds_needed) == ("not enough data", 5)
    # All seeds agree: of items there are too few, and more seeds would add nothing.
    right = np.arange(40) < np.full((4, 1), 30)
    found = compare(_arms(right, right)).arms[0]
    assert (found.verdict, found.seeds_needed) == ("not enough data", None)
    assert "to find 5 points takes more items" in found.text


def test_equal_seeds_are_paired_from_five_on_whatever_their_order():
    rng = np.random.default_rng(17)
    treated, control = simulate_pairs(5, 384, 0.1, 0.8, rng)
    arms = _arms(control, treated)
    found = compare(arms).arms[0]
    pairs = spread(treated.astype(float) - control)
    assert (found.test, found.p_value) == ("pairs of seeds crossed with items", pairs.p_value)
    assert found.interval == pairs.interval()
    turned = Arm(arms[1].name, arms[1].runs[::-1], arms[1].right[::-1])
    assert compare([arms[0], turned]).arms[0].interval == pytest.approx(found.interval)
    four = [Arm(arm.name, arm.runs[:4], arm.right[:4]) for arm in arms]
    other = Arm(arms[1].name, arms[1].runs[1:], arms[1].right[1:])
    for unlike in (four, [arms[0], other]):
        assert compare(unlike).arms[0].test == "seeds crossed with items"


def test_one_seed_is_never_a_verdict_on_the_method():
    found = _verdict(1, 1319, 0.0, 1.0)
    assert found.p_value < 1e-6
    assert found.verdict == "not enough data"
    assert "These two runs differ beyond chance" in found.text
    assert f"takes at least {found.seeds_needed} seeds an arm" in found.text


def test_one_seed_against_several_is_not_tested():
    treated, control = simulate((1, 3), 192, 0.1, np.random.default_rng(13))
    found = compare(_arms(control, treated)).arms[0]
    assert (found.p_value, found.corrected, found.test, found.verdict) == (None, None, "none", "not enough data")
    assert "One of the arms has one seed" in found.text


def test_several_arms_are_corrected():
    rng = np.random.default_rng(14)
    control = rng.random((3, 300)) < 0.6
    report = compare(_arms(control, *(rng.random((3, 300)) < share for share in (0.6, 0.7, 0.75))))
    ps = [one.p_value for one in report.arms]
    assert [one.corrected for one in report.arms] == holm(ps)
    assert "after Holm's correction for 3 tests" in report.arms[0].text
    assert table(report).title.endswith("; p and found in 80 % corrected for 3 tests")


def test_what_several_tests_would_find_is_corrected_as_their_p_is():
    # The first k of 1000 items are right.
    right = np.arange(1000) < np.array([678, 693, 707, 722])[:, None]
    found = spread(right, right)
    alone, of_three = (compare(_arms(right, *[right] * tests)) for tests in (1, 3))
    assert alone.arms[0].detectable == detectable(found.error, found.freedom) < 0.05
    assert (alone.arms[0].verdict, alone.correction) == ("no significant difference", "")
    for arm in of_three.arms:
        assert arm.detectable == detectable(found.error, found.freedom, 0.05 / 3) > 0.05
        assert (arm.verdict, arm.seeds_needed) == ("not enough data", 5)
        assert "points are found in 80 % of cases with that correction; to find 5 points takes 5 seeds" in arm.text
        assert arm.interval == alone.arms[0].interval
    # One seed each, and of one arm several, which cannot be tested.
    rng = np.random.default_rng(19)
    control, *treated = rng.random((4, 1, 500)) < 0.6
    report = compare(_arms(control, treated[0], treated[1], np.tile(treated[2], (2, 1))))
    gained, lost = ((control < treated[0]).sum(), (control > treated[0]).sum())
    assert report.arms[0].detectable == detectable_by_pairs(gained, lost, 500, 0.05 / 2)
    assert "To find a difference of 5 points with that correction takes at least" in report.arms[0].text
    assert "To find a difference of 5 points takes at least" in report.arms[2].text


def test_a_handful_of_items_is_too_few_and_no_crash():
    for seeds, items in itertools.product((1, 2), (1, 2, 3, 5)):
        control = np.arange(seeds * items).reshape(seeds, items) % 2 == 0
        assert compare(_arms(control, ~control)).arms[0].verdict == "not enough data"
    wide = compare(_arms([[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 1, 0], [1, 1, 1, 1]])).arms[0]
    assert "Not even a difference of 100 points is sure to be found" in wide.text


def test_where_nothing_varies_the_number_of_items_decides():
    for items, verdict in ((4, "not enough data"), (12, "helps")):
        wrong = np.zeros((2, items), dtype=bool)
        report = compare(_arms(wrong, ~wrong, wrong))
        found, equal = report.arms
        assert (found.test, found.p_value, found.verdict) == ("exact McNemar", 0.5 ** (items - 1), verdict)
        assert found.interval[0] < 1
        assert equal.p_value == 1
        assert report.control.interval == wilson(0, items)
