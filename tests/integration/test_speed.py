"""Ratios measured side by side, and a run of `bench growth`: what they say of speed is in docs/performance.md."""

import json

import torch

from tests.integration.conftest import verl_aqn
from verl_aqn.bench import growth, shapes, step
from verl_aqn.bench import update_speed as update
from verl_aqn.models.attention import NAME, laid_out


def test_no_ratio_is_worse_than_the_recorded_one():
    process = verl_aqn("bench", "guard", "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert json.loads(out)["now"].keys() == json.loads(out)["recorded"].keys()


def test_a_step_is_faster_than_stock_verl_s_with_the_same_settings(tiny_model, tmp_path, monkeypatch):
    """Both run all of their processes, with a model so small that waiting and transfers take most of a step."""
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    settings = step.overrides(str(tiny_model), 4, small=True)
    result = step.measure(settings, 4, 1, tmp_path / "runs", lambda _: None, step.ARMS[:2])
    ours, stock = result["arms"]["ours"], result["arms"]["stock tuned"]
    assert ours["synced"] == stock["synced"] > 0
    assert ours["rescoring"] > 0 < ours["noise and evidence"]
    assert result["ours_of"]["stock tuned"]["step"] < 1, (ours, stock)


def test_a_decode_step_is_measured_beside_its_products():
    arguments = ("--sequences", "2", "--tokens", "8", "--rounds", "1", "--json")
    process = verl_aqn("bench", "decode", *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    (row,) = json.loads(out)["rows"]
    assert row["sequences"] == 2
    assert all(row[name]["median"] > 1e-3 for name in ("packed", "bf16", "products"))  # seconds; 0.02 were measured
    assert "leaked" not in err


def test_prompts_shared_or_not_the_update_is_of_the_same_answers():
    """The loss that `bench update` measures is the same in both layouts."""
    model = update.build("135M", 2, "cpu", NAME).float()
    losses = []
    for inputs, (row, column, label), layout in update.batches(49_152, 2, 3, 20, 5, "cpu").values():
        with laid_out(layout):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[row, column])
        losses.append(torch.nn.functional.cross_entropy(logits, label))
    assert len(losses) == 2
    torch.testing.assert_close(*losses)


def test_a_run_of_growth_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", (2, 64, 128, 2, 2, 49_152))
    monkeypatch.setattr(growth, "SMALL", {"samples": [growth.Point("tiny", samples=2, response=8)]})
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    result = growth.measure(1, True, tmp_path, lambda _: None)
    (row,) = result["rows"]
    assert (row["model"], row["prompts"], row["samples"], row["response"]) == ("tiny", 2, 2, 8)
    assert row["tokens"] > 4 * 8
    assert 0 < row["generation"] + row["log-probs"] + row["update"] + row["sync"] < row["step"]
    assert row["memory: actor"] > 3e8
    assert result["exponents"] == {}
