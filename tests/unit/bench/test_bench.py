"""The benchmarks run, compare what is comparable, and report in the documented form."""

import json

import pytest

from verl_aqn.bench.codec_speed import _codec_report, _linear_report, measure
from verl_aqn.cli.main import main
from verl_aqn.errors import ConfigError


def test_codec_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["verl-aqn", "bench", "mxfp4", "--size", "256", "--rounds", "2", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["kernels"] == "native"
    rows = {(row["name"], row["dtype"]): row for row in result["codec"]}
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        n = 256 * 256
        assert rows["fake-quantise", dtype]["gbytes"] == pytest.approx(2 * width * n / 1e9)
        assert rows["dequantise", dtype]["gbytes"] == pytest.approx((width + 17 / 32) * n / 1e9)
        assert {"… by torchao", "… by compressed-tensors", "… in plain PyTorch"} <= {n for n, d in rows if d == dtype}
    assert [round(row["bytes_of_bf16"], 3) for row in result["linear"]] == [1, 0.266, 1.266] * 3
    assert max(k * n * 2 for _, k, n in (row["shape"] for row in result["linear"])) > 1 << 25  # page faults, in glibc


def test_a_report_has_speeds_and_ratios_of_one_round_each() -> None:
    """Medians of ratios, not ratios of medians; a round trip is compared with two copies of half its bytes."""
    copy = {"name": "copy of 1,000 MB", "dtype": "bfloat16", "bytes": 10**9, "times": [0.1, 0.2, 0.4]}
    quantised = {"name": "quantise", "dtype": "bfloat16", "bytes": 10**9, "times": [0.2, 0.8, 0.8]}
    trip = {"name": "quantise + dequantise", "dtype": "bfloat16", "bytes": 2 * 10**9, "times": [0.5, 0.5, 0.5]}
    peer = trip | {"name": "… by torchao", "times": [1.0, 5.0, 50.0], "peer_of": trip}
    copied, one, both, theirs = _codec_report([copy, quantised, trip, peer])
    assert (copied["seconds"], copied["gbytes_per_s"], copied["of_copy"]) == (0.2, 5.0, 1.0)
    assert (one["seconds"], one["gbytes_per_s"], one["of_copy"]) == (0.8, 1.25, 0.5)
    assert (both["gbytes"], both["gbytes_per_s"], both["of_copy"]) == (2.0, 4.0, 0.8)
    assert theirs["ours_times_as_fast"] == 10.0
    assert "ours_times_as_fast" not in both


def test_a_layer_is_held_against_bf16_of_its_own_shape() -> None:
    dense = {"name": "bf16", "shape": [1, 32, 32], "weight_bytes": 2048, "times": [1.0, 2.0, 3.0]}
    packed = dense | {"name": "packed", "weight_bytes": 544, "times": [4.0, 3.0, 3.0]}
    other = {"name": "bf16", "shape": [1, 64, 32], "weight_bytes": 4096, "times": [9.0, 9.0, 9.0]}
    rows = {(row["name"], row["shape"][1]): row for row in _linear_report([dense, packed, other])}
    assert (rows["packed", 32]["time_of_bf16"], rows["packed", 32]["bytes_of_bf16"]) == (1.5, 0.265625)
    assert rows["packed", 32]["seconds"] == 3.0


def test_table_is_made_for_reading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["verl-aqn", "bench", "mxfp4", "--size", "64", "--rounds", "1"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert "… by torchao" in out
    assert max(map(len, out.splitlines())) <= 80


def test_what_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        measure(size=100)
    with pytest.raises(ConfigError, match="--device cuda"):
        measure("cuda")
