"""The quality benchmark: one pass over a random model."""

import json

import pytest

from tests.unit.cli.test_cli import one_line, run
from verl_aqn.bench import quality
from verl_aqn.errors import ConfigError
from verl_aqn.tasks.smollm2 import tiny_model


def test_every_variant_of_a_tiny_model(tmp_path):
    model = tiny_model(tmp_path / "tiny")
    rows = quality.measure(model, 4, 3, ["gptq", "even"], "embedded", ["embedded"])
    assert [row["variant"] for row in rows] == ["bf16", "mse", "even", "gptq"]
    by_name = {row["variant"]: row for row in json.loads(json.dumps(rows))}
    assert by_name["bf16"]["kl"] == [0, 0, 0]
    assert by_name["mse"]["loss_minus_mse"] == [0, 0, 0]
    assert 0 < by_name["gptq"]["kl"][0] < by_name["mse"]["kl"][0]
    assert by_name["mse"]["bytes"] == by_name["gptq"]["bytes"] < by_name["bf16"]["bytes"]
    quality.print_table(rows, "title")


def test_refuses():
    with pytest.raises(ConfigError, match="unknown variant 'gtpq'"):
        quality.measure("/nowhere", 4, 4, ["gtpq"], "embedded", ["embedded"])
    with pytest.raises(ConfigError, match="give two different files"):
        quality.measure("/nowhere", 4, 4, ["gptq"], "a.jsonl", ["embedded", "./a.jsonl"])
    one_line(run("bench", "mxfp4-quality", "--only", "gtpq"), 2)
