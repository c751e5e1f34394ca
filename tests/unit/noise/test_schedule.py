"""The schedule against the plan's table, QeRL's formula, and all of its earlier failures."""

import dataclasses
import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from verl_aqn.errors import ConfigError
from verl_aqn.noise.schedule import KINDS, SigmaSchedule

# Experiment plan, E12-aggressive-1ep: σ printed to three digits, by step.
PLAN = [
    (range(3), 0.0),
    (range(3, 6), 5.0e-2),
    (range(6, 9), 1.72e-2),
    (range(9, 12), 5.95e-3),
    (range(12, 15), 2.05e-3),
    (range(15, 18), 7.07e-4),
    (range(18, 21), 2.44e-4),
    (range(21, 24), 8.41e-5),
    (range(24, 27), 2.90e-5),
    (range(27, 30), 1.0e-5),
]


def test_the_plans_table_comes_out_exactly():
    schedule = SigmaSchedule(0.05, 1e-5, 10, 29)
    for stage, (steps, sigma) in enumerate(PLAN):
        for step in steps:
            assert schedule.stage(step) == stage
            assert f"{schedule.sigma(step):.2e}" == f"{sigma:.2e}"
    assert schedule.sigma(3) == 0.05
    assert schedule.sigma(27) == 1e-5


def test_table_has_one_row_a_step():
    rows = SigmaSchedule(0.05, 1e-5, 10, 29).table()
    assert [row["step"] for row in rows] == list(range(29))
    assert rows[0] == {"step": 0, "stage": 0, "sigma": 0.0}
    assert rows[28] == {"step": 28, "stage": 9, "sigma": 1e-5}
    assert len(SigmaSchedule(0.05, 1e-5, 10, 29).table(steps=40)) == 40


def test_two_stages_are_warm_up_then_sigma_start():
    assert [SigmaSchedule(0.05, 1e-5, 2, 4).sigma(s) for s in range(6)] == [0, 0, 0.05, 0.05, 0.05, 0.05]


def test_one_stage_is_noise_from_the_first_step():
    assert {SigmaSchedule(0.05, 1e-5, 1, 4).sigma(s) for s in range(6)} == {0.05}


def test_constant_is_sigma_start_at_every_step():
    schedule = SigmaSchedule(0.01, 1e-5, 10, 29, kind="constant")
    assert {row["sigma"] for row in schedule.table()} == {0.01}
    assert {row["stage"] for row in schedule.table()} == {0}


def test_sigma_end_zero_ends_in_exact_zero():
    schedule = SigmaSchedule(0.05, 0.0, 5, 5)
    assert [schedule.sigma(s) for s in range(6)] == pytest.approx([0, 0.05, 0.005, 0.0005, 0, 0])
    assert schedule.sigma(4) == 0.0
    assert [SigmaSchedule(0.05, 0.0, 3, 3).sigma(s) for s in range(3)] == [0, 0.05, 0]
    assert [SigmaSchedule(0.05, 0.0, 2, 2).sigma(s) for s in range(2)] == [0, 0.05]


def test_no_noise_at_all_is_a_schedule():
    assert {row["sigma"] for row in SigmaSchedule(0.0, 0.0, 10, 29).table()} == {0.0}


def test_epoch_aware_is_not_silent():
    """The fork called its injector with step 0 of 1 here, so σ was always 0."""
    schedule = SigmaSchedule(0.05, 5e-4, 10, 29, epoch_aware=True)
    assert [row["sigma"] for row in schedule.table()] == [
        row["sigma"] for row in SigmaSchedule(0.05, 5e-4, 10, 29).table()
    ]
    assert max(row["sigma"] for row in schedule.table()) == 0.05


def test_every_epoch_warms_up_and_decays_in_its_own_part():
    schedule = SigmaSchedule(0.04, 4e-4, 4, 16, epoch_aware=True, epochs=2)
    sigma = [schedule.sigma(s) for s in range(16)]
    middle = math.sqrt(0.04 * 4e-4)
    assert sigma[0:2] == sigma[8:10] == [0, 0]
    assert sigma[2] == 0.04
    assert sigma[6] == sigma[10] == pytest.approx(middle)
    assert sigma[4] == pytest.approx(math.sqrt(0.04 * middle))
    assert sigma[14] == schedule.sigma(99) == 4e-4
    assert [schedule.stage(s) for s in range(0, 16, 2)] == list(range(8))


def test_epoch_aware_sigma_end_zero():
    schedule = SigmaSchedule(0.04, 0.0, 4, 8, epoch_aware=True, epochs=2)
    assert [schedule.sigma(s) for s in range(8)] == pytest.approx(
        [0, 0.04, math.sqrt(0.04 * 0.004), 0.004, 0, 0.004, 4e-4, 0]
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sigma_start": 1e-6}, "swap"),
        ({"sigma_start": -0.1}, "sigma_start"),
        ({"sigma_end": -1e-5}, "sigma_end"),
        ({"sigma_start": math.nan}, "sigma_start"),
        ({"sigma_start": math.inf}, "sigma_start"),
        ({"sigma_end": math.nan}, "sigma_end"),
        ({"sigma_start": "0.05"}, "sigma_start"),
        ({"num_stages": 0}, "num_stages"),
        ({"num_stages": 2.5}, "num_stages"),
        ({"total_steps": 0}, "total_steps"),
        ({"epochs": 0}, "epochs"),
        ({"kind": "sine"}, "exponential, linear, cosine, logarithmic, constant"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"warmup": True}, "warmup"),
        ({"off_from_step": 0}, "off_from_step"),
        ({"off_from_step": 0.5}, "off_from_step"),
        ({"off_from_step": 29}, "takes 29 steps"),
    ],
)
def test_impossible_schedules_are_refused(changes, says):
    good = {"sigma_start": 0.05, "sigma_end": 1e-5, "num_stages": 10, "total_steps": 29}
    with pytest.raises(ConfigError, match=says) as error:
        SigmaSchedule(**(good | changes))
    assert "\n" not in str(error.value)


def test_negative_step_is_an_error():
    with pytest.raises(ConfigError, match="-1"):
        SigmaSchedule(0.05, 1e-5, 10, 29).sigma(-1)


KINDS_AT = {  # f(x) for σ 1 -> 0.1, written independently
    "exponential": lambda x: 0.1**x,
    "linear": lambda x: 1 - 0.9 * x,
    "cosine": lambda x: 0.55 + 0.45 * math.cos(math.pi * x),
    "logarithmic": lambda x: 1 - 0.9 * math.log(1 + 9 * x, 10),
    "constant": lambda x: 1.0,
}


def test_every_kind_is_tested():
    assert set(KINDS_AT) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_follows_its_formula(kind):
    """Warm-up, then five noisy stages of two steps."""
    schedule = SigmaSchedule(1.0, 0.1, 6, 12, kind=kind, warmup=1 / 6)
    wanted = [0.0] + [KINDS_AT[kind](j / 4) for j in range(5)]
    assert [schedule.sigma(s) for s in range(12)] == pytest.approx([sigma for sigma in wanted for _ in "ab"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_and_two_stages_are_defined_for_every_kind(kind):
    one = SigmaSchedule(0.05, 1e-5, 1, 4, kind=kind)
    assert {one.sigma(s) for s in range(6)} == {0.05}
    two = SigmaSchedule(0.05, 1e-5, 2, 4, kind=kind)
    assert [two.sigma(s) for s in range(4)] == ([0.05] * 4 if kind == "constant" else [0, 0, 0.05, 0.05])
    warm = SigmaSchedule(0.05, 1e-5, 1, 4, kind=kind, warmup=0.25)
    assert [warm.sigma(s) for s in range(6)] == [0] + [0.05] * 5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "constant"])
@pytest.mark.parametrize("aware", [False, True])
def test_sigma_end_zero_is_reached_by_every_kind_and_not_before_the_end(kind, aware):
    schedule = SigmaSchedule(0.05, 0.0, 5, 10, kind=kind, epoch_aware=aware, epochs=2)
    assert schedule.sigma(9) == 0.0
    assert all(schedule.sigma(s) > 0 for s in range(8) if schedule.stage(s) % 5)


def test_warm_up_is_free_to_choose():
    assert [row["sigma"] for row in SigmaSchedule(0.05, 0.05, 4, 10, warmup=0.3).table()] == [0] * 3 + [0.05] * 7
    none = SigmaSchedule(0.05, 1e-5, 10, 29, warmup=0)
    assert (none.sigma(0), none.sigma(28)) == (0.05, 1e-5)
    assert SigmaSchedule(1, 0.1, 4, 1000, warmup=0.29).sigma(289) == 0  # 0.29 * 1000 is below 290 in floating point
    assert SigmaSchedule(1, 0.1, 4, 1000, warmup=0.29).sigma(290) == 1
    each = SigmaSchedule(0.05, 0.0005, 4, 20, warmup=0.2, epoch_aware=True, epochs=2)
    assert [s for s in range(20) if each.sigma(s) == 0] == [0, 1, 10, 11]
    assert SigmaSchedule(0.05, 1e-5, 4, 2, warmup=0.5, epoch_aware=True, epochs=5).sigma(9) > 0


def test_noise_can_stop_early():
    whole = SigmaSchedule(0.05, 1e-5, 10, 29)
    short = SigmaSchedule(0.05, 1e-5, 10, 29, off_from_step=20)
    assert [short.sigma(s) for s in range(20)] == [whole.sigma(s) for s in range(20)]
    assert {short.sigma(s) for s in range(20, 40)} == {0.0}
    assert {short.stage(s) for s in range(20, 40)} == {10}


schedules = st.builds(
    lambda start, ratio, stages, steps, epochs, aware, kind, warmup: SigmaSchedule(
        start, start * ratio, stages, steps, kind, aware, epochs, warmup
    ),
    st.floats(1e-6, 1),
    st.floats(0, 1),
    st.integers(1, 12),
    st.integers(1, 60),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(KINDS),
    st.none() | st.floats(0, 0.99),
)


@given(schedules, st.integers(0, 80))
def test_sigma_stays_in_its_range_and_stages_never_go_back(schedule, step):
    assert 0 <= schedule.sigma(step) <= schedule.sigma_start
    assert schedule.stage(step) <= schedule.stage(step + 1)
    assert schedule.sigma(schedule.total_steps + step) == schedule.sigma(schedule.total_steps)


@given(schedules)
def test_noise_never_rises_but_for_leaving_a_warm_up(schedule):
    table = schedule.table()
    has_warm_up = schedule._stages > schedule._noisy
    warm = {row["stage"] for row in table if has_warm_up and row["stage"] % schedule._stages == 0}
    noisy = [row["sigma"] for row in table if row["stage"] not in warm]
    assert all(row["sigma"] == 0 for row in table if row["stage"] in warm)
    # Powers with fractional exponents round: equal neighbours may differ in the last places.
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(noisy))


@given(schedules)
def test_both_ends_are_hit_where_there_are_steps_for_them(schedule):
    stages = schedule._stages * schedule._parts
    # A warm-up leaves at least one step for a noisy stage, and takes at most half of a part.
    assume(schedule.total_steps >= 2 * stages and (schedule.warmup or 0) <= 0.5)
    sigma = [row["sigma"] for row in schedule.table()]
    assert max(sigma) == schedule.sigma_start
    if schedule.kind != "constant" and schedule.num_stages > 2:
        assert sigma[-1] == schedule.sigma_end


@given(schedules, st.integers(0, 80), st.integers(0, 80))
def test_sigma_is_a_pure_function_of_the_step(schedule, step, before):
    """A run resumed at a step has the same σ as one that reached it without a break."""
    resumed = dataclasses.replace(schedule)
    schedule.sigma(before)
    assert (resumed.sigma(step), resumed.stage(step)) == (schedule.sigma(step), schedule.stage(step))


@given(st.integers(3, 12), st.integers(1, 200), st.integers(0, 220))
def test_formula_of_qerl(stages, steps, step):
    stage = min(Fraction(step) // Fraction(steps, stages), stages - 1)
    expected = 0.0 if stage == 0 else 0.05 * (1e-5 / 0.05) ** ((stage - 1) / (stages - 2))
    assert SigmaSchedule(0.05, 1e-5, stages, steps).sigma(step) == pytest.approx(expected, rel=1e-12)


def test_the_schedule_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import verl_aqn.noise.schedule; "
        "extra = {m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names - {'verl_aqn'}; "
        "sys.exit(str(extra) if extra else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
