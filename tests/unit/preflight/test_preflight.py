"""Checks before a run: each fault is found and reported in one line that says what to do."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight import recipe_checks as checks
from verl_aqn.preflight.node import PACKAGES, Node, free_disk
from verl_aqn.preflight.shape import Shape
from verl_aqn.runs import host

VAL = "actor_rollout_ref.rollout.val_kwargs"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from verl_aqn.tasks.smollm2 import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shape() -> Shape:
    """The shape of `tiny_model`: two layers of 64 features, two heads, embedding and head of SmolLM2's vocabulary."""
    layer, outside = 4 * 64 * 64 + 3 * 64 * 128, 2 * 49152 * 64
    return Shape(
        layers=2, hidden=64, query=64, key_value=64, heads=2, key_value_heads=2, inner=128, experts=0, vocabulary=49152,
        head_norms=False, linears=2 * layer, kept=outside + 5 * 64, root=outside + 64, norms=5 * 64,
        layer_linears=layer, layer_kept=2 * 64, largest=64 * 128, adapted=2 * (4 * 128 + 3 * 192), bare_head=True,
    )  # fmt: skip


def test_the_shape_of_these_tests_is_the_tiny_model_s(model, shape):
    from verl_aqn.preflight.sizing import shape_of

    assert shape_of(model, ("lm_head", "embed_tokens")) == shape


def config(*overrides: str, profile: str = "cpu"):
    return load_recipe("e12_aggressive_1ep", [f"profile={profile}", *overrides])


def faults(findings) -> dict[str, str]:
    return {finding.what: finding.fix for finding in findings if finding.fix}


def test_a_shipped_recipe_has_no_fault(shape):
    assert not faults(checks.check_recipe(config()))
    assert not faults([checks.check_schedule(config())])
    assert not faults(checks.check_heads(config(), shape))


VARIABLES = "ray_kwargs.ray_init.runtime_env.env_vars"


@pytest.mark.parametrize(
    ("overrides", "what", "words"),
    [
        (["actor_rollout_ref.model.lora_rank=513"], "LoRA rank", "lora_rank to 1 to 512"),
        (["actor_rollout_ref.model.lora_rank=0"], "LoRA rank", "lora_rank to 1 to 512"),
        (["trainer.n_gpus_per_node=5"], "actor's batches", "48 responses are not divisible by 5 ranks"),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=12"], "actor's batches", "at most 6"),
        (
            ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=3"],
            "rollout's ranks",
            "divisor of 2",
        ),
        ([f"{VAL}.n=4"], "validation's responses", "would be the same"),
        ([f"{VAL}.n=4", f"{VAL}.do_sample=true"], "validation's responses", "temperature=0 and do_sample=false"),
        ([f"{VAL}.temperature=0.7"], "validation's responses", f"set {VAL}.do_sample=true"),
        ([f"+{VARIABLES}.WANDB_API_KEY=x"], "workers' environment", "export WANDB_API_KEY before the command"),
        ([f"+{VARIABLES}.my_token=x"], "workers' environment", f"remove {VARIABLES}.my_token"),
    ],
)
def test_faults_of_a_recipe(overrides, what, words):
    assert words in faults(checks.check_recipe(config(*overrides)))[what]


def test_a_variable_about_tokenizers_holds_no_secret():
    assert not faults(checks.check_recipe(config(f"+{VARIABLES}.TOKENIZERS_PARALLELISM='false'")))


def test_sampled_answers_to_a_problem_are_no_fault():
    several = (f"{VAL}.n=4", f"{VAL}.do_sample=true", f"{VAL}.temperature=0.7")
    assert not faults(checks.check_recipe(config(*several)))


def test_a_critic_s_batches_are_checked_where_there_is_one():
    overrides = ["profile=cpu", "critic.ppo_mini_batch_size=7"]
    assert not faults(checks.check_recipe(load_recipe("grpo", overrides)))
    assert (
        "critic.ppo_mini_batch_size" in faults(checks.check_recipe(load_recipe("ppo", overrides)))["critic's batches"]
    )


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = checks.check_ports(config(f"+ray_kwargs.ray_init.dashboard_port={port}"))
        assert (finding.found, finding.fix) == ("in use", "choose another ray_kwargs.ray_init.dashboard_port")
    assert not list(checks.check_ports(config()))


def test_shared_memory_and_disk(shape):
    recipe = config(
        "trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=512"
    )
    need = 2 * 512 * 2**20
    found = faults(checks.check_storage(recipe, shape, need - 1, 10**9, ""))
    assert "--shm-size" in found["/dev/shm"]
    assert not faults(checks.check_storage(recipe, shape, need, 10**9, ""))
    one = 12 * 32 * shape.adapted  # fp32 adapter and two moments; two are kept and one is being written
    assert faults(checks.check_storage(recipe, shape, need, 3 * one - 1, "")).keys() == {"disk"}
    assert not faults(checks.check_storage(recipe, shape, need, 3 * one, ""))
    assert "/dev/shm" not in {f.what for f in checks.check_storage(config(profile="cuda"), shape, 0, 10**12, "")}


def test_disk_is_that_of_the_folder_that_will_be(tmp_path):
    assert free_disk(tmp_path / "not" / "there" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.01)


def test_devices():
    assert not checks.check_devices(config("trainer.n_gpus_per_node=2"), 0).fix  # simulated
    on_cuda = config("trainer.n_gpus_per_node=8", profile="cuda")
    assert "no cuda device was found" in checks.check_devices(on_cuda, 0).fix
    assert checks.check_devices(on_cuda, 4).fix == "set trainer.n_gpus_per_node to at most 4"
    assert not checks.check_devices(on_cuda, 8).fix


def test_attention_heads_are_shared_out_evenly(shape):
    recipe = config("trainer.n_gpus_per_node=4", "actor_rollout_ref.rollout.tensor_model_parallel_size=4")
    assert shape.heads == 2
    assert "one of 1, 2, not 4" in faults(checks.check_heads(recipe, shape))["attention heads"]


def test_heads_of_keys_and_values_are_shared_out_or_had_by_several_ranks(shape):
    """vLLM's attention layers assert the same (`LlamaAttention`)."""
    grouped = replace(shape, heads=32, key_value_heads=8, key_value=8 * 128)
    assert [parts for parts in range(1, 33) if grouped.divides_heads(parts)] == [1, 2, 4, 8, 16, 32]
    assert [grouped.key_value_of_rank(parts) for parts in (1, 4, 8, 16, 32)] == [1024, 256, 128, 128, 128]
    odd = replace(shape, heads=24, key_value_heads=6, key_value=6 * 64)
    assert [parts for parts in range(1, 25) if odd.divides_heads(parts)] == [1, 2, 3, 6, 12, 24]
    recipe = config("trainer.n_gpus_per_node=8", "actor_rollout_ref.rollout.tensor_model_parallel_size=8")
    assert "one of 1, 2, 3, 6, 12, 24, not 8" in faults(checks.check_heads(recipe, odd))["attention heads"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert not faults(checks.check_places(config(f"aqn.run.dir={tmp_path / 'new' / 'run'}")))
    below = config(f"aqn.run.dir={tmp_path / 'file' / 'run'}")
    assert "aqn.run.dir" in faults(checks.check_places(below))["run's folder"]
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "file" / "cache"))
    assert "VERL_AQN_CACHE" in faults(checks.check_places(config()))["cache"]


def test_a_schedule_that_the_data_do_not_last_for():
    assert "give 2 steps" in checks.check_schedule(config("data.train_max_samples=16")).fix
    assert "is not on disk" in checks.check_schedule(config("data.train_files=/nowhere.parquet")).found


def test_memory_is_judged_by_the_recipe_at_hand(shape):
    """A tiny model needs less than the embedded one; PPO needs more than GRPO."""
    (enough,) = checks.check_memory(config(), shape, 11 * 10**9, [])
    assert not enough.fix
    (little,) = checks.check_memory(config(), shape, 5 * 10**9, [])
    assert "5.0 GB of memory are free, the run of embedded needs" in little.found
    (small,) = checks.check_memory(config(profile="cuda"), shape, 0, [80 * 10**9])
    assert not small.fix
    assert "sequence(s) of" in small.found


def test_refusal_names_the_first_fault(model, monkeypatch):
    there = f"actor_rollout_ref.model.path={model}"
    monkeypatch.setattr(host, "memory", lambda: host.Memory(20 * 10**9, 20 * 10**9))
    checks.check_request(config(there))
    checks.check_machine(config(there))
    with pytest.raises(EnvironmentFault, match=r"LoRA rank: 600.*set actor_rollout_ref.model.lora_rank"):
        checks.check_request(config(there, "actor_rollout_ref.model.lora_rank=600"))
    monkeypatch.setattr(host, "memory", lambda: host.Memory(20 * 10**9, 10**9))
    with pytest.raises(EnvironmentFault, match=r"1\.\d GB of memory are free"):
        checks.check_machine(config(there))


def node(**changes) -> Node:
    facts = {
        "host": "a", "python": "3.11.8", "versions": dict.fromkeys(PACKAGES, "1"), "memory": 1,
        "shared_memory": 1, "disk": 1, "devices": [], "plugins": {"verl plugin": "verl 0.9.1"},
    }  # fmt: skip
    return Node(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "what", "words"),
    [
        ({"versions": dict.fromkeys(PACKAGES, "2")}, "torch of b", "a has 1"),
        ({"versions": {}}, "vllm of b", "setup.sh"),
        ({"python": "3.12.1"}, "Python of b", "a has 3.11.8"),
        ({"skew": -3.0, "doubt": 0.1}, "clock of b", "set its clock"),
        (
            {"plugins": {"verl plugin": "No module named verl"}, "missing": ["verl plugin"]},
            "verl plugin of b",
            "setup.sh",
        ),
    ],
)
def test_a_node_that_differs(changes, what, words):
    other = node(host="b", **changes)
    assert not faults(checks.check_node(node(host="b"), node(), " of b"))
    assert words in faults(checks.check_node(other, node(), " of b"))[what]


def test_a_slow_answer_is_no_wrong_clock():
    assert not faults(checks.check_node(node(host="b", skew=3.0, doubt=2.5), node(), " of b"))


def test_a_model_of_nothing_but_its_config_is_planned_for(model, tmp_path, capsys):
    from verl_aqn.cli.main import doctor as command

    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    overrides = ["profile=cuda", f"actor_rollout_ref.model.path={tmp_path}"]
    with pytest.raises(typer.Exit) as ended:
        command("grpo", overrides, plan=True, as_json=True)
    assert ended.value.exit_code == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["device_bytes"] for row in report["plan"]] == [int(g * 1e9) for g in (24, 32, 64, 80, 141)]
    assert all(row["devices"] == 1 and not row["fault"] for row in report["plan"])
