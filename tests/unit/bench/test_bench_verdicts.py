"""The simulation of `compare`'s verdicts has the stated differences, and its error rates are in bounds.

`verl-aqn bench verdicts` has more cases and trials; docs/experiments.md has its table.
"""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from verl_aqn.bench import verdicts
from verl_aqn.bench.verdicts import answers, rates, summary, wrong
from verl_aqn.cli.main import app
from verl_aqn.runs.stats.compare import HELPS, HURTS, SAME, UNKNOWN


@pytest.mark.parametrize(("difference", "spread"), [(0.0, 0.0), (0.02, 0.03), (0.05, 0.01)])
def test_the_arms_differ_and_the_seeds_scatter_as_much_as_is_said(difference, spread):
    treated, control = answers(400, 20_000, spread, difference, np.random.default_rng(0))
    assert control.mean() == pytest.approx(0.75, abs=0.008)
    assert treated.mean() - control.mean() == pytest.approx(difference, abs=0.006)
    for arm in (treated, control):
        chance = 0.25 * 0.75 / 20_000  # at most
        assert arm.mean(1).std() == pytest.approx(spread, abs=0.1 * spread + chance**0.5)


@pytest.mark.parametrize(
    ("seeds", "items", "spread", "accuracy"),
    [(2, 100, 0.0, 0.75), (2, 384, 0.03, 0.75), (3, 384, 0.01, 0.93), (5, 384, 0.02, 0.75), (12, 384, 0.03, 0.75)],
)
def test_no_verdict_is_false_more_often_than_it_may_be(seeds, items, spread, accuracy):
    """The limit is 5 %, half on each side; with 200 trials the rate varies by about 1.5 points."""
    none = rates(seeds, items, spread, 0.0, 200, accuracy)
    assert none[HELPS] + none[HURTS] <= 0.08
    five = rates(seeds, items, spread, 0.05, 200, accuracy)
    assert five[HURTS] + five[SAME] <= 0.06


def test_with_much_data_there_is_a_verdict_and_of_one_seed_never():
    assert rates(8, 1319, 0.01, 0.0, 30)[SAME] > 0.9
    assert rates(8, 1319, 0.01, 0.05, 30)[HELPS] > 0.9
    assert rates(1, 1319, 0.0, 0.05, 10)[UNKNOWN] == 1


def test_what_is_false_depends_on_the_true_difference():
    said = {HELPS: 0.1, HURTS: 0.2, SAME: 0.4, UNKNOWN: 0.3}
    rows = [{"seeds": 2, "items": 100, "difference": d, "verdicts": said} for d in (0.0, 0.02, 0.05)]
    assert [wrong(row) for row in rows] == pytest.approx([0.3, 0.2, 0.6])
    (row,) = summary(rows)
    assert row["reached"][0.05] == (0.7, 0.7)


def test_the_command(monkeypatch):
    monkeypatch.setattr(verdicts, "SEEDS", (2,))
    monkeypatch.setattr(verdicts, "ITEMS", (20,))
    result = CliRunner().invoke(app, ["bench", "verdicts", "--trials", "2", "--json"])
    assert len(json.loads(result.stdout)) == 12
    assert "2 simulated comparisons" in CliRunner().invoke(app, ["bench", "verdicts", "--trials", "2"]).stdout
