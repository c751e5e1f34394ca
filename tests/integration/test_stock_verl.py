"""verl's own `main_ppo` with `external_lib=verl_aqn.stock`: valid evidence, and detection of a lost adapter."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.integration.conftest import lines
from verl_aqn.bench import letters
from verl_aqn.cluster.process_environment import engine_environment, local_ray
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.report.evidence_section import checks
from verl_aqn.runs.report.page import write_report
from verl_aqn.runs.report.page_data import read_runs
from verl_aqn.tasks.word_problems import prepare_word_problems

STEPS = 2
# What stock verl needs on a CPU, and a task of a minute.
CPU = [
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "ray_kwargs.ray_init.num_cpus=32",
    "+ray_kwargs.ray_init.num_gpus=1",  # simulated
    "+ray_kwargs.ray_init.include_dashboard=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.actor.use_torch_compile=false",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
    "actor_rollout_ref.rollout.free_cache_engine=false",
    "+actor_rollout_ref.rollout.enable_sleep_mode=false",
    "actor_rollout_ref.rollout.enforce_eager=true",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.1",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
]
TASK = [
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.model.lora_alpha=32",  # a scaling of 4, which vLLM multiplies into B
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_model_len=256",
    "actor_rollout_ref.rollout.max_num_seqs=32",
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=2",
    "data.train_max_samples=16",
    "data.max_prompt_length=200",
    "data.max_response_length=8",
    "data.dataloader_num_workers=0",
    f"reward.custom_reward_function.path={letters.__file__}",
    "trainer.logger=[console]",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    f"trainer.total_training_steps={STEPS}",
]
OPTION = "actor_rollout_ref.model.external_lib=verl_aqn.stock"


@pytest.fixture(scope="module")
def main_ppo(tiny_model, tmp_path_factory):
    """`main_ppo(folder, *overrides)` → the result of verl's own command, started as a user of verl starts it."""
    data = tmp_path_factory.mktemp("data")
    files = prepare_word_problems(data, 16, 4)

    def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
        places = [
            f"actor_rollout_ref.model.path={tiny_model}",
            f"data.train_files={files['train']}",
            f"data.val_files={files['test']}",
            f"trainer.default_local_dir={folder}/checkpoints",
        ]
        with tempfile.TemporaryDirectory(prefix="aqn-", dir="/tmp") as temporary:
            env = engine_environment(temporary, cpu=True, ranks=1) | local_ray(temporary)
            env.pop("VERL_AQN_EVIDENCE", None)
            env["PYTHONPATH"] = str(Path(__file__).parents[2])  # for workers that lose adapters
            command = [sys.executable, "-m", "verl.trainer.main_ppo", *CPU, *TASK, *places, *overrides]
            return subprocess.run(
                command, env=env, cwd=folder, capture_output=True, text=True, timeout=600, check=False
            )

    return run


def run_in(folder: Path) -> RunFolder:
    (path,) = folder.glob("verl_aqn_evidence/*/runs/[!.]*")  # where the command was started
    return RunFolder(path)


def rows(run: RunFolder) -> dict[str, tuple[bool | None, str]]:
    """Return the report's table of evidence: (verdict, text) by row."""
    table = checks(read_runs([run.path]))
    return {row[0].text: (row[1].good, row[1].text) for row in table.rows}


def test_a_stock_run_is_proved(main_ppo, tmp_path):
    result = main_ppo(tmp_path, OPTION)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    run = run_in(tmp_path)
    assert run.state["status"] == "finished"
    assert judge_run(run).faults == []
    told = rows(run)
    assert {name for name, (good, _) in told.items() if good is True} == set(told)
    evidence = lines(run.path / "evidence.jsonl")
    adapters = [one for one in evidence if one["kind"] == "adapter"]
    assert [one["step"] for one in adapters] == [0, 1, 2]
    assert len({one["sent"] for one in adapters}) == 3  # it was trained, and each version reached the rollout
    assert adapters[0]["actual"][0]["b_max"] == 0 < adapters[1]["actual"][0]["b_max"]
    assert [one["requests"] for one in adapters] == [{"with": n, "without": 0} for n in (0, 8, 8)]
    mismatches = [one for one in evidence if one["kind"] == "mismatch"]
    assert all(one["source"] == "sampled" and one["abs_dlogp_mean"] < 0.1 for one in mismatches)
    (use,) = [one for one in evidence if one["kind"] == "adapter use"]
    assert use["to_base"] > 2 * use["to_adapter"]  # the rollout answers with the adapter
    assert {one["when"] for one in evidence if one["kind"] == "base"} == {"start", "end"}
    assert "rollout.load_format=safetensors instead of dummy" in result.stdout
    assert "evidence valid" in result.stdout
    assert write_report([run.path], tmp_path / "page.html")


def losing(name: str) -> str:
    """Return the override for a vLLM worker that loses adapters."""
    worker = f"tests.helpers.verl_aqn_stock_faults.{name}"
    return f"+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls={worker}"


def test_an_adapter_that_does_not_arrive_stops_the_run(main_ppo, tmp_path):
    result = main_ppo(tmp_path, OPTION, losing("SwallowsAll"))
    assert result.returncode != 0
    run = run_in(tmp_path)
    fault = "at the start the adapter is not in the rollout (rank 0): the rollout has no adapter"
    assert fault in result.stderr
    assert run.state["status"] == "failed"
    assert fault in run.state["message"]
    assert lines(run.path / "metrics.jsonl") == []  # nothing was learned
    good, text = rows(run)["adapter in the rollout"]
    assert good is False
    assert fault in text


def test_a_run_told_to_warn_goes_on_and_every_check_sees_the_base_model_answer(main_ppo, tmp_path):
    result = main_ppo(tmp_path, OPTION, losing("SwallowsUpdates"), "+verl_aqn.on_fault=warn")
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "evidence NOT valid" in result.stdout
    run = run_in(tmp_path)
    assert run.state["status"] == "finished"
    told = rows(run)
    assert {name for name, (good, _) in told.items() if good is False} == {
        "adapter in the rollout", "adapter in the rollout's forward pass", "adapter in the last requests",
        "trainer and rollout without noise",
    }  # fmt: skip
    assert "after step 1 the rollout does not list the adapter" in told["adapter in the rollout"][1]
    assert "step 2: the rollout responds like the base model" in told["adapter in the rollout's forward pass"][1]
    adapters = [one for one in lines(run.path / "evidence.jsonl") if one["kind"] == "adapter"]
    assert [one["requests"] for one in adapters] == [
        {"with": 0, "without": 0}, {"with": 8, "without": 0}, {"with": 0, "without": 8},
    ]  # fmt: skip
