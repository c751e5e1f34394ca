"""A launch of verl's main_ppo becomes a recipe that composes; nothing of the launch is lost silently."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from verl_aqn.cli.convert import convert as command
from verl_aqn.config.compose import compose_verl, load_recipe
from verl_aqn.config.convert.recipe import STATUSES, convert
from verl_aqn.config.verl_keys import leaves
from verl_aqn.errors import ConfigError

LAUNCHES = Path(__file__).parents[2] / "launches"
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{block}" for block in ("actor", "rollout", "model"))


@pytest.fixture(scope="module")
def lora():
    return convert([str(LAUNCHES / "grpo_lora.sh"), "trainer.save_freq=7", "data.train_batch_size=128"], {})


def said(made, key):
    (one,) = [setting for setting in made.settings if setting.key == key]
    return one


@pytest.mark.parametrize(
    ("key", "status", "value"),
    [
        ("data.train_files", "kept", ["~/data/my set/train.parquet"]),
        ("data.max_prompt_length", "kept", 2048),
        ("data.train_batch_size", "ours", 128),  # the last value counts, and equals the one in base
        ("trainer.save_freq", "kept", 7),
        ("data.reward_fn_key", "ours", "data_source"),
        (f"{ACTOR}.optim.lr_warmup_steps_ratio", "kept", 0.05),
        (f"{ACTOR}.optim.lr_warmup_steps", "default", -1),  # base has 10, and with that the ratio would be ignored
        (f"{ACTOR}.use_dynamic_bsz", "default", False),
        ("reward.reward_manager.name", None, None),
        (f"{ROLLOUT}.agent.num_workers", None, None),  # base has as many as nodes need, and a CPU one
        ("algorithm.filter_groups.enable", "default", False),
        (f"{ACTOR}.grad_clip", "renamed", 0.5),
        (f"{ACTOR}.ppo_micro_batch_size", "renamed", 4),  # 16 over four devices
        (f"{ROLLOUT}.log_prob_micro_batch_size", "renamed", 8),
        ("custom_reward_function.path", "renamed", "rewards/mine.py"),
        ("reward_model.reward_kwargs.overlong_buffer_cfg.len", "renamed", 512),
        ("trainer.default_local_dir", "renamed", "checkpoints/lora"),
        (f"{MODEL}.use_liger", "refused", True),
        (f"{ACTOR}.fsdp_config.model_dtype", "refused", "bfloat16"),
        (f"{ACTOR}.strategy", "ours", "fsdp"),
        ("trainer.no_such_key", "refused", 1),
        (f"{ROLLOUT}.load_format", "ours", "dummy_dtensor"),
        ("actor_rollout_ref.ref.fsdp_config.param_offload", "ours", True),
        (f"{ROLLOUT}.max_num_seqs", "unknown", "$max_num_seqs"),
        ("trainer.experiment_name", "unknown", "lora-${stamp}"),
    ],
)
def test_what_becomes_of_each_setting(lora, key, status, value):
    if status is None:
        assert key not in [one.key for one in lora.settings]
        return
    one = said(lora, key)
    assert (one.status, one.value) == (status, value)
    assert one.why or status in ("kept", "renamed", "default")


def test_every_setting_of_the_launch_is_told_once(lora):
    text = (LAUNCHES / "grpo_lora.sh").read_text()
    lines = [line.strip(" +\\").partition("=")[0] for line in text.splitlines() if line.startswith("    ")]
    keys = {line for line in lines if "." in line and " " not in line and not line.startswith("#")}
    assert len(keys) > 30
    told = [one.key for one in lora.settings]
    assert keys - set(told) == set()
    assert len(told) == len(set(told))
    assert said(lora, "trainer.no_such_key").why.startswith("unknown key trainer.no_such_key")
    assert "line 44: max_num_seqs is set at line 12" in said(lora, f"{ROLLOUT}.max_num_seqs").why


def test_the_recipe_is_the_launch_and_verl_s_defaults(lora, tmp_path):
    (file := tmp_path / "lora.yaml").write_text(lora.recipe())
    with pytest.raises(
        ConfigError, match=r"lora\.yaml has no value for actor_rollout_ref\.rollout\.max_num_seqs \(\?\?\?\): set it"
    ):
        load_recipe(str(file), ["profile=cuda"])
    config = load_recipe(str(file), ["profile=cuda", f"{ROLLOUT}.max_num_seqs=64"])
    assert config.data.train_files == ["~/data/my set/train.parquet"]
    assert config.actor_rollout_ref.actor.optim.clip_grad == 0.5
    assert config.reward.custom_reward_function.path == "rewards/mine.py"
    assert config.aqn.run.dir == "checkpoints/lora"
    # For keys that the launch does not set, no value of ours that changes training remains.
    for key in (f"{ACTOR}.clip_ratio_high", f"{ACTOR}.optim.weight_decay", "algorithm.filter_groups.enable",
                "trainer.total_training_steps", "data.filter_overlong_prompts"):  # fmt: skip
        assert OmegaConf.select(config, key) == OmegaConf.select(OmegaConf.create(compose_verl()), key), key


def test_what_cannot_be_had_is_refused_by_name_and_the_rest_is_a_recipe(tmp_path):
    made = convert([str(LAUNCHES / "ppo_megatron.sh")], {})
    for key in ("algorithm.use_pf_ppo", f"{ACTOR}.megatron.tensor_model_parallel_size", f"{ROLLOUT}.name"):
        assert said(made, key).status == "refused", key
    assert "valid: vllm" in said(made, f"{ROLLOUT}.name").why
    assert [note.split(":")[0] for note in made.notes] == ["line 3", "the launch trains all weights"]
    assert said(made, "critic.model.path").status == "ours"
    assert said(made, "critic.model.fsdp_config.param_offload").to == "critic.fsdp.param_offload"
    recipe = yaml.safe_load(made.recipe())
    assert recipe["aqn"] == {"experiment": "none", "profile": "npu"}
    assert recipe["algorithm"]["adv_estimator"] == "gae"
    assert recipe["critic"]["optim"]["lr"] == 1e-5
    assert "device" not in recipe["trainer"]


def test_a_resolved_config_becomes_the_same_recipe(tmp_path):
    config = OmegaConf.create(compose_verl())
    said_there = {f"{ACTOR}.optim.lr": 3e-6, "data.train_batch_size": 64, f"{MODEL}.lora_rank": 16,
                  "algorithm.adv_estimator": "grpo", f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4,
                  f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4, f"{ROLLOUT}.name": "vllm",
                  "reward.reward_model.rollout.name": "vllm"}  # fmt: skip
    for key, value in said_there.items():
        OmegaConf.update(config, key, value)
    OmegaConf.resolve(config)
    (file := tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    words = [f"{key}={value}" for key, value in said_there.items()]
    one, other = convert([str(file)], {}), convert(["python3", "-m", "verl.trainer.main_ppo", *words], {})
    recipes = [dict(leaves(yaml.safe_load(made.recipe()))) for made in (one, other)]
    different = {key for key in recipes[0] | recipes[1] if recipes[0].get(key) != recipes[1].get(key)}
    assert different <= {"reward.reward_model.rollout.name", "critic.use_dynamic_bsz"}


def test_a_config_s_numbers_are_read_as_hydra_reads_them(tmp_path):
    (file := tmp_path / "config.yaml").write_text("actor_rollout_ref: {actor: {optim: {lr: 1e-6}}}")
    recipe = yaml.safe_load(convert([str(file)], {}).recipe())
    assert recipe["actor_rollout_ref"]["actor"]["optim"]["lr"] == 1e-6


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (["nothing.yaml"], "nothing.yaml does not exist"),
        (["twice.yaml"], "twice.yaml is not YAML: line 2: found duplicate key data"),
        (["nothing.sh"], "nothing.sh is neither a file nor a command with verl.trainer.main_ppo"),
        (["two.sh"], r"two.sh has 2 launches of verl.trainer.main_ppo \(lines 1, 2\)"),
        (["sft.sh"], r"sft.sh has no launch of verl.trainer.main_ppo \(it starts verl.trainer.sft_trainer\)"),
        (["ours.yaml"], "ours.yaml is already a config of verl-aqn"),
        (["list.yaml"], "is not a config of verl's main_ppo"),
        (["open.sh"], "not closed"),
    ],
)
def test_what_is_no_launch_is_refused(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = "python -m verl.trainer.main_ppo a.b=1\n"
    for name, text in {"twice.yaml": "data: {}\ndata: {}", "two.sh": launch * 2,
                       "sft.sh": "torchrun -m verl.trainer.sft_trainer x=1", "list.yaml": "[1]",
                       "ours.yaml": "actor_rollout_ref: {}\naqn: {}", "open.sh": launch + 'A="'}.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        convert(source, {})


def test_the_command_writes_a_new_file_and_tells_machines_all(tmp_path, capsys):
    out = tmp_path / "made.yaml"
    words = ["python3 -m verl.trainer.main_ppo algorithm.adv_estimator=rloo trainer.balance_batch=False"]
    command(words, out, True)
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"source", "counts", "notes", "settings", "recipe", "output"}
    assert set(told["counts"]) == set(STATUSES)
    assert out.read_text() == told["recipe"]
    (refused,) = [one for one in told["settings"] if one["status"] == "refused"]
    assert (refused["key"], refused["why"]) == ("trainer.balance_batch", "verl's V1 trainer always balances")
    with pytest.raises(ConfigError, match="exists already"):
        command(words, out, True)
    with pytest.raises(ConfigError, match=r"nowhere/made\.yaml cannot be written: No such file or directory: choose"):
        command(words, tmp_path / "nowhere/made.yaml", True)
    with pytest.raises(ConfigError, match=r"must end in \.yaml"):
        command(words, tmp_path / "made.yml", False)
