"""The benchmarks run, compare what is comparable, and report in the documented form."""

import json

import pytest

from verl_aqn.bench.codec_speed import measure
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
        for peer in ("… by torchao", "… by compressed-tensors"):
            assert rows[peer, dtype]["ours_times_as_fast"] > 0
    for row in result["codec"]:
        assert row["gbytes_per_s"] == pytest.approx(row["gbytes"] / row["seconds"])
        assert row["of_copy"] > 0
    assert [row["of_copy"] for row in result["codec"] if row["name"].startswith("copy")] == [1.0] * 4
    assert [round(row["bytes_of_bf16"], 3) for row in result["linear"]] == [1, 0.266, 1.266] * 2


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
