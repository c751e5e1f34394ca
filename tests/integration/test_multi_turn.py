"""The recipe `multi_turn`: the embedded model calls a calculator under noise; tool outputs are in no metric."""

import json

import pytest

from tests.integration.conftest import finish, leftovers, lines, verl_aqn
from verl_aqn.runs.report.page import write_report

SMALL = [
    "profile=cpu",
    "data.train_batch_size=4",
    "data.train_max_samples=16",
    "data.val_max_samples=6",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
    "trainer.save_freq=-1",
    "aqn.noise.num_stages=2",  # σ 0, then σ_start
    "aqn.mismatch.rescore=1",  # every answer is scored again
]


def test_a_calculator_is_called_and_its_words_are_in_no_figure(tmp_path, warm_cache):
    before = leftovers()
    process = verl_aqn("train", "multi_turn", *SMALL, f"aqn.run.dir={tmp_path}", cache=warm_cache)
    run, err = finish(process, tmp_path)
    assert leftovers() == before
    assert "of the first turn" in err  # the probe measures no rewards: a tool would have to answer
    steps = [record["metrics"] for record in lines(run / "metrics.jsonl", "step")]
    answers = 16
    for metrics in steps:
        assert metrics["training/num_turns/max"] >= 4  # question, call, result, answer
        assert metrics["aqn/tool_tokens"] > 0
        sampled = answers * (metrics["response_length/mean"] - metrics["aqn/tool_tokens"])
        assert metrics["aqn/mismatch/tokens"] == pytest.approx(sampled)
        assert metrics["aqn/mismatch/rescored_tokens"] == pytest.approx(sampled)
        # A token of the tool has no log-prob of the rollout, so one of them would add several nats to the mismatch.
        assert metrics["aqn/mismatch/kernels/abs_dlogp_mean"] < 0.1
    clean, noisy = steps
    assert clean["aqn/mismatch/abs_dlogp_mean"] < 0.1 < noisy["aqn/mismatch/noise/abs_dlogp_mean"]
    conversations = [json.loads(line) for line in (run / "validation/2.jsonl").read_text().splitlines()]
    called = [one["output"] for one in conversations if "<tool_call>" in one["output"]]
    assert len(called) >= 3  # greedy
    assert all("tool\n" in text for text in called)
    assert any(one["acc"] == 1 for one in conversations if "<tool_call>" in one["output"])
    page = tmp_path / "report.html"
    write_report([run], page)
    assert "Tool tokens" in page.read_text()
