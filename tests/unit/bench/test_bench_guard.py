"""What the guard calls worse. Its real measurement is in tests/integration/test_speed.py."""

import pytest

from verl_aqn.bench import guard
from verl_aqn.errors import ConfigError


def test_worse_is_more_than_the_margin_or_not_measured():
    then = {"a": 1.5, "b": 0.1, "c": 2.0, "near": 1.1, "also near": 0.9}
    assert guard.worse({"a": 2.9, "b": 0.21, "near": 1.44, "also near": 1.16, "new": 9.0}, then) == ["b", "c", "near"]
    assert guard.worse(then, then) == []


def test_what_seems_worse_is_measured_again():
    runs = iter([{"a": 1.0, "b": 9.0}, {"a": 1.2, "b": 1.1}])
    assert guard.confirmed(5, {"a": 1.0, "b": 1.0}, lambda _: next(runs)) == {"a": 1.0, "b": 1.1}
    slow = iter([{"a": 9.0}, {"a": 8.0}, {"a": 9.0}])
    assert guard.confirmed(5, {"a": 1.0}, lambda _: next(slow)) == {"a": 8.0}
    assert next(slow, None) is None
    calm = iter([{"a": 1.0}])
    assert guard.confirmed(5, {"a": 1.0}, lambda _: next(calm)) == {"a": 1.0}


def test_a_baseline_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    with pytest.raises(ConfigError, match="bench guard --record"):
        guard.recorded()
    guard.record({"a": 0.123456})
    assert guard.recorded() == {"a": 0.1235}
