"""Closed-loop σ: the controller holds a simulated policy near its target, within its bounds, by its records alone."""

import math
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from verl_aqn.config.noise_settings import order_of, rule_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError
from verl_aqn.noise.control import (
    AT_MAX,
    AT_MIN,
    HELD,
    METRICS,
    MOVED,
    OFF,
    START,
    UNMEASURED,
    WAS_OFF,
    ControlledSigma,
    Point,
    SigmaControl,
)
from verl_aqn.noise.schedule import SigmaSchedule

KL = SigmaControl("kl", 0.1, sigma_min=1e-5, sigma_max=0.5)
ENTROPY = SigmaControl("entropy", 0.4, sigma_min=1e-4, sigma_max=0.5, gain=1.0)


def start(sigma: float = 0.05, steps: int = 400, **more) -> SigmaSchedule:
    return SigmaSchedule(sigma, 0.0, 1, steps, "constant", **more)


def rule_at(control: SigmaControl, sigma: float = 0.05, **more) -> ControlledSigma:
    return ControlledSigma(control, start(sigma, **more))


def run(rule: ControlledSigma, policy, steps: int) -> list[float]:
    """Let `policy(step, σ)`, the measurement, be controlled for `steps` steps; return the measurements."""
    found = []
    for step in range(steps):
        found.append(policy(step, rule.sigma(step)))
        rule.add(step, found[-1])
    return found


def entropy_of(step: int, sigma: float) -> float:
    """A policy that gets more certain by training, and less certain by noise: entropy, nats a token."""
    return 0.35 * math.exp(-step / 150) * (1 + 4 * math.sqrt(sigma))


def kl_of(step: int, sigma: float) -> float:
    """The KL of noise of `sigma`: σ² as long as it is small, as `verl-aqn probe` measures it."""
    return 40 * sigma**2


# ---- the policy follows its target


@pytest.mark.parametrize("start_sigma", [1e-4, 0.05, 0.4])
def test_a_kl_reaches_its_target_from_either_side_without_overshoot(start_sigma):
    found = run(rule_at(KL, start_sigma), kl_of, 60)
    assert abs(math.log(found[-1] / 0.1)) <= 0.05  # half of the dead band: σ moves until then
    # gain 0.25 <= 1/n for n = 2: the error never changes its sign beyond a rounding.
    sign = 1 if found[0] < 0.1 else -1
    assert all(sign * math.log(0.1 / one) > -1e-5 for one in found)
    errors = [abs(math.log(one / 0.1)) for one in found]
    assert errors == sorted(errors, reverse=True)


def test_the_error_shrinks_by_the_factor_that_the_docstring_says():
    found = run(rule_at(replace(KL, dead_band=0.0), 0.045), kl_of, 8)
    errors = [math.log(one / 0.1) for one in found]
    for one, other in pairwise(errors):
        assert other == pytest.approx(one * (1 - 2 * 0.25), abs=1e-4)


def test_an_entropy_that_training_lowers_is_held_until_sigma_reaches_its_bound():
    rule = rule_at(ENTROPY, 0.05)
    found = run(rule, entropy_of, 300)
    sigmas = [rule.sigma(step) for step in range(300)]
    held = sigmas.index(0.5)
    assert held > 50
    assert entropy_of(held, 0.05) < 0.6 * 0.4  # without more noise it would have fallen far below
    settled = found[20:held]
    assert all(abs(math.log(one / 0.4)) < 0.15 for one in settled)  # the dead band, and one step of the decay
    assert sigmas[held:] == [0.5] * (300 - held)


def test_a_target_that_is_scheduled_is_followed_down():
    control = replace(KL, value=(Point(0, 0.1), Point(80, 0.001)), dead_band=0.02)
    found = run(ControlledSigma(control, start(0.05, 120)), kl_of, 120)
    for step in range(20, 120):
        assert abs(math.log(found[step] / control.target_at(step))) < 0.15, step
    assert control.target_at(40) == pytest.approx(0.01)
    assert [control.target_at(step) for step in (80, 81, 10**6)] == [0.001] * 3


def test_noise_in_the_measurement_stays_bounded():
    """k3 of a few hundred tokens scatters by about 20 %; σ scatters by less than the measurement."""
    draw = random.Random(0)
    rule = rule_at(KL, 0.05)
    run(rule, lambda step, sigma: kl_of(step, sigma) * math.exp(draw.gauss(0, 0.2)), 400)
    settled = [math.log(rule.sigma(step) / 0.05) for step in range(50, 400)]
    assert abs(sum(settled) / len(settled)) < 0.1
    assert max(map(abs, settled)) < 0.4
    assert (sum(one**2 for one in settled) / len(settled)) ** 0.5 < 0.2


def test_a_gain_above_the_stable_one_stays_within_the_bounds_of_sigma():
    rule = rule_at(replace(KL, gain=1.5, max_change=100.0), 0.05)
    run(rule, lambda step, sigma: kl_of(step, sigma) * 1.3, 200)
    assert all(1e-5 <= rule.sigma(step) <= 0.5 for step in range(200))


# ---- bounds, dead band, missing measurements


@pytest.mark.parametrize(("reading", "bound", "why"), [(1e-4, 0.5, AT_MAX), (10.0, 1e-5, AT_MIN)])
def test_nothing_winds_up_at_a_bound(reading, bound, why):
    """After a thousand steps at a bound, σ leaves it in the first step that asks for it, as far as after one step."""
    moved = []
    for waited in (1, 1000):
        rule = ControlledSigma(KL, start(bound, 2000))
        run(rule, lambda step, sigma: reading, waited)
        assert (rule.sigma(waited), rule.decision(waited).why) == (bound, why)
        rule.add(waited, 0.1**2 / reading)  # the error of the other sign
        moved.append(rule.sigma(waited + 1))
    assert moved[0] == moved[1]
    assert moved[0] != bound


def test_one_step_changes_sigma_by_no_more_than_max_change():
    for measured, factor in ((1e-12, 2.0), (0.0, 2.0), (-1e-17, 2.0), (1e12, 0.5)):
        rule = rule_at(KL, 0.05)
        rule.add(0, measured)
        assert rule.sigma(1) == pytest.approx(0.05 * factor)


def test_the_dead_band_holds_and_has_hysteresis():
    rule = rule_at(KL, 0.05)
    readings = [0.1 * math.exp(x) for x in (0.09, -0.09, 0.11, 0.08, 0.04, 0.09, 0.0)]
    for step, reading in enumerate(readings):
        rule.add(step, reading)
    why = [rule.decision(step).why for step in range(1, 8)]
    # 0.08 is within the band, but σ is on its way and stops only below half of the band; 0.09 does not start it again.
    assert why == [HELD, HELD, MOVED, MOVED, HELD, HELD, HELD]
    assert len({rule.sigma(step) for step in (0, 1, 2)}) == 1
    assert rule.sigma(3) == pytest.approx(0.05 * math.exp(-0.25 * 0.11), rel=1e-5)
    assert len({rule.sigma(step) for step in (4, 5, 6, 7)}) == 1


@pytest.mark.parametrize("measured", [None, math.nan, math.inf])
def test_a_missing_measurement_holds_sigma_and_says_so(measured):
    rule = rule_at(KL, 0.05)
    rule.add(0, 1.0)
    rule.add(1, measured)
    assert rule.sigma(2) == rule.sigma(1) < 0.05
    assert rule.decision(2).why == UNMEASURED
    record = rule.record(1, {METRICS["kl"]: measured})
    assert record["measured"] is None
    assert record["reason"] == f"{METRICS['kl']} is " + (
        "not among the metrics of the step" if measured is None else str(measured)
    )
    rule.add(2, 1.0)
    assert rule.decision(3).why == MOVED


def test_a_warm_up_has_no_noise_and_its_measurements_do_not_count():
    rule = ControlledSigma(KL, start(0.05, 10, warmup=0.2, off_from_step=6))
    found = run(rule, lambda step, sigma: 1e-4 if sigma == 0 else 1.0, 10)
    assert found[:2] == [1e-4, 1e-4]
    assert [rule.sigma(step) for step in range(10)][:3] == [0, 0, 0.05]
    assert rule.sigma(3) < 0.05
    assert [rule.sigma(step) for step in range(6, 10)] == [0] * 4
    assert [rule.decision(step).why for step in (0, 1, 2, 3, 6)] == [OFF, OFF, START, MOVED, OFF]
    assert [rule.stage(step) for step in (0, 2, 6)] == [0, 1, 2]


def test_an_epoch_that_begins_with_a_warm_up_goes_on_with_the_sigma_before_it():
    rule = ControlledSigma(KL, start(0.05, 8, warmup=0.25, epoch_aware=True, epochs=2))
    run(rule, lambda step, sigma: 1e-4 if sigma == 0 else 1.0, 8)
    sigmas = [rule.sigma(step) for step in range(8)]
    assert (sigmas[0], sigmas[4]) == (0, 0)
    assert rule.decision(5).why == WAS_OFF
    assert 0.05 > sigmas[3] >= sigmas[5] > sigmas[6]


# ---- a pure function of the records


def test_the_decision_depends_only_on_the_measurements_of_earlier_steps():
    readings = [kl_of(step, 0.02 + step / 500) for step in range(30)]
    told = [rule_at(KL) for _ in range(3)]
    for step, reading in enumerate(readings):
        told[0].add(step, reading)
        told[0].sigma(step + 1)  # asked in each step
        told[1].add(step, reading)  # asked only at the end
    for step in reversed(range(30)):  # in another order
        told[2].add(step, readings[step])
    tables = [[rule.decision(step) for step in range(31)] for rule in told]
    assert tables[0] == tables[1] == tables[2]
    told[0].add(20, 5.0)  # a later measurement
    assert [told[0].decision(step) for step in range(21)] == tables[0][:21]
    assert told[0].decision(21) != tables[0][21]


@pytest.mark.parametrize("saved", [1, 4, 8])
def test_a_resumed_run_decides_as_one_that_was_not_interrupted(saved):
    """The abandoned steps after the checkpoint have other measurements; the repeated ones replace them one by one."""
    undisturbed = rule_at(KL)
    run(undisturbed, kl_of, 12)
    crashed = rule_at(KL)
    run(crashed, lambda step, sigma: kl_of(step, sigma) * (1 if step < saved else 7.0), 10)
    records = [(step, crashed._measured[step]) for step in range(10)]
    resumed = rule_at(KL)
    for step, measured in records:  # all records of the file, also the abandoned ones
        resumed.add(step, measured)
    for step in range(saved, 12):
        assert resumed.decision(step) == undisturbed.decision(step), step
        resumed.add(step, kl_of(step, resumed.sigma(step)))


def test_a_run_that_begins_at_another_run_s_checkpoint_begins_with_its_start():
    rule = rule_at(KL)
    assert (rule.sigma(7), rule.decision(7).why) == (0.05, UNMEASURED)


# ---- settings

BLOCK = {"target": "kl", "value": 0.1, "sigma_min": 1e-5, "sigma_max": 0.5}


def config(noise: dict | None = None, **control) -> dict:
    block = {"kind": "constant", "sigma_start": 0.05, "control": BLOCK | control}
    return {"aqn": {"noise": block | (noise or {})}}


def test_without_control_the_schedule_itself_decides():
    noise = parse_aqn({"aqn": {"noise": {"kind": "exponential"}}}).noise
    schedule = schedule_of({"aqn": {}}, 29)
    assert noise.control is None
    assert rule_of(noise, schedule) is schedule
    off = config({"enabled": False})
    assert isinstance(rule_of(parse_aqn(off).noise, schedule_of(off, 29)), SigmaSchedule)


def test_the_order_of_a_step_has_the_controlled_sigma():
    noise = parse_aqn(config(value=[{"step": 0, "value": 0.1}, {"step": 28, "value": 0.001}])).noise
    assert noise.control.value == (Point(0, 0.1), Point(28, 0.001))
    rule = rule_of(noise, schedule_of(config(), 29))
    rule.add(0, 0.4)
    order = order_of(noise, rule, 1)
    assert order.sigma == rule.sigma(1) < 0.05
    assert (order.step, order.share) == (1, 1 / 29)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("target", "kll", "aqn.noise.control.target='kll' is not one of entropy, kl"),
        ("value", 0, "aqn.noise.control.value is 0.0: give a number above 0, in nats a token"),
        ("value", math.nan, "aqn.noise.control.value is nan: give a number above 0"),
        ("value", [], "aqn.noise.control.value is []: give a number, or points such as [{step: 0, value: 0.1}]"),
        ("value", "much", "aqn.noise.control.value must be a float, got 'much'"),
        ("value", None, "aqn.noise.control.value must be a float, got None"),
        ("value", [{"step": 5, "value": 1}, {"step": 5, "value": 2}], "is at the steps [5, 5]: give steps that ascend"),
        ("value", [{"step": -1, "value": 1}], "is at the steps [-1]: give steps that ascend, from 0"),
        ("value", [{"step": 0, "value": -1}], "aqn.noise.control.value is -1.0: give a number above 0"),
        ("value", [{"stpe": 0, "value": 1}], "unknown key aqn.noise.control.value[0].stpe: did you mean 'step'?"),
        ("value", [{"step": 0}], "aqn.noise.control.value[0].value is missing: give it a value"),
        ("sigma_min", 0, "aqn.noise.control.sigma_min is 0.0: give a number above 0, because σ changes by a factor"),
        ("sigma_max", 1e-5, "aqn.noise.control.sigma_max is 1e-05: give a number above sigma_min=1e-05"),
        ("sigma_max", math.inf, "aqn.noise.control.sigma_max is inf: give a number above sigma_min"),
        ("sigma_max", 0.01, "aqn.noise.sigma_start is 0.05, outside aqn.noise.control.sigma_min=1e-05 and sigma_max=0"),
        ("gain", 0, "aqn.noise.control.gain is 0.0: give a number above 0 and up to 10"),
        ("gain", math.nan, "aqn.noise.control.gain is nan"),
        ("dead_band", -0.1, "aqn.noise.control.dead_band is -0.1: give 0 or more"),
        ("max_change", 1, "aqn.noise.control.max_change is 1.0: give a factor above 1"),
        ("gian", 1, "unknown key aqn.noise.control.gian: did you mean 'gain'?"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_value_and_remedy(key, value, words):
    with pytest.raises(ConfigError) as error:
        parse_aqn(config(**{key: value}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (config({"kind": "exponential"}), "aqn.noise.kind=exponential has no effect with aqn.noise.control"),
        (
            config({"target_kl": 0.1}),
            "aqn.noise.target_kl=0.1 and aqn.noise.control both choose σ: set aqn.noise.target",
        ),
        (
            {"aqn": config()["aqn"] | {"mismatch": {"rescore": 0}}},
            "aqn.mismatch.rescore is 0, so there is no KL for aqn.noise.control.target=kl: set aqn.mismatch.rescore=16",
        ),
    ],
)
def test_settings_that_contradict_control_are_refused(block, words):
    with pytest.raises(ConfigError) as error:
        parse_aqn(block)
    assert words in str(error.value)


def test_an_entropy_needs_no_rescored_responses():
    parse_aqn({"aqn": config(target="entropy")["aqn"] | {"mismatch": {"rescore": 0}}})


def test_a_rule_without_its_bounds_is_refused():
    for key in BLOCK:
        block = {"aqn": {"noise": {"kind": "constant", "control": {k: v for k, v in BLOCK.items() if k != key}}}}
        with pytest.raises(ConfigError, match=rf"aqn\.noise\.control\.{key} is missing: give it a value"):
            parse_aqn(block)


def test_it_needs_no_torch():
    code = "import sys, verl_aqn.noise.control; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
