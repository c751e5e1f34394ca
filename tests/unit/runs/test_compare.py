"""Statistics of `verl-aqn compare` against scipy and on simulated runs, and the resulting verdicts."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from verl_aqn.runs.stats.arms import Arm, Run
from verl_aqn.runs.stats.compare import compare, decide, table
from verl_aqn.runs.stats.crossed import seeds_needed, spread
from verl_aqn.runs.stats.intervals import wilson
from verl_aqn.runs.stats.paired import of_items
from verl_aqn.runs.stats.scores import Answers

SAME = "equivalent within ±5 points"

# ---------------------------------------------------------------- statistics


def simulate(seeds, items, seed_sd, rng, effect=0.0):
    """Return (treated, control), [seeds, items]: logits of items, of items in an arm, and of seeds, then sampling."""
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
    """Simulate no effect: a seed shifts both arms by `common_sd`, and each arm separately by `seed_sd`."""
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
    narrower = np.median([np.ptp(p.interval()) / np.ptp(a.interval()) for p, a in zip(pairs, apart, strict=True)])
    assert narrower < 0.6 if common_sd else 0.9 < narrower < 1.3


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "low", "high"),
    # Conservative if seeds hardly differ (few seeds cannot show that), near 5 % if they differ.
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
    """Two runs of one policy on the same items are the null hypothesis of this test."""
    rng = np.random.default_rng(5)
    ps = 1 / (1 + np.exp(-rng.normal(0.8, 1.5, 192)))
    runs = (1.0 * (rng.random((2, 192)) < ps) for _ in range(1000))
    rate = np.mean([of_items(after - before).p_value < 0.05 for before, after in runs])
    assert 0.03 <= rate <= 0.07


@pytest.mark.parametrize(("seeds", "seed_sd"), [((2, 2), 0.3), ((3, 3), 0.1), ((5, 5), 0.3)])
def test_intervals_cover_the_true_difference(seeds, seed_sd):
    rng, effect = np.random.default_rng(6), 0.6
    # The true difference, over all possible items and seeds.
    logits = np.random.default_rng(8).normal(0.8, math.sqrt(1.5**2 + 0.5**2 + seed_sd**2), 1_000_000)
    truth = np.mean(1 / (1 + np.exp(-logits - effect)) - 1 / (1 + np.exp(-logits)))
    intervals = [spread(*simulate(seeds, 192, seed_sd, rng, effect)).interval() for _ in range(800)]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.995


def test_seeds_needed_is_the_least_number_that_does():
    per_seed, items = [0.03**2, 0.03**2], 1319
    needed = seeds_needed(1e-5, per_seed, items, 0.05)
    halves = [stats.t.isf(0.025, 2 * (n - 1)) * math.sqrt(1e-5 + sum(per_seed) / n) for n in (needed - 1, needed + 1)]
    assert halves[0] > 0.05 > halves[1]
    assert (
        seeds_needed(0.03**2, per_seed, items, 0.05) is None
    )  # the items alone cause more than 5 points of uncertainty
    assert seeds_needed(0.0, [0.0, 0.0], items, 0.05) == 2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(4, 60),
    st.lists(st.sampled_from([0.0, 0.05, 0.3]), min_size=2, max_size=2), st.booleans(),
)  # fmt: skip
def test_so_many_seeds_are_needed_as_make_the_interval_so_narrow(seed, seeds, items, seed_sds, paired):
    """For any variance, the reported seeds suffice for the run's own interval, and for no narrower one."""
    rng = np.random.default_rng(seed)
    shares = rng.random(items)
    treated, control = (rng.random((seeds, items)) < shares + rng.normal(0, sd, (seeds, 1)) for sd in seed_sds)
    found = spread(treated.astype(float) - control) if paired else spread(treated, control)
    assume(found.error > 0)
    reach = float(np.ptp(found.interval())) / 2 * (1 + 1e-9)
    enough, more = (
        seeds_needed(found.shared, found.per_seed, items, difference, found.residual)
        for difference in (reach, 0.999 * reach)
    )
    assert enough <= seeds < (more or math.inf)


# ---------------------------------------------------------------- verdicts


def _arms(control, *treated, samples=1):
    made = []
    for place, scores in enumerate((control, *treated)):
        settings = {"aqn.noise.enabled": bool(place), "aqn.noise.sigma_start": 0.01 * place}
        runs = tuple(
            Run(f"runs/{place}-{seed}", f"arm{place}", seed, settings, Answers({}, samples))
            for seed in range(len(scores))
        )
        made.append(Arm(f"arm{place}", runs, np.asarray(scores, dtype=float)))
    return made


def _verdict(seeds, items, seed_sd, effect, seed=0):
    treated, control = simulate((seeds, seeds), items, seed_sd, np.random.default_rng(seed), effect)
    return compare(_arms(control, treated)).arms[0]


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.001, 0.3), "helps"),
        ((-0.3, -0.001), "hurts"),
        ((0.001, 0.02), "helps"),  # below 5 points, but significant
        ((-0.05, 0.05), SAME),
        ((-0.01, 0.0501), "not enough data"),
        ((-0.0501, 0.01), "not enough data"),
        ((-0.01, 0.076), "not enough data"),  # what once was "no significant difference"
        ((0.0, 0.04), SAME),
    ],
)
def test_the_interval_alone_decides(interval, verdict):
    assert decide(interval) == verdict


def test_the_four_verdicts():
    helps, hurts = _verdict(4, 1319, 0.05, 1.0), _verdict(4, 1319, 0.05, -1.0)
    assert (helps.verdict, hurts.verdict) == ("helps", "hurts")
    assert helps.difference > 0 > hurts.difference
    same = _verdict(8, 1319, 0.05, 0.0)
    assert same.verdict == SAME
    assert max(map(abs, same.simultaneous)) <= 0.05
    few = _verdict(2, 60, 0.3, 0.0)
    assert few.verdict == "not enough data"
    assert max(map(abs, few.simultaneous)) > 0.05


def test_not_enough_data_says_how_many_seeds_would_be():
    found = _verdict(2, 1319, 0.3, 0.0, seed=1)
    assert found.verdict == "not enough data"
    assert found.seeds_for_verdict > 2
    assert f"{found.seeds_for_verdict} seeds an arm would narrow it to ±2.5 points, which gives a verdict" in found.text


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from([2, 20, 200, 1319]), st.sampled_from([0.0, 0.1, 0.4]),
    st.floats(-1, 1), st.sampled_from([1, 5]),
)  # fmt: skip
def test_interval_p_verdict_and_seeds_never_contradict_each_other(seed, seeds, items, sd, effect, contrasts):
    treated, control = simulate((seeds, seeds), items, sd, np.random.default_rng(seed), effect)
    found = compare(_arms(control, *[treated] * contrasts)).arms[0]
    low, high = found.simultaneous
    assert (low > 0 or high < 0) == (found.corrected < 0.05)
    assert (found.interval[0] > 0 or found.interval[1] < 0) == (found.p_value < 0.05)
    assert low <= found.interval[0] <= found.difference + 1e-9
    assert found.difference - 1e-9 <= found.interval[1] <= high
    if found.verdict == "not enough data" and seeds > 1:
        assert found.seeds_for_verdict is None or found.seeds_for_verdict > seeds
    elif seeds > 1:
        assert (found.verdict in ("helps", "hurts")) == (found.corrected < 0.05)
        assert found.verdict != SAME or max(-low, high) <= 0.05


def test_seeds_that_are_there_and_not_enough_are_not_named_as_enough():
    # All seeds agree: there are too few items, and more seeds would not help.
    right = np.arange(40) < np.full((4, 1), 30)
    found = compare(_arms(right, right)).arms[0]
    assert (found.verdict, found.seeds_for_verdict) == ("not enough data", None)
    assert "a verdict needs more items, whatever the number of seeds" in found.text


def test_few_changed_items_on_which_all_seeds_agree_are_not_called_equivalent():
    """Two of 100 items gained.

    The t-distribution gives at most 4.8 points, but a true gain of 5 % would look like this in one of eight cases.
    """
    control = np.zeros((3, 100))
    treated = np.tile(np.arange(100) < 2, (3, 1))
    assert max(spread(treated, control).interval()) < 0.05
    assert compare(_arms(control, treated)).arms[0].verdict == "not enough data"


def test_equal_seeds_are_paired_from_five_on_whatever_their_order():
    rng = np.random.default_rng(17)
    treated, control = simulate_pairs(5, 384, 0.1, 0.8, rng)
    arms = _arms(control, treated)
    found = compare(arms).arms[0]
    pairs = spread(treated.astype(float) - control)
    assert (found.test, found.p_value) == ("pairs of seeds crossed with items", pairs.p_value)
    assert found.interval == pairs.interval()
    turned = Arm(arms[1].name, arms[1].runs[::-1], arms[1].scores[::-1])
    assert compare([arms[0], turned]).arms[0].interval == pytest.approx(found.interval)
    four = [Arm(arm.name, arm.runs[:4], arm.scores[:4]) for arm in arms]
    other = Arm(arms[1].name, arms[1].runs[1:], arms[1].scores[1:])
    for unlike in (four, [arms[0], other]):
        assert compare(unlike).arms[0].test == "seeds crossed with items"


def test_one_seed_is_never_a_verdict_on_the_method():
    found = _verdict(1, 1319, 0.0, 1.0)
    assert found.p_value < 1e-6
    assert (found.verdict, found.test) == ("not enough data", "McNemar")
    assert "These two runs differ beyond chance" in found.text
    assert f"A verdict needs at least {found.seeds_for_verdict} seeds an arm" in found.text


def test_one_seed_against_several_is_not_tested():
    treated, control = simulate((1, 3), 192, 0.1, np.random.default_rng(13))
    found = compare(_arms(control, treated)).arms[0]
    assert (found.p_value, found.corrected, found.test, found.verdict) == (None, None, "none", "not enough data")
    assert "One of the arms has only one seed" in found.text
    assert found.interval == of_items(treated[0] - control.mean(0)).interval()


def test_intervals_and_p_of_several_contrasts_hold_together():
    rng = np.random.default_rng(14)
    control = rng.random((3, 300)) < 0.6
    treated = [rng.random((3, 300)) < share for share in (0.6, 0.7, 0.75)]
    report = compare(_arms(control, *treated))
    for one, scores in zip(report.arms, treated, strict=True):
        assert one.corrected == min(1.0, 3 * one.p_value)
        assert one.simultaneous == spread(scores, control).interval(0.05 / 3)
        assert one.interval == spread(scores, control).interval()
    assert "95 % interval, corrected for 3 contrasts, " in report.arms[0].text
    assert table(report).title.endswith(" for 3 contrasts, so that all intervals together hold at 95 %")
    assert compare(_arms(control, treated[0])).correction == ""


def test_equivalence_is_held_to_the_corrected_interval():
    right = np.arange(1000) < np.array([678, 693, 707, 722])[:, None]
    alone, of_nine = (compare(_arms(right, *[right] * tests)).arms[0] for tests in (1, 9))
    assert (alone.verdict, of_nine.verdict) == (SAME, "not enough data")
    assert of_nine.interval == alone.interval
    assert of_nine.seeds_for_verdict > alone.seeds_for_verdict


def test_five_contrasts_together_are_wrong_in_one_comparison_of_twenty():
    rng, wrong = np.random.default_rng(20), 0
    for _ in range(200):
        problems = rng.normal(0.8, 1.5, 192)
        scores = [rng.random((3, 192)) < 1 / (1 + np.exp(-problems - rng.normal(0, 0.3, (3, 1)))) for _ in range(6)]
        wrong += any(one.verdict in ("helps", "hurts") for one in compare(_arms(*scores)).arms)
    assert wrong / 200 <= 0.08


def test_intervals_and_p_of_several_looks_hold_together():
    rng = np.random.default_rng(15)
    control, one, other = (rng.random((3, 300)) < share for share in (0.6, 0.7, 0.75))
    report = compare(_arms(control, one, other), looks=4)
    assert report.arms[0].corrected == min(1.0, 8 * report.arms[0].p_value)
    assert report.arms[0].simultaneous == spread(one, control).interval(0.05 / 8)
    assert "95 % interval, corrected for 2 contrasts at 4 looks, " in report.arms[0].text
    assert table(report).title.endswith(" for 2 contrasts at 4 looks, so that all intervals together hold at 95 %")
    assert "for 1 contrast at 4 looks" in compare(_arms(control, one), looks=4).correction


def test_looking_until_there_is_a_verdict_keeps_five_percent_only_if_the_looks_are_counted():
    """Of 1,500 simulated plans with looks at 3, 5 and 8 seeds, 1.9 to 4.7 % were wrong (sd of seeds 0.1 to 0.6)."""
    rng, stops = np.random.default_rng(22), (3, 4, 5, 6, 7, 8)
    wrong = dict.fromkeys((1, len(stops)), 0)
    for _ in range(120):
        treated, control = simulate((8, 8), 192, 0.3, rng)
        for looks in wrong:
            verdicts = (compare(_arms(control[:n], treated[:n]), looks=looks).arms[0].verdict for n in stops)
            wrong[looks] += any(verdict in ("helps", "hurts") for verdict in verdicts)
    assert wrong[len(stops)] / 120 <= 0.08
    assert wrong[1] / 120 > 0.1


def test_scores_of_several_answers_are_compared_by_the_same_test():
    rng = np.random.default_rng(21)
    chance = rng.beta(1, 1, 384)
    control, treated = (rng.binomial(8, np.clip(chance + shift, 0, 1), (3, 384)) / 8 for shift in (0, 0.1))
    found = compare(_arms(control, treated, samples=8)).arms[0]
    assert (found.verdict, found.test) == ("helps", "seeds crossed with items")
    assert found.p_value == spread(treated, control).p_value
    single = compare(_arms(control[:1], treated[:1], samples=8))
    assert (single.arms[0].test, single.arms[0].verdict) == ("score test over items", "not enough data")
    low, high = single.control.interval
    assert low < control[0].mean() < high
    # Eight responses per problem give more information than one, but less than eight problems.
    share = control[0].mean()
    assert np.ptp(wilson(share * 8 * 384, 8 * 384)) < high - low < np.ptp(wilson(share * 384, 384))


def test_a_handful_of_items_is_too_few_and_no_crash():
    for seeds, items in itertools.product((1, 2), (1, 2, 3, 5)):
        control = np.arange(seeds * items).reshape(seeds, items) % 2 == 0
        assert compare(_arms(control, ~control)).arms[0].verdict == "not enough data"
    wide = compare(_arms([[1, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 1, 0], [1, 1, 1, 1]])).arms[0]
    assert wide.interval[1] == 1


def test_where_nothing_varies_the_number_of_items_decides():
    for items, verdict in ((3, "not enough data"), (12, "helps")):
        wrong = np.zeros((2, items), dtype=bool)
        report = compare(_arms(wrong, ~wrong, wrong))
        found, equal = report.arms
        assert found.p_value == of_items(np.ones(items)).p_value
        assert found.verdict == verdict
        assert found.interval[0] < 1
        assert equal.p_value == 1
        assert report.control.interval == wilson(0, items)
