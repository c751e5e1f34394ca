"""The metrics of a step: docs/metrics.md describes each, and metrics without meaning are not shown."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from verl_aqn.integrations.verl.figures import DROPPED, cut_share, drop_meaningless
from verl_aqn.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT / "tests/unit/runs/real_runs/rollout"


def told() -> list[str]:
    """Return the patterns in the first column of the tables."""
    rows = [
        line.split("|")[1] for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")
    ]
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]


def test_every_figure_of_a_real_run_is_told_and_none_is_dropped():
    steps = RunFolder(REAL).by_step("metrics.jsonl", "step")
    names = {name for record in steps.values() for name in record["metrics"]}
    assert len(names) > 60
    assert sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in told())) == []
    assert sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in DROPPED)) == []


def test_a_cpu_has_no_memory_of_a_device():
    names = ("perf/mfu/actor", "actor/perf/max_memory_reserved_gb", "actor/perf/max_memory_allocated_gb", "actor/lr")
    for cpu, left in ((True, 2), (False, 3)):
        metrics = dict.fromkeys(names, 1.0)
        drop_meaningless(metrics, cpu)
        assert list(metrics) == list(names[-left:])


def test_answers_are_cut_off_at_the_limit_and_not_at_the_longest_of_their_batch():
    assert cut_share(torch.tensor([3, 5, 5]), 8) == 0
    assert cut_share(torch.tensor([8, 5, 5, 8]), 8) == pytest.approx(0.5)
