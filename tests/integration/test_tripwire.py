"""A run whose rollout uses a different model than its trainer, or ignores its noise, ends before it learns."""

from tests.integration.conftest import lines, newest


def test_a_rollout_with_another_model_stops_the_run_before_the_first_update(train, tmp_path):
    # A user may do this unknowingly by a setting of vLLM. Base, adapter and noise are then still right.
    other = "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides={rms_norm_eps:30.0}"
    process = train(tmp_path, other, "trainer.val_before_train=false", "aqn.noise.num_stages=2")
    _, err = process.communicate(timeout=600)
    run = newest(tmp_path)
    assert process.returncode == 1, err
    last = err.strip().splitlines()[-1]
    assert "step 1: trainer and rollout without noise differ by" in err
    assert "aqn.mismatch.stop=1" in err, last
    (record,) = lines(run / "evidence.jsonl", "mismatch")
    assert record["abs_dlogp_mean"] > 1
    assert record["tokens"] == 64  # all of the batch: σ is 0
    assert not lines(run / "metrics.jsonl", "step")
    assert len(lines(run / "evidence.jsonl", "adapter")) == 1  # the record of the start: nothing was sent after it


def test_a_rollout_whose_forward_ignores_the_noise_in_its_weights_stops_the_run(train, tmp_path):
    deaf = "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=tests.helpers.verl_aqn_deaf.DeafToNoise"
    process = train(tmp_path, deaf, "trainer.val_before_train=false", "aqn.noise.num_stages=2")
    _, err = process.communicate(timeout=600)
    run = newest(tmp_path)
    assert process.returncode == 1, err
    assert "step 3: noise of σ 0.05 is in the rollout's weights, but its forward does not use it" in err
    *quiet, noisy = lines(run / "evidence.jsonl", "use")
    assert [one["sigma"] for one in quiet] == [0, 0]
    assert noisy["effect"] + noisy["error"] < noisy["predicted"] / 2
    assert noisy["predicted_by"] == "the trainer with the same noise"
    assert len(lines(run / "metrics.jsonl", "step")) == 2
    assert lines(run / "evidence.jsonl", "noise")[-1]["sigma_measured"] > 0.04  # the weights themselves were right
    (stopped,) = lines(run / "evidence.jsonl", "stopped")
    assert "does not use it" in stopped["reason"]
