"""Contradictory settings are rejected before anything runs, by the names of their keys."""

import pytest

from tests.helpers.composed import recipe_with
from verl_aqn.config.allowed import check_names
from verl_aqn.config.compose import load_recipe, recipe_names
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.launch.train import train
from verl_aqn.preflight.doctor import examine
from verl_aqn.preflight.engine_settings import check_engine
from verl_aqn.preflight.settings import check_settings, uses_critic

ACTOR, ROLLOUT, CRITIC = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "critic"
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"
PROMPT, RESPONSE = "data.max_prompt_length", "data.max_response_length"


def fault(recipe: str, *overrides: str, positions: int | None = 8192) -> str:
    """Return the first fault, as `--dry-run` shows it."""
    config = recipe_with(recipe, *overrides)
    found = [f"{one.what}: {one.found}: {one.fix}" for one in check_settings(config, positions) if one.fix]
    return found[0] if found else ""


@pytest.mark.parametrize("recipe", recipe_names())
def test_shipped_recipes_take_any_length_of_response(recipe):
    for experiment in ("embedded", "gsm8k"):
        config = recipe_with(recipe, f"experiment={experiment}")
        for response in (64, 192, 1024):
            config.data.max_response_length = response  # values that depend on it follow
            assert [one for one in check_settings(config, 8192) if one.fix] == []


def test_the_overlong_penalty_follows_the_response_and_is_as_it_was():
    for recipe, experiment, response, length in (
        ("e12", "gsm8k", 1024, 256), ("e12", "gsm8k", 192, 48), ("e12", "embedded", 24, 8), ("dapo", "gsm8k", 3, 1),
    ):  # fmt: skip
        config = recipe_with(recipe, f"experiment={experiment}", f"{RESPONSE}={response}")
        assert config.reward.reward_kwargs.overlong_buffer_cfg.len == length
        assert config.reward.reward_kwargs.max_resp_len == response


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([f"{OVERLONG}.len=256"], [f"{OVERLONG}.len", RESPONSE]),
        ([f"{OVERLONG}.len=0"], [f"{OVERLONG}.len"]),
        ([f"{OVERLONG}.len=8.5"], [f"{OVERLONG}.len"]),
        (["reward.reward_kwargs.max_resp_len=512"], ["reward.reward_kwargs.max_resp_len", RESPONSE]),
        ([f"{ROLLOUT}.max_model_len=150"], [f"{ROLLOUT}.max_model_len", PROMPT, RESPONSE]),
        ([f"{ROLLOUT}.max_model_len=8193"], [f"{ROLLOUT}.max_model_len", "8,192 tokens"]),
        ([f"{PROMPT}=8192"], [PROMPT, RESPONSE, "8,192 tokens"]),
        ([f"{ROLLOUT}.response_length=512"], [f"{ROLLOUT}.response_length", RESPONSE]),
        ([f"{ROLLOUT}.prompt_length=64"], [f"{ROLLOUT}.prompt_length", PROMPT]),
        ([f"{ROLLOUT}.max_num_batched_tokens=64"], [f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs"]),
        ([f"{ACTOR}.ppo_max_token_len_per_gpu=151"], [f"{ACTOR}.ppo_max_token_len_per_gpu", PROMPT, "152"]),
        (
            [f"{ROLLOUT}.log_prob_max_token_len_per_gpu=151"],
            [f"{ROLLOUT}.log_prob_max_token_len_per_gpu", RESPONSE, "152"],
        ),
        ([f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"], [f"{ROLLOUT}.log_prob_use", f"{ACTOR}.use_dynamic"]),
        ([f"{ACTOR}.use_dynamic_bsz=false"], [f"{ACTOR}.ppo_micro_batch_size_per_gpu"]),
        (
            [f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=5"],
            [f"{ACTOR}.ppo_micro_batch_size_per_gpu=5", "48 responses"],
        ),
        (
            [
                f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=6",
                f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=7",
            ],
            [f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=7"],
        ),
        ([f"{ROLLOUT}.temperature=0"], [f"{ROLLOUT}.temperature"]),
        (["trainer.n_gpus_per_node=4", f"{ACTOR}.fsdp_config.fsdp_size=3"], [f"{ACTOR}.fsdp_config.fsdp_size"]),
        ([f"{ACTOR}.ulysses_sequence_parallel_size=3"], [f"{ACTOR}.ulysses_sequence_parallel_size"]),
    ],
)  # fmt: skip
def test_contradictions_are_told_by_their_keys(overrides, keys):
    said = fault("e12", *overrides)
    assert all(key in said for key in keys), said or "no fault"
    assert "\n" not in said


def test_a_critic_s_micro_batches_count_where_there_is_one():
    overrides = [f"{CRITIC}.ppo_max_token_len_per_gpu=100"]
    assert f"{CRITIC}.ppo_max_token_len_per_gpu=100" in fault("ppo", *overrides)
    assert fault("e12", *overrides) == ""
    assert fault("e12", *overrides, f"{CRITIC}.enable=true")
    assert not uses_critic(recipe_with("ppo", f"{CRITIC}.enable=false"))
    fixed = [f"{CRITIC}.use_dynamic_bsz=false", f"{CRITIC}.ppo_micro_batch_size_per_gpu=6"]
    assert fault("ppo", *fixed) == ""
    size = f"{CRITIC}.forward_micro_batch_size_per_gpu=5"
    assert f"{size} does not divide the 48 responses of a rank" in fault("ppo", *fixed, size)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("e12", [f"{CRITIC}.enable=true"], "critic.enable=true: algorithm.adv_estimator=grpo reads no values"),
        ("rloo", [f"{CRITIC}.enable=true"], "critic.enable=true: algorithm.adv_estimator=rloo reads no values"),
        ("ppo", [f"{CRITIC}.enable=false"], "critic.enable=false: algorithm.adv_estimator=gae reads a critic's values"),
        ("ppo", [f"{CRITIC}.enable=true"], ""),
        ("ppo", [], ""),
        ("e12", [f"{CRITIC}.enable=false"], ""),
    ],
)
def test_there_is_a_critic_exactly_if_its_values_are_read(recipe, overrides, words):
    said = fault(recipe, *overrides)
    assert words in said if words else said == ""
    assert "\n" not in said


def test_an_estimator_that_compares_responses_to_a_prompt_needs_several():
    """With one, verl takes 0 for the mean of the group: every right response would be reinforced, and no wrong one."""
    one = f"{ROLLOUT}.n=1"
    assert f"algorithm.adv_estimator=grpo compares the responses to a prompt: set {ROLLOUT}.n" in fault("e12", one)
    assert "algorithm.adv_estimator=rloo compares" in fault("rloo", one)
    assert fault("reinforce_plus_plus", one) == fault("ppo", one) == fault("e12", f"{ROLLOUT}.n=2") == ""
    assert fault("e12", one, "trainer.val_only=true") == ""


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("e12", ["save_contents=[model]"], f"{ACTOR}.checkpoint.save_contents lacks optimizer, extra, so a run that"),
        ("e12", ["save_contents=[hf_model,optimizer,extra]"], f"{ACTOR}.checkpoint.save_contents lacks model, so"),
        ("e12", ["load_contents=[model]"], f"{ACTOR}.checkpoint.load_contents lacks optimizer, extra"),
        ("e12", ["save_contents=[model,optimizer,extra,hf_model]"], ""),
        ("e12", ["save_contents=[model]", "trainer.save_freq=-1"], ""),
        ("e12", ["save_contents=[model]", "trainer.resume_mode=disable"], ""),
        ("ppo", [f"{CRITIC}.checkpoint.save_contents=[model]"], "critic.checkpoint.save_contents lacks optimizer"),
        ("e12", [f"{CRITIC}.checkpoint.save_contents=[model]"], ""),
    ],
)
def test_a_checkpoint_has_all_that_a_run_resumes_with(recipe, overrides, words):
    """verl loads what is there, so the learning rate of a resumed run would begin with its warm-up again."""
    said = fault(recipe, *(one if "." in one else f"{ACTOR}.checkpoint.{one}" for one in overrides))
    assert words in said if words else said == ""


def test_limits_that_just_hold_are_no_fault():
    for override in (
        f"{OVERLONG}.len=24", f"{ROLLOUT}.max_model_len=152", f"{ROLLOUT}.max_num_batched_tokens=128",
        f"{ACTOR}.ppo_max_token_len_per_gpu=152", f"{OVERLONG}.enable=false",
    ):  # fmt: skip
        assert fault("e12", override) == ""
    assert fault("e12", f"{OVERLONG}.enable=false", f"{OVERLONG}.len=256") == ""
    assert fault("e12", positions=152) == ""
    assert fault("e12", positions=151)
    assert fault("e12", positions=None) == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward.reward_manager.name=prime", "reward.reward_manager.name has 'prime'.*valid: dapo.*importlib"),
        ("reward.reward_manager.name=dappo", "did you mean 'dapo'"),
        ("reward.reward_manager.source=file", "reward.reward_manager.source has 'file'"),
        ("trainer.resume_mode=never", "trainer.resume_mode has 'never'"),
        ("aqn.target.accuracy=72.48", "between 0 and 1 .0.7248 for 72.48 %., or null for no target"),
        ("aqn.target.accuracy=0.0", "aqn.target.accuracy is 0: give a fraction between 0 and 1, or null"),
        ("aqn.target.accuracy=high", "aqn.target.accuracy must be a float, got 'high'"),
        ("aqn.target.problems=0", "aqn.target.problems is 0"),
        ("aqn.target.model=''", "aqn.target.model is empty"),
        ("aqn.target.control=e6a", "unknown key aqn.target.control"),
        ("aqn.run.allow_failed=1.0", "aqn.run.allow_failed is 1.0"),
        ("aqn.run.allow_failed=-0.1", "aqn.run.allow_failed is -0.1"),
    ],
)
def test_names_and_shares_that_are_none_are_refused(override, said):
    config = recipe_with("e12", override)
    check = parse_aqn if override.startswith("aqn.") else check_names
    with pytest.raises(ConfigError, match=said):
        check(config)


def test_a_manager_of_one_s_own_may_have_any_name():
    check_names(recipe_with("e12", "reward.reward_manager.name=Mine", "reward.reward_manager.source=importlib"))


def test_dry_run_and_doctor_tell_what_contradicts(monkeypatch):
    monkeypatch.setattr("verl_aqn.preflight.doctor._nodes", lambda *_: [])  # a process that imports torch and verl
    overrides = ["profile=cpu", f"{OVERLONG}.len=256"]
    with pytest.raises(EnvironmentFault, match=rf"{OVERLONG}\.len=256, {RESPONSE}=24: set"):
        train("e12", overrides, dry_run=True)
    with pytest.raises(ConfigError, match=r"nowhere\.py: no such file"):
        train("e12", ["profile=cpu", "reward.custom_reward_function.path=nowhere.py"], dry_run=True)
    both = [*overrides, "reward.custom_reward_function.path=nowhere.py"]
    found = {one.what: one.fix for one in examine("e12", both).findings if one.fix}
    assert f"{OVERLONG}.len" in found["overlong penalty"]
    assert "no such file" in found["reward"]


ENGINE = "actor_rollout_ref.rollout.engine_kwargs.vllm"
GRAPHS = "actor_rollout_ref.rollout.enforce_eager=false"
PASSES = f"{ENGINE}.compilation_config.pass_config"
FUSED = "additional_config.ascend_compilation_config"


@pytest.mark.parametrize(
    ("profile", "overrides", "words"),
    [
        ("cuda", [f"+{ENGINE}.quantization=fp8"], f"remove {ENGINE}.quantization=fp8"),
        ("cuda", [f"+{ENGINE}.kv_cache_dtype=fp8"], ""),
        ("cpu", [f"+{ENGINE}.kv_cache_dtype=fp8_e5m2"], ""),
        ("npu", [f"+{ENGINE}.kv_cache_dtype=fp8"], f"vllm-ascend has no FP8 cache for these models: remove {ENGINE}"),
        ("cuda", [f"+{ENGINE}.kv_cache_dtype=int3"], "kv_cache_dtype to one of auto, bfloat16, fp8"),
        ("cuda", [f"+{ENGINE}.speculative_config={{method:ngram}}"], f"remove {ENGINE}.speculative_config"),
        ("npu", [GRAPHS], ""),
        ("npu", [GRAPHS, f"{ENGINE}.{FUSED}.fuse_qknorm_rope=true"], f"set {ENGINE}.{FUSED}.fuse_qknorm_rope=false"),
        ("npu", [GRAPHS, f"{ENGINE}.additional_config=null"], f"set {ENGINE}.{FUSED}.fuse_norm_quant=false"),
        ("npu", [f"{ENGINE}.additional_config=null"], ""),
        ("npu", [GRAPHS, f"+{ENGINE}.additional_config.xlite_graph_config={{enabled:true}}"], "xlite_graph_config=nu"),
        ("cuda", [f"{PASSES}.fuse_norm_quant=true"], f"set {PASSES}.fuse_norm_quant=false"),
        ("cuda", [f"{PASSES}.fuse_norm_quant=true", "aqn.noise.enabled=false"], ""),
    ],
)  # fmt: skip
def test_what_an_engine_computes_is_planned_for_or_refused_by_name(profile, overrides, words):
    found = [one for one in check_engine(load_recipe("e12", [f"profile={profile}", *overrides])) if one.fix]
    if not words:
        assert found == []
        return
    (one,) = found
    assert words in f"{one.what}: {one.found}: {one.fix}"


def test_an_fp8_cache_holds_twice_as_many_tokens():
    from verl_aqn.preflight.memory_plan import sizes

    plain, half = (
        sizes(load_recipe("e12", ["profile=cuda", *more])) for more in ([], [f"+{ENGINE}.kv_cache_dtype=fp8"])
    )
    assert (plain.cache_width, half.cache_width) == (2, 1)
