"""The generator is a pure function of key and index, standard normal as far as tests can see, and pinned."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from verl_aqn.errors import EnvironmentFault
from verl_aqn.noise import draw
from verl_aqn.noise import rng as gaussian
from verl_aqn.noise.rng import Span, draw_spans, normal

KEYS = (st.integers(0, 2**40), st.integers(0, 10**6), st.text(max_size=40))


@given(*KEYS, st.integers(0, 10**9), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=100)
def test_any_slice_can_be_drawn_alone(seed, step, name, offset, skip, numel):
    whole = draw(seed, step, name, skip + numel, offset)
    assert torch.equal(draw(seed, step, name, numel, offset + skip), whole[skip:])
    assert torch.equal(draw(seed, step, name, skip, offset), whole[:skip])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100), st.integers(0, 100)), max_size=8))
def test_many_spans_at_once_are_the_spans_one_by_one(spans):
    singles = [draw(0, 3, name, numel, offset) for name, offset, numel in spans]
    assert torch.equal(draw_spans(0, 3, [Span(*span) for span in spans]), torch.cat([torch.empty(0), *singles]))


def test_draw_is_float32_on_the_cpu_and_depends_on_each_part_of_its_key():
    first = draw(1, 2, "a", 64)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert torch.equal(first, draw(1, 2, "a", 64))
    for other in (draw(2, 2, "a", 64), draw(1, 3, "a", 64), draw(1, 2, "b", 64), draw(12, 0, "a", 64)):
        assert not torch.equal(first, other)


def test_draw_is_pinned_to_the_bit():
    """Otherwise runs before and after a change could not be compared. The bits are the same on every platform."""
    first = [x.hex() for x in draw(0, 0, "a", 3).tolist()]
    assert first == ["-0x1.5cd3660000000p+1", "0x1.37a7f60000000p-2", "0x1.bed6240000000p-4"]
    other = [x.hex() for x in draw(1, 29, "model.norm", 3, offset=5).tolist()]
    assert other == ["0x1.93345a0000000p-1", "0x1.b65f7a0000000p-1", "-0x1.59b6780000000p-1"]


def test_another_process_draws_the_same():
    code = "from verl_aqn.noise import draw; print(draw(5, 7, 'model.norm', 4096).numpy().tobytes().hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == draw(5, 7, "model.norm", 4096).numpy().tobytes().hex()


def test_a_table_of_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(gaussian, "_TABLE_SHA256", "0" * 64)
    with pytest.raises(EnvironmentFault, match="libm"):
        gaussian._table.__wrapped__()


def test_quantiles_are_those_of_the_normal_distribution():
    """Checked on random words, and on the 4,000 of the extreme tails, where a table would be wrong first."""
    words = np.concatenate(
        [
            np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32),
            np.arange(2000, dtype=np.uint32),
            np.arange(2000, dtype=np.uint32) + np.uint32(2**31),
        ]
    )
    tail = (2.0 * (words & np.uint32(2**31 - 1)) + 1) / 2**33
    exact = stats.norm.isf(tail) * np.where(words >> 31, -1, 1)
    assert np.abs(normal(words) - exact).max() < 2e-6
    assert normal(np.array([0, 2**31], np.uint32)).tolist() == pytest.approx([6.338, -6.338], abs=1e-3)
    assert np.abs(normal(np.array([2**31 - 1, 2**32 - 1], np.uint32))).max() == 0


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """Four million values: 2,000 names with 1,000 each at two steps."""
    spans = [Span(f"model.layers.{i}.norm", 0, 1000) for i in range(2000)]
    return torch.cat([draw_spans(0, step, spans) for step in (0, 1)]).double().numpy()


def test_distribution(sample):
    assert stats.kstest(sample, "norm").pvalue > 0.001


def test_moments(sample):
    """Bounds of four standard errors: sqrt(1/n) for the mean, 2/n variance, 6/n skewness, 24/n kurtosis."""
    n = len(sample)
    for value, variance in (
        (sample.mean(), 1),
        (sample.var() - 1, 2),
        (stats.skew(sample), 6),
        (stats.kurtosis(sample), 24),
    ):
        assert abs(value) < 4 * np.sqrt(variance / n)


@pytest.mark.parametrize("sigmas", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [-1, 1])
def test_tails(sample, sigmas, side):
    found = int((side * sample > sigmas).sum())
    assert stats.binomtest(found, len(sample), stats.norm.sf(sigmas)).pvalue > 0.001


def test_names_steps_seeds_and_neighbours_are_independent(sample):
    rows = sample.reshape(4000, 1000)
    reseeded = draw_spans(1, 0, [Span(f"model.layers.{i}.norm", 0, 1000) for i in range(2000)])
    pairs = {
        "names": (rows[:-1], rows[1:]),
        "steps": (rows[:2000], rows[2000:]),
        "neighbours": (rows[:, :-1], rows[:, 1:]),
        "seeds": (rows[:2000].ravel(), reseeded),
    }
    for name, (one, two) in pairs.items():
        one, two = np.ravel(one), np.asarray(two, dtype=float).ravel()
        for left, right in ((one, two), (np.abs(one), np.abs(two))):
            assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(one.size), name
