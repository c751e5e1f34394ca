"""`verl-aqn bench step`: the evaluation of its runs' metrics. The runs themselves take minutes and are not here."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from rich.console import Console

from verl_aqn.bench import arm_processes, step
from verl_aqn.bench.step import ARMS, Arm, add_evidence, overrides, seconds, stock_config, summary, table
from verl_aqn.cli import bench
from verl_aqn.errors import EnvironmentFault

STEP = {
    "timing_s/gen": 2.0,
    "timing_s/old_log_prob": 1.0,
    "timing_s/update_actor": 3.0,
    "timing_s/update_weights": 0.5,
    "timing_s/step": 7.0,
    "timing_s/testing": 2.0,
    "perf/total_num_tokens": 700,
}


def arm(factor: int) -> Arm:
    steps = [{key: value * n * factor for key, value in seconds(STEP).items()} for n in (1, 2, 9)]
    for one in steps:
        one["tokens"] = 700
    peak = {"actor": 10**9, "rollout": 2 * 10**9, "all": 4 * 10**9}
    return Arm(steps=steps, start_s=40 * factor, synced=10**7 * factor, peak=peak)


def test_our_arm_is_the_command(tmp_path):
    module, arguments, env = step.command("ours", [], tmp_path, str(tmp_path))
    called = [sys.executable, "-m", module, arguments[0], "--help"]
    told = subprocess.run(called, capture_output=True, text=True, env=env, check=False)
    assert told.returncode == 0
    assert "Usage" in told.stdout


def test_an_arm_that_ends_well_without_a_run_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "command", lambda *_: ("json.scanner", [], dict(os.environ)))  # does nothing
    with pytest.raises(EnvironmentFault, match="ours ended with 0 runs"):
        step.run_arm("ours", [], tmp_path, lambda: None)


WAITING = """
import os, subprocess, sys, time
child = "import setproctitle, time; setproctitle.setproctitle('ray::WorkerDict'); time.sleep(3)"
subprocess.run([sys.executable, "-c", child])
time.sleep(float(os.environ["MORE_S"]))
"""


def test_an_arm_whose_actor_died_is_an_error_and_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(WAITING)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MORE_S": "600"}
    monkeypatch.setattr(step, "command", lambda *_: ("waiting", [], env))
    monkeypatch.setattr(arm_processes, "ALONE_S", 1)
    with pytest.raises(
        EnvironmentFault, match=r"bench step: stock, see .*log.txt: the run's actor \(process \d+\) ended"
    ):
        step.run_arm("stock", [], tmp_path, lambda: None)
    assert not psutil.Process().children(recursive=True)


def test_an_arm_may_end_after_its_actor(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(WAITING)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MORE_S": "2"}
    monkeypatch.setattr(step, "command", lambda *_: ("waiting", [], env))
    with pytest.raises(EnvironmentFault, match="ours ended with 0 runs"):
        step.run_arm("ours", [], tmp_path, lambda: None)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> list[str]:
    from verl_aqn.tasks.smollm2 import tiny_model

    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    return overrides(str(tiny_model(tmp_path / "tiny")), 2, small=True)


def test_our_figures_stay_where_stock_s_run_fails(settings, tmp_path, monkeypatch, capsys):
    """Stock verl may need more memory than the machine has. What our own run measured is not lost."""
    runs = []

    def run_arm(name, *_):
        runs.append(name)
        if name == "stock tuned":
            raise EnvironmentFault("bench step: stock tuned ended with exit code 1: see log.txt")
        return arm(1)

    monkeypatch.setattr(step, "run_arm", run_arm)
    result = step.measure(settings, 2, 2, tmp_path / "runs", lambda _: None)
    assert runs == ["ours", "stock tuned", "stock", "ours", "stock"]
    assert [*result["arms"]] == ["ours", "stock"]
    assert [*result["ours_of"]] == ["stock"]
    assert result["failed"] == {"stock tuned": "bench step: stock tuned ended with exit code 1: see log.txt"}
    Console(width=120).print(table(result))
    assert "1.00" in capsys.readouterr().out

    made = []
    monkeypatch.setattr(bench.tempfile, "mkdtemp", lambda **_: made.append(tmp_path / "kept") or str(made[0]))
    monkeypatch.setattr(step, "check", lambda _: None)
    with pytest.raises(EnvironmentFault, match="stock tuned ended with exit code 1"):
        bench.step(steps=2, rounds=1, model=settings[2].partition("=")[2], small=True)
    assert "generation, s" in capsys.readouterr().out
    assert made[0].exists(), "it has the log"


def test_a_failure_of_our_own_run_is_an_error(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "command", lambda *_: ("json.scanner", [], dict(os.environ)))
    with pytest.raises(EnvironmentFault, match="ours ended with 0 runs"):
        step.measure(settings, 2, 1, tmp_path / "runs", lambda _: None)


def test_validation_is_no_part_of_a_step():
    assert seconds(STEP) == {
        "generation": 2.0, "log-probs": 1.0, "update": 3.0, "sync": 0.5, "step": 7.0, "tokens": 700,
    }  # fmt: skip


def test_what_is_scored_again_is_no_generation():
    found = seconds(STEP | {"timing_s/rescore": 0.5})
    assert (found["generation"], found["rescoring"], found["step"]) == (1.5, 0.5, 7.0)


def test_noise_and_evidence_are_what_is_before_generation_and_of_the_sync_not_verl_s(tmp_path):
    doing = [("noise", 1, 0), ("generation", 1, 1), ("sync", 1, 5), ("noise", 2, 6), ("generation", 2, 6.25)]
    doing += [("sync", 2, 10), ("ending", 3, 10.75)]
    events = [{"kind": "doing", "phase": phase, "step": step, "time": at} for phase, step, at in doing]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, [{"kind": "phase"}, *events])))
    of_run = Arm(steps=[seconds(STEP)])
    add_evidence(of_run, tmp_path / "events.jsonl")
    assert of_run.steps[0]["noise and evidence"] == pytest.approx(0.25 + 0.75 - 0.5)


def test_medians_over_all_steps_of_all_runs():
    found = summary([arm(1), arm(1)])
    assert (found["generation"], found["step"], found["start"]) == (4.0, 14.0, 40)
    assert found["tokens/s"] == pytest.approx(50.0)
    assert (found["synced"], found["memory: all"]) == (10**7, 4 * 10**9)


def test_the_table_has_ours_of_each_other_arm():
    arms = {"ours": summary([arm(1)]), "stock tuned": summary([arm(2)]), "stock": summary([arm(4)])}
    ours = {name: {key: arms["ours"][key] / value for key, value in arms[name].items()} for name in ARMS[1:]}
    result = {"device": "a CPU", "cores": 2, "model": "m", "steps": 3, "arms": arms, "ours_of": ours}
    console = Console(width=120, record=True)
    console.print(table(result))
    lines = console.export_text().splitlines()
    for label, figures in {
        "generation, s": ["4.00", "8.00", "16.00", "0.50", "0.25"],
        "bytes synced, MB": ["10.0", "20.0", "40.0", "0.50", "0.25"],
    }.items():
        (row,) = [line for line in lines if label in line]
        assert [word for word in row.split() if word[0].isdigit()] == figures


def test_stock_s_config_has_the_task_and_nothing_of_ours(settings, tmp_path):
    tuned, plain = stock_config(settings, tuned=True), stock_config(settings, tuned=False)
    for config in (tuned, plain):
        assert "aqn" not in config
        model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
        assert model.path == str(tmp_path / "tiny")  # in bf16
        assert model.override_config == {"attn_implementation": "sdpa"}
        assert rollout.ignore_eos
        assert (config.trainer.total_training_steps, config.data.train_batch_size, rollout.n) == (3, 2, 4)
        assert "worker_extension_cls" not in rollout.engine_kwargs.vllm
        assert "quantization" not in rollout.engine_kwargs.vllm
    rollouts = [config.actor_rollout_ref.rollout for config in (tuned, plain)]
    assert [rollout.agent.num_workers for rollout in rollouts] == [1, 8]
    assert [rollout.engine_kwargs.vllm for rollout in rollouts] == [{"block_size": 32}, {}]
