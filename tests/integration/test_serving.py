"""A real run whose rollout serves the bf16 equivalent of the packed base, as on an Ascend A2 or A3."""

from pathlib import Path

import yaml

from tests.integration.conftest import finish, lines
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed


def test_a_packed_actor_and_a_bf16_rollout_hold_one_base(train, tmp_path):
    process = train(
        tmp_path, "aqn.mxfp4.rollout_weight_format=bf16", "trainer.total_training_steps=2", "aqn.noise.num_stages=2",
        "trainer.save_freq=-1",
    )  # fmt: skip
    run, _ = finish(process, tmp_path)
    model = yaml.safe_load((run / "config.yaml").read_text())["actor_rollout_ref"]["model"]
    packed, served = Path(model["path"]), Path(model["override_config"]["served_path"])
    assert (is_packed(packed), is_packed(served)) == (True, False)
    start, end = lines(run / "evidence.jsonl", "base")
    for record in (start, end):
        (rollout,) = record["rollout"]
        assert {record["disk"], *record["actor"]} == {checkpoint_digest(packed)}
        assert record["served"] == rollout["base_digest"] == checkpoint_digest(packed, form="bf16")
        assert (rollout["form"], rollout["layers"]) == ("bf16", 8)
    # Both use the same arithmetic, so without noise their probabilities of the sampled tokens agree up to bf16.
    first, second = (step["metrics"] for step in lines(run / "metrics.jsonl", "step"))
    assert first["training/rollout_actor_probs_pearson_corr"] > 0.98
    assert (first["aqn/sigma"], second["aqn/sigma"]) == (0.0, 0.05)
    assert all(
        record["actual"][0]["adapter_digest"] == record["sent"] for record in lines(run / "evidence.jsonl", "adapter")
    )
