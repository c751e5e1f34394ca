"""A real run whose rollout computes another model than its trainer ends before it learns anything."""

from tests.integration.conftest import lines, newest


def test_a_rollout_with_another_model_stops_the_run_before_the_first_update(train, tmp_path):
    # As a user may do it unknowingly: a setting of vLLM's alone. Base, adapter and noise are then still the right ones.
    other = "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides={rms_norm_eps:30.0}"
    process = train(tmp_path, other, "trainer.val_before_train=false", "aqn.noise.num_stages=2")
    _, err = process.communicate(timeout=600)
    run = newest(tmp_path)
    assert process.returncode == 1, err
    last = err.strip().splitlines()[-1]
    assert "step 1: trainer and rollout without noise differ by" in err
    assert "aqn.parity.stop=1" in err, last
    (record,) = lines(run / "evidence.jsonl", "mismatch")
    assert record["abs_dlogp_mean"] > 1
    assert record["tokens"] == 64  # all of the batch: σ is 0
    assert not lines(run / "metrics.jsonl", "step")
    assert len(lines(run / "evidence.jsonl", "adapter")) == 1  # of the start: nothing was sent after it
