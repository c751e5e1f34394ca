"""No setting is ignored silently: a recipe's or override's value is used, or rejected by name."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from verl_aqn.config.allowed import check_names
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.verl_keys import check_keys, rules
from verl_aqn.errors import ConfigError
from verl_aqn.evaluation.evaluate import with_overrides

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{block}" for block in ("actor", "rollout", "model"))


@pytest.fixture(scope="module")
def composed():
    config = load_recipe("e12", ["profile=cpu"])
    OmegaConf.set_struct(config, False)
    return config


def check(composed, overrides):
    """Check as `load_recipe` does, which takes a second each time."""
    config = composed.copy()
    for key, value in (override.lstrip("+").split("=", 1) for override in overrides):
        OmegaConf.update(config, key, yaml.safe_load(value))
    check_names(config)
    check_keys(config, OmegaConf.to_container(composed))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.default_local_dir=/data/me"], "trainer.default_local_dir=/data/me: checkpoints are in the run's"),
        (["trainer.validation_data_dir=here"], "set aqn.run.dir"),
        (["trainer.max_critic_ckpt_to_keep=5"], "set trainer.max_actor_ckpt_to_keep"),
        (["trainer.default_hdfs_dir=hdfs://x"], "never writes there"),
        (["trainer.device=npu"], "set profile=cpu, cuda or npu"),
        (["critic.model.path=/my/critic"], "set actor_rollout_ref.model.path"),
        (["trainer.use_v1=false"], "trainer.use_v1=false: noise and evidence need verl's V1 trainer"),
        (["+actor_rollout_ref.rollout.agent.agent_loop_manager_class=my.Manager"], "request seeds and the record"),
        (["actor_rollout_ref.model.external_lib=mine"], "registers the engine"),
        ([f"{MODEL}.use_liger=true"], "its kernels do not support packed layers"),
        ([f"{MODEL}.use_fused_kernels=true"], "its kernels do not support packed layers"),
        ([f"{MODEL}.use_liger=true", "aqn.mxfp4.enabled=false"], "set aqn.noise.enabled=false too"),
        ([f"{ACTOR}.use_fused_kernels=true"], f"set {MODEL}.use_fused_kernels"),
        ([f"{ACTOR}.strategy=fsdp"], f"{ACTOR}.strategy=fsdp: only FSDP2 shards packed weights"),
        (["critic.strategy=fsdp"], "critic.strategy=fsdp: only FSDP2"),
        ([f"{ACTOR}.fsdp_config.dtype=float16"], "layers compute in bfloat16"),
        ([f"{ROLLOUT}.dtype=float16"], "layers compute in bfloat16"),
        ([f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16"], "gradient scaler"),
        ([f"{ACTOR}.fsdp_config.model_dtype=bfloat16"], "fp32 master weights"),
        ([f"{ACTOR}.fsdp_config.qat.enable=true"], "quantised by aqn.mxfp4"),
        ([f"{ACTOR}.qat.enable=true"], "quantised by aqn.mxfp4"),
        ([f"{ROLLOUT}.quantization=fp8"], "aqn.mxfp4 decides the rollout's weight format"),
        ([f"{ROLLOUT}.name=sglang"], "has 'sglang': valid: vllm"),
        ([f"+{ROLLOUT}.engine_kwargs.sglang.mem=1"], "the only rollout is vLLM"),
        ([f"{ACTOR}.strategy=megatron"], "valid: fsdp, fsdp2"),
        ([f"+{ACTOR}.megatron.tensor_model_parallel_size=2"], "only verl's FSDP engine"),
        (["actor_rollout_ref.ref.fsdp_config.param_offload=true"], "the reference policy is the actor without"),
        ([f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"], "not read if use_dynamic_bsz=true"),
        ([f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4"], "not read if log_prob_use_dynamic_bsz=true"),
        (["critic.forward_micro_batch_size_per_gpu=4"], "or ppo_max_token_len_per_gpu instead"),
        (["critic.forward_max_token_len_per_gpu=512"], "one limit for updates and values, set ppo_max_token_len"),
        (["+critic.ppo_infer_max_token_len_per_gpu=512"], "copies critic.ppo_max_token_len_per_gpu"),
        (["critic.forward_micro_batch_size=4"], "set forward_micro_batch_size_per_gpu"),
        (["+critic.fsdp.use_dynamic_bsz=false"], "copies a setting of the block above"),
        ([f"{ACTOR}.rollout_n=3"], f"set {ROLLOUT}.n"),
        ([f"{ACTOR}.calculate_sum_pi_squared=true"], "V1 trainer does not read it"),
        ([f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"], "not read if lr_warmup_steps"),
        ([f"{ACTOR}.grad_clip=0.5"], "set optim.clip_grad"),
        ([f"{MODEL}.override_config.rope_theta=1.0"], "built from the config in its folder"),
        (["trainer.val_only=true", "trainer.val_before_train=false"], "would train"),
        (["trainer.resume_mode=never"], "valid: auto, disable, resume_path"),
        (["trainer.balance_batch=false"], "always balances"),
        (["trainer.v1.separate_async.parameter_sync_step=2"], "only trainer.v1.trainer_mode=sync"),
        (["trainer.v1.sampler.max_off_policy_threshold=2"], "every step is on-policy"),
        (["trainer.v1.sampler.max_off_policy_strategy=wait"], "every step is on-policy"),
        (["+trainer.v1.sampler.sampler_kwargs.a=1"], "its arguments are not read"),
        (["reward.sandbox_fusion.url=http://a"], "set reward.custom_reward_function.path=null too"),
        (["reward.reward_manager.module.path=mine.py"], "if reward.reward_manager.source=importlib"),
        ([f"{ACTOR}.checkpoint.async_save=true"], "FSDP engine does not read it"),
        (["critic.fsdp.entropy_checkpointing=true"], "a critic computes no entropy"),
        (["reward_model.reward_manager=dapo"], "set reward.reward_manager.name"),
        (["custom_reward_function.path=x.py"], "set reward.custom_reward_function"),
        (["data.reward_fn_key=source"], "rename yours"),
        (["data.truncation=right"], "can only cut off the beginning of a long prompt, set left"),
        ([f"{ACTOR}.ppo_micro_batch_size=4"], "verl does not read it, set ppo_micro_batch_size_per_gpu"),
        (["critic.ppo_micro_batch_size=4"], "not read if use_dynamic_bsz=true"),
        ([f"{ROLLOUT}.log_prob_micro_batch_size=4"], "set log_prob_micro_batch_size_per_gpu"),
        ([f"{ACTOR}.use_torch_compile=true"], f"set {ACTOR}.fsdp_config.use_torch_compile"),
        ([f"{ACTOR}.use_remove_padding=true"], f"set {MODEL}.use_remove_padding"),
        (["critic.ulysses_sequence_parallel_size=2"], "set critic.fsdp.ulysses_sequence_parallel_size"),
        ([f"{ACTOR}.checkpoint.strict=false"], "FSDP engine does not read it"),
        ([f"{ACTOR}.fsdp_config.wrap_policy.min_num_params=9"], "FSDP2 does not read it"),
        (["critic.fsdp.use_orig_params=true"], "FSDP2 does not read it"),
        (["aqn.mxfp4.enabled=false", f"{ACTOR}.strategy=fsdp", f"{ACTOR}.fsdp_config.offload_policy=true"],
         f"only FSDP2 reads it, set {ACTOR}.strategy=fsdp2"),
        (["reward.reward_model.rollout.multi_stage_wake_up=true"], "reward model does not read it"),
        (["global_profiler.global_tool_config.torch_memory.stacks=python"], "verl does not read it"),
        (["global_profiler.global_tool_config.precision_debugger.steps=[1]"], "set global_profiler.steps"),
        (["data.trust_remote_code=true"], f"set {MODEL}.trust_remote_code"),
        (["skip.rollout.enable=true"], "noise cannot be proved for responses"),
        (["distillation.enabled=true"], "a teacher's engine"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused_by_name(composed, overrides, words):
    with pytest.raises(ConfigError) as error:
        check(composed, overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.use_v1=false", "trainer.use_v1=false: noise and evidence need verl's V1 trainer"),
        (f"+{ROLLOUT}.agent.agent_loop_manager_class=my.Manager", "request seeds and the record"),
        (f"{ACTOR}.megatron.tensor_model_parallel_size=2", f"unknown key {ACTOR}.megatron: only verl's FSDP engine"),
        ("model_engine=megatron", "only verl's FSDP engine (dp) supports a packed base"),
    ],
)
def test_an_override_is_refused_before_any_work(override, words):
    with pytest.raises(ConfigError) as error:
        load_recipe("e12", ["profile=cpu", override])
    assert words in str(error.value)


def test_an_override_of_a_recorded_run_is_refused_too(composed):
    config = composed.copy()
    OmegaConf.resolve(config)
    with_overrides(config.copy(), ["data.val_max_samples=3"])
    with pytest.raises(ConfigError, match=r"set aqn\.run\.dir"):
        with_overrides(config, ["trainer.validation_data_dir=here"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["aqn.mxfp4.enabled=false", "aqn.noise.enabled=false", f"{MODEL}.use_liger=true", f"{ACTOR}.strategy=fsdp"],
        [f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
         f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4"],
        [f"{ACTOR}.optim.lr_warmup_steps=-1", f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"],
        ["trainer.val_only=true", "trainer.rollout_data_dir=answers", "trainer.checkpoint_callback_class=a.B"],
        [f"{MODEL}.lora_rank=0", "aqn.mxfp4.enabled=false", "actor_rollout_ref.ref.fsdp_config.param_offload=true"],
        [f"+{ROLLOUT}.agent.agent_loop_manager_class=null", "trainer.use_v1=true", "trainer.device=cpu"],
        ["reward.sandbox_fusion.url=http://a", "reward.custom_reward_function.path=null"],
        ["reward.reward_manager.module.path=mine.py", "reward.reward_manager.source=importlib"],
        [f"{ACTOR}.rollout_n=5", f"{ROLLOUT}.n=5"],
        ["data.trust_remote_code=true", f"{MODEL}.trust_remote_code=true"],
        [f"{ACTOR}.use_torch_compile=true", f"{ACTOR}.fsdp_config.use_torch_compile=true"],
        ["aqn.mxfp4.enabled=false", f"{ACTOR}.strategy=fsdp", f"{ACTOR}.fsdp_config.wrap_policy.min_num_params=9"],
        ["critic.ppo_max_token_len_per_gpu=512", "critic.forward_max_token_len_per_gpu=512"],
        ["+trainer.my_own=1", f"+{ROLLOUT}.engine_kwargs.vllm.max_logprobs=3"],
    ],
)  # fmt: skip
def test_what_works_is_taken(composed, overrides):
    check(composed, overrides)


def test_the_examples_of_the_docs_are_true():
    text = (Path(__file__).parents[3] / "docs/config_keys.md").read_text()
    examples = re.findall(r"^\$ verl-aqn train (\w+) (\S+)\nerror: (.+)$", text, re.MULTILINE)
    assert len(examples) == 2
    for recipe, override, line in examples:
        with pytest.raises(ConfigError) as error:
            load_recipe(recipe, ["profile=cpu", override])
        assert str(error.value) == line


def test_no_shipped_setting_is_refused():
    config = load_recipe("ppo", ["profile=npu", "correction=tis"])
    check_keys(config, OmegaConf.to_container(config))


def test_messages_are_one_plain_line():
    for rule in rules():
        assert "\n" not in rule.reason
        assert not rule.reason.endswith(".")


def test_a_recipe_s_own_file_goes_over_profile_and_experiment(tmp_path):
    (file := tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\n"
        "actor_rollout_ref: {model: {path: /my/model}}\n"
        "data: {train_files: /my/train.parquet, train_batch_size: 77}\n"
    )
    (tmp_path / "more.yaml").write_text("defaults: [mine, _self_]\ndata: {train_batch_size: 78}\n")
    for profile in ("cpu", "cuda"):
        config = load_recipe(str(file), [f"profile={profile}"])
        assert config.actor_rollout_ref.model.path == "/my/model"
        assert (config.data.train_files, config.data.train_batch_size) == ("/my/train.parquet", 77)
    assert load_recipe(str(tmp_path / "more.yaml"), ["profile=cpu"]).data.train_batch_size == 78
    assert load_recipe(str(file), ["profile=cpu", "data.train_batch_size=6"]).data.train_batch_size == 6
    # A chosen correction overrides the recipe.
    assert load_recipe(str(file), ["profile=cpu", "correction=tis"]).algorithm.rollout_correction.rollout_is == "token"


def test_a_recipe_s_file_may_name_its_experiment(tmp_path):
    (file := tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\naqn: {experiment: none}\n")
    config = load_recipe(str(file), ["profile=cpu"])
    assert config.actor_rollout_ref.rollout.max_model_len is None
    assert config.data.train_files.endswith("gsm8k/train.parquet")  # verl's own default
    assert "experiment" not in config.aqn  # all of its values are in the config
    assert load_recipe(str(file), ["profile=cpu", "experiment=embedded"]).data.train_files == "embedded"
    assert load_recipe("e12", ["profile=cpu", "experiment=none"]).data.train_batch_size == 128
