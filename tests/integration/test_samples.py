"""`verl-aqn eval --samples` in the real rollout, and `compare` of its results."""

import json
from pathlib import Path

from tests.integration.conftest import TINY, verl_aqn
from verl_aqn.runs.stats.scores import answers_in

VAL = "actor_rollout_ref.rollout.val_kwargs"


def test_several_answers_are_drawn_recorded_and_compared(tiny_model, warm_cache, tmp_path):
    results = []
    for temperature in (1.0, 0.7):
        where = [*TINY, "data.val_max_samples=3", f"aqn.run.dir={tmp_path / str(temperature)}"]
        options = [f"{VAL}.temperature={temperature}", "--samples", "4", "--json"]
        process = verl_aqn("eval", str(tiny_model), *where, *options, cache=warm_cache)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    lines = [json.loads(line) for line in Path(results[0]["file"]).read_text().splitlines()]
    assert [(line["item"], line["sample"]) for line in lines] == [(item, k) for item in range(3) for k in range(4)]
    assert len({line["output"] for line in lines if line["item"] == 0}) > 1  # sampled, not the likeliest four times
    found = answers_in(lines)
    assert (results[0]["items"], results[0]["samples"]) == (3, 4)
    assert results[0]["scores"]["strict"]["accuracy"] == sum(found.scores().values()) / 3
    assert list(results[0]["pass_at"]) == ["1", "2", "4"]
    runs = [result["run"] for result in results]
    process = verl_aqn("compare", *runs, "--factor", VAL, "--metric", "pass@2", "--json", cache=warm_cache)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (json.loads(out)["metric"], json.loads(out)["items"]) == ("pass@2", 3)
