"""Every recipe composes on every profile and has its documented meaning; a wrong recipe is rejected in one line."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from verl_aqn.config.allowed import check_names, check_numbers, check_types
from verl_aqn.config.compose import find_recipe, load_recipe, recipe_names
from verl_aqn.config.noise_settings import schedule_of
from verl_aqn.config.schema import FOUR_BIT, AqnConfig, parse_aqn
from verl_aqn.errors import ConfigError
from verl_aqn.launch.train import identity
from verl_aqn.mxfp4.mxfp8 import ARITHMETIC
from verl_aqn.preflight.prepare import tell_workers
from verl_aqn.runs.stats.arms import settings_of

PLAN = {  # recipe: (σ_end, epoch_aware, epochs, steps)
    "e12": (5e-4, True, 1, 29),
    "e12_2ep": (5e-4, True, 2, 58),
    "e12_2ep_v2": (5e-4, False, 2, 58),
    "e12_aggressive_1ep": (1e-5, False, 1, 29),
    "e12_aggressive_2ep": (1e-5, False, 2, 58),
}


ALGORITHMS = ["grpo", "dapo", "ppo", "rloo", "reinforce_plus_plus", "gspo", "cispo", "multi_turn", "kl_control"]


def test_the_plan_s_recipes_are_all_there():
    assert set(recipe_names()) == {*PLAN, "e6a", *ALGORITHMS}


@pytest.mark.parametrize("profile", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("recipe", [*PLAN, "e6a", *ALGORITHMS])
def test_every_recipe_composes_on_every_profile(recipe, profile):
    config = load_recipe(recipe, [f"profile={profile}"])
    aqn = parse_aqn(config)
    assert aqn.profile == profile
    assert config.trainer.device == profile
    assert config.trainer.experiment_name == recipe
    OmegaConf.to_container(config, resolve=True)
    schedule_of(config, int(config.trainer.total_training_steps))


@pytest.mark.parametrize("recipe", PLAN)
def test_noise_of_the_plan(recipe):
    config = load_recipe(recipe, ["profile=cuda"])
    end, epoch_aware, epochs, steps = PLAN[recipe]
    noise = parse_aqn(config).noise
    assert (noise.sigma_start, noise.sigma_end, noise.num_stages) == (0.05, end, 10)
    assert (noise.epoch_aware, noise.unit) == (epoch_aware, "absolute")
    assert (config.trainer.total_epochs, config.trainer.total_training_steps) == (epochs, steps)
    if epoch_aware:
        # Every epoch starts with its own warm-up, and each has noise; in the fork σ was always 0.
        table = schedule_of(config, steps).table()
        for epoch in range(epochs):
            part = table[epoch * 29 : (epoch + 1) * 29]
            assert part[0]["sigma"] == 0
            assert max(row["sigma"] for row in part) > 1e-4


def test_aggressive_schedule_is_the_plan_s_table():
    table = schedule_of(load_recipe("e12_aggressive_1ep", ["profile=cpu"]), 29).table()
    stages = [table[step]["sigma"] for step in (0, 3, 6, 9, 12, 15, 18, 21, 24, 27)]
    assert stages == pytest.approx(
        [0, 5.0e-2, 1.72e-2, 5.95e-3, 2.05e-3, 7.07e-4, 2.44e-4, 8.41e-5, 2.90e-5, 1.0e-5], rel=5e-3
    )
    assert table[28]["sigma"] == 1e-5


def test_the_embedded_task_has_as_many_problems_as_a_plan_asks_for():
    assert load_recipe("e12", ["profile=cpu"]).data.val_max_samples == 192
    assert load_recipe("dapo", ["profile=cpu", "embedded.items=384"]).data.val_max_samples == 384
    assert load_recipe("e12", ["profile=cuda", "embedded.items=384"]).data.val_max_samples == -1


def test_e12_hyper_parameters():
    config = load_recipe("e12_aggressive_1ep", ["profile=cuda"])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.loss_agg_mode) == (0.2, 0.25, "token-mean")
    assert (actor.use_kl_loss, config.algorithm.use_kl_in_reward) == (False, False)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (1e-5, 10, 0.1)
    assert (actor.grad_clip, actor.ppo_mini_batch_size, config.data.train_batch_size) == (1.0, 32, 128)
    assert (rollout.n, rollout.temperature, rollout.top_p) == (8, 1.0, 1.0)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, 1024)
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (32, 16)
    assert (config.algorithm.adv_estimator, config.algorithm.filter_groups.enable) == ("grpo", True)
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg
    assert (overlong.enable, overlong.len, overlong.penalty_factor) == (True, 256, 0.5)


def test_control_has_no_noise_and_differs_in_nothing_else():
    control = OmegaConf.to_container(load_recipe("e6a", ["profile=cuda"]))
    treated = OmegaConf.to_container(load_recipe("e12_aggressive_1ep", ["profile=cuda"]))
    assert all(row["sigma"] == 0 for row in schedule_of(control, 29).table())
    for config in (control, treated):
        config["trainer"]["experiment_name"] = None
        config["aqn"]["noise"]["enabled"] = None
    assert treated["aqn"].pop("target")["accuracy"] == 0.7248
    assert control["aqn"].pop("target")["accuracy"] is None
    assert control == treated


def test_a_target_makes_no_other_run():
    one, other = (
        load_recipe("e12_aggressive_1ep", ["profile=cpu", *more]) for more in ([], ["aqn.target.accuracy=0.5"])
    )
    assert identity(one) == identity(other)
    one, other = map(OmegaConf.to_container, (one, other))
    assert settings_of(one) == settings_of(other) != {}


def test_grpo_has_nothing_of_dapo():
    config = load_recipe("grpo", ["profile=cuda"])
    actor = config.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.loss_agg_mode) == (0.2, 0.2, "seq-mean-token-mean")
    assert (actor.use_kl_loss, actor.kl_loss_coef) == (True, 0.001)
    assert (config.algorithm.adv_estimator, config.algorithm.filter_groups.enable) == ("grpo", False)
    assert not config.reward.reward_kwargs.overlong_buffer_cfg.enable


def test_dapo_is_e12_aggressive_and_keeps_its_dynamic_sampling_on_the_embedded_task():
    dapo, e12 = (OmegaConf.to_container(load_recipe(r, ["profile=cuda"])) for r in ("dapo", "e12_aggressive_1ep"))
    assert (dapo["embedded"].pop("refill"), e12["embedded"].pop("refill")) == (True, False)
    dapo["trainer"]["experiment_name"] = e12["trainer"]["experiment_name"]
    dapo["aqn"]["target"] = e12["aqn"]["target"]
    assert dapo == e12
    assert load_recipe("dapo", ["profile=cpu"]).algorithm.filter_groups.enable is True
    assert load_recipe("e12_aggressive_1ep", ["profile=cpu"]).algorithm.filter_groups.enable is False


@pytest.mark.parametrize("profile", ["cpu", "cuda", "npu"])
def test_ppo_has_a_critic_on_the_actor_s_base(profile):
    config = load_recipe("ppo", [f"profile={profile}"])
    assert (config.algorithm.adv_estimator, config.algorithm.gamma, config.algorithm.lam) == ("gae", 1.0, 1.0)
    assert config.critic.strategy == "fsdp2"
    config.actor_rollout_ref.model.path = "/packed"  # as prepare_model does
    for key in ("path", "external_lib", "lora_rank", "lora_alpha", "override_config", "use_remove_padding"):
        assert config.critic.model[key] == config.actor_rollout_ref.model[key], key


@pytest.mark.parametrize(("choice", "level"), [("tis", "token"), ("none", None)])
def test_rollout_correction_is_chosen_by_name(choice, level):
    config = load_recipe("e12", ["profile=cuda", f"correction={choice}"])
    assert config.algorithm.rollout_correction.rollout_is == level
    assert config.algorithm.rollout_correction.bypass_mode is False


def test_a_recipe_s_file_may_name_its_profile(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [e12, _self_]\naqn: {profile: npu}\n")
    (tmp_path / "mine2.yaml").write_text("defaults: [mine, _self_]\n")
    for name in ("mine", "mine2"):
        config = load_recipe(str(tmp_path / f"{name}.yaml"))
        assert (config.aqn.profile, config.trainer.device, config.data.train_files) == ("npu", "npu", "gsm8k")
        assert load_recipe(str(tmp_path / f"{name}.yaml"), ["profile=cpu"]).trainer.device == "cpu"


def test_defaults_in_yaml_are_those_of_the_types():
    config = load_recipe("base", ["profile=cpu", "experiment=gsm8k"])
    config.aqn.profile = "auto"
    assert parse_aqn(config) == AqnConfig()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("aqn.noise.sigma_strat=1", "did you mean 'sigma_start'"),
        ("aqn.nois.seed=1", "did you mean 'noise'"),
        ("trainer.total_epoch=1", "did you mean 'total_epochs'"),
        ("aqn.noise.kind=exponentail", "exponential, linear"),
        ("aqn.noise.unit=percent", "absolute, rms, multiplicative"),
        ("aqn.noise.targets=[norms]", "norm, linear"),
        ("aqn.noise.warmup=long", "must be a float"),
        ("aqn.noise.off_from_step=2.5", "must be a int"),
        ("aqn.noise.exclude=norm", "must be a list of names"),
        ("aqn.noise.layers.kind=target", "targeted"),
        ("aqn.noise.layers.fist=2", "did you mean 'first'"),
        ("aqn.noise.layers.multiplier=2", "has no effect with kind 'uniform'"),
        ("aqn.noise.layers={kind: zones, zones: [{module: [a]}]}", "did you mean 'modules'"),
        ("aqn.noise.sigma_start=big", "must be a float"),
        ("aqn.noise.num_stages=2.5", "must be a int"),
        ("profile=quantum", "valid: cpu, cuda, npu"),
        ("experiment=gsm", "did you mean 'gsm8k'"),
        ("correction=tsi", "did you mean 'tis'"),
        ("sigma_start=0.1", "unknown key sigma_start: did you mean aqn.noise.sigma_start?"),
        ("model.path=x", "unknown key model: did you mean actor_rollout_ref.model or critic.model or "),
        ("data.lr=1", "actor_rollout_ref.actor.optim.lr or critic.optim.lr?"),
        ("data.nowhere_at_all=1", "unknown key data.nowhere_at_all: valid: "),
        ("seeds=[0,1]", "seeds= is for plans; for a recipe, set for example aqn.seed=0"),
        ("nonsense", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_wrong_override_is_one_clear_line(override, words):
    with pytest.raises(ConfigError) as error:
        load_recipe("e12_aggressive_1ep", ["profile=cpu", override] if "profile" not in override else [override])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


NUMBERS = {
    "trainer.n_gpus_per_node": (0, "abc", None, 1.5, True, "2"),
    "trainer.nnodes": (0,),
    "trainer.total_training_steps": (0, "abc"),
    "trainer.total_epochs": (0, "abc", None),
    "data.train_batch_size": (0, "abc", None),
    "data.gen_batch_size": (0, "abc"),
    "actor_rollout_ref.actor.ppo_mini_batch_size": (0, None),
    "actor_rollout_ref.rollout.n": (0, -1, "abc"),
    "actor_rollout_ref.rollout.tensor_model_parallel_size": (0, "abc"),
    "trainer.test_freq": (-2, "abc"),
    "trainer.save_freq": (-2, None),
    "actor_rollout_ref.model.lora_rank": (-1, "abc", None),
}
LOWER = {"trainer.test_freq": "-1 for the last step only", "trainer.save_freq": "-1 for never",
         "actor_rollout_ref.model.lora_rank": "0 for no adapter"}  # fmt: skip


@pytest.fixture(scope="module")
def composed():
    return load_recipe("e12", ["profile=cpu"])


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_whole_numbers_are_checked_before_anything_reckons_with_them(composed, key, value):
    config = composed.copy()
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError) as error:
        check_numbers(config)
    shown, lower = "null" if value is None else value, f", or {LOWER[key]}" if key in LOWER else ""
    assert str(error.value) == f"{key}={shown}: give an integer of 1 or more{lower}"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"run": {"hang_timeout_factor": -1.0}},
            r"aqn\.run\.hang_timeout_factor is -1\.0: give 0 or more; 0 disables it",
        ),
        ({"run": {"restarts": -1}}, r"aqn\.run\.restarts is -1: give 0 or more"),
        ({"mismatch": {"rescore": -3}}, r"aqn\.mismatch\.rescore is -3: give 0 or more; 0 disables it"),
    ],
)
def test_what_cannot_be_negative(block, words):
    with pytest.raises(ConfigError, match=words):
        parse_aqn({"aqn": block})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trainer.logger", ["console", "consol"], "trainer.logger has 'consol': did you mean 'console'?"),
        ("trainer.logger", "consol", "trainer.logger has 'consol': did you mean 'console'?"),
        ("actor_rollout_ref.actor.strategy", "foo", "actor_rollout_ref.actor.strategy has 'foo': valid: fsdp, fsdp2"),
        ("critic.strategy", None, "critic.strategy has None: valid: fsdp, fsdp2"),
        ("critic.strategy", "megatron", "critic.strategy has 'megatron': valid: fsdp, fsdp2"),
    ],
)
def test_names_that_verl_would_refuse_in_the_middle_of_a_run(composed, key, value, words):
    config = composed.copy()
    OmegaConf.update(config, key, value)
    with pytest.raises(ConfigError) as error:
        check_names(config)
    assert str(error.value) == words


def test_a_recipe_s_names_are_checked():
    with pytest.raises(ConfigError, match=r"trainer\.logger has 'consol'"):
        load_recipe("e12", ["profile=cpu", "trainer.logger=[consol]"])
    check_names(load_recipe("e12", ["profile=cpu", "trainer.logger=wandb"]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.total_training_steps", None),
        ("data.gen_batch_size", None),
        ("trainer.test_freq", -1),
        ("actor_rollout_ref.model.lora_rank", 0),
    ],
)
def test_numbers_that_may_be_left_out(composed, key, value):
    config = composed.copy()
    OmegaConf.update(config, key, value)
    check_numbers(config)


@pytest.mark.parametrize(
    "key", ["rollout.temperature", "rollout.val_kwargs.temperature", "rollout.top_p", "actor.optim.lr"]
)
@pytest.mark.parametrize("value", ["hot", None, "0.5", -1, float("nan"), float("inf"), True])
def test_numbers_with_a_fraction_are_checked_too(composed, key, value):
    config = composed.copy()
    OmegaConf.update(config, f"actor_rollout_ref.{key}", value)
    shown = "null" if value is None else value
    with pytest.raises(ConfigError, match=rf"{key}={shown}: give a number of 0 or more$"):
        check_numbers(config)


def test_text_is_no_number_and_no_truth_value():
    with pytest.raises(ConfigError, match=r"^trainer\.val_before_train='no': give true or false$"):
        load_recipe("e12", ["profile=cpu", "trainer.val_before_train=no"])
    usual = {"a": {"b": True, "c": 0.5, "d": None, "e": "x"}, "env_vars": {"N": 1}}
    check_types({"a": {"b": 0, "c": None, "d": "no", "e": "no", "f": "no"}, "r": {"env_vars": {"N": "2"}}}, usual)
    for key, what in (("b", "true or false"), ("c", "a number")):
        with pytest.raises(ConfigError, match=f"^a.{key}='off': give {what}$"):
            check_types({"a": {key: "off"}}, usual)


def test_a_recipe_s_numbers_are_checked():
    with pytest.raises(ConfigError, match=r"trainer\.n_gpus_per_node=0: give an integer of 1 or more"):
        load_recipe("e12", ["profile=cpu", "trainer.n_gpus_per_node=0"])


@pytest.mark.parametrize("override", ["trainer.nnodes=${foo.bar}", "++aqn.seed=${foo.bar}"])
def test_an_interpolation_of_nothing_is_one_line(override):
    with pytest.raises(ConfigError, match=r"e12\.yaml: Interpolation key 'foo.bar' not found") as error:
        load_recipe("e12", ["profile=cpu", override])
    assert "\n" not in str(error.value)


def test_unknown_key_added_with_plus_is_refused_too():
    with pytest.raises(ConfigError, match=r"unknown key aqn\.noise\.sigma: did you mean"):
        load_recipe("e12_aggressive_1ep", ["profile=cpu", "+aqn.noise.sigma=1"])


def test_wrong_recipe_name_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'e12_aggressive_1ep'"):
        load_recipe("e12_agressive_1ep")


def test_a_plan_is_no_recipe_and_is_not_suggested_as_one():
    with pytest.raises(ConfigError) as error:
        load_recipe("e12_aggressive", ["profile=cpu"])
    assert str(error.value) == (
        "e12_aggressive is a plan: run `verl-aqn train e12_aggressive`; this command needs a single recipe "
        "(its arms: e6a, e12, e12_aggressive_1ep, e12_aggressive_2ep)"
    )
    with pytest.raises(ConfigError, match=r"did you mean .e12_aggressive_[12]ep."):
        load_recipe("e12_aggresive")
    with pytest.raises(ConfigError, match="did you mean 'e12_aggressive'"):
        find_recipe("e12_aggresive")


@pytest.mark.parametrize("text", ["", "foo: 1", "hello", "arm: {a: {recipe: e12}}", "defaults: [aqn, _self_]"])
@pytest.mark.parametrize("overrides", [[], ["data.seed=1"]])
def test_a_recipe_without_base_is_told_so(tmp_path, text, overrides):
    (tmp_path / "r1.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu", *overrides])
    assert str(error.value) == "r1.yaml does not build on `base`: start it with `defaults: [base, _self_]`"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults: base", "r1.yaml does not build on `base`: start it with `defaults: [base, _self_]`"),
        ("- base", "r1.yaml does not build on `base`: start it with `defaults: [base, _self_]`"),
        ("defaults: [_self_, e12]", "r1.yaml: e12 in `defaults` would overwrite this file: put _self_ last"),
        ("defaults: [r1, _self_]", "r1.yaml builds on itself: a name in `defaults` means first a file beside it, so "
                                   "give the file another name than the recipe that it builds on"),
    ],
)  # fmt: skip
def test_a_recipe_s_list_of_files(tmp_path, text, words):
    (tmp_path / "r1.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"])
    assert str(error.value) == words


def test_what_hydra_tells_as_a_wrong_value_is_one_line(tmp_path):
    (tmp_path / "r1.yaml").write_text("defaults: [r2, _self_]")
    (tmp_path / "r2.yaml").write_text("defaults: base")
    with pytest.raises(ConfigError, match=r"^r1\.yaml: Invalid defaults list in 'r2', defaults must be a list"):
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"])
    with pytest.raises(ConfigError, match=r"^e12\.yaml: Config group override must be a string or a list\. Got int$"):
        load_recipe("e12", ["profile=cpu", "data=3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aqn: null", "aqn must be a block of keys, got null"),
        ("trainer:", "trainer must be a block of keys, got null"),
        ("actor_rollout_ref: {actor: {optim: 1.0e-4}}", "actor_rollout_ref.actor.optim must be a block of keys, "
                                                         "got 0.0001"),
        ("aqn.noise.sigma_start: 0.1", "aqn.noise.sigma_start is no key: write aqn: {noise: {sigma_start: …}}"),
        ("actor_rollout_ref: {model.path: /x}", "actor_rollout_ref.model.path is no key: write "
                                                "actor_rollout_ref: {model: {path: …}}"),
        ("data: {train_files: '${nope}'}", "Interpolation key 'nope' not found (data.train_files)"),
        ("data: {train_files: '${oc.env:NO_PE}'}", "KeyError raised while resolving interpolation: \"Environment "
                                                  "variable 'NO_PE' not found\" (data.train_files)"),
    ],
)  # fmt: skip
def test_what_a_recipe_s_file_sets_is_never_lost(tmp_path, text, words):
    (tmp_path / "r1.yaml").write_text(f"defaults: [base, _self_]\n{text}")
    with pytest.raises(ConfigError) as error:
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"])
    assert str(error.value) == f"r1.yaml: {words}"


def test_a_block_may_be_a_copy_of_another(tmp_path):
    (tmp_path / "r1.yaml").write_text("defaults: [ppo, _self_]\ncritic: {optim: '${actor_rollout_ref.actor.optim}'}")
    assert load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"]).critic.optim.lr == 5e-4


def test_a_recipe_may_build_on_another(tmp_path):
    (tmp_path / "r1.yaml").write_text("defaults: [e12, _self_]\ntrainer: {total_training_steps: 7}")
    assert load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"]).trainer.total_training_steps == 7


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe"])
def test_a_recipe_that_is_no_yaml(tmp_path, content):
    (tmp_path / "r1.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"r1\.yaml is not YAML: ") as error:
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aqn: {seed: 1}\naqn: {seed: 2}", "line 2: found duplicate key aqn"),
        ("aqn:\n\tseed: 1", r"line 2: found character '\\t' that cannot start any token"),
        ("aqn:\n  seed: 1\n noise: 2", "line 3: expected <block end>, but found '<block mapping start>'"),
    ],
)
@pytest.mark.parametrize("of", ["r1", "r2"])
def test_the_line_that_is_no_yaml(tmp_path, text, words, of):
    (tmp_path / "r1.yaml").write_text("defaults: [r2, _self_]")
    (tmp_path / f"{of}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"/{of}\.yaml is not YAML: {words}$"):
        load_recipe(str(tmp_path / "r1.yaml"), ["profile=cpu"])


@pytest.mark.parametrize("name", ["my-recipe", "my-recipe.yml"])
def test_a_recipe_s_file_is_told_by_its_name(tmp_path, name):
    (tmp_path / name).write_text("defaults: [base, _self_]")
    with pytest.raises(ConfigError, match=f"{name}: the name of a recipe must end in .yaml"):
        find_recipe(str(tmp_path / name))


def test_reading_a_recipe_imports_no_framework():
    code = (
        "import sys; from verl_aqn.config.compose import load_recipe; load_recipe('e12', ['profile=cpu']);"
        "print([m for m in ('torch', 'verl', 'vllm', 'ray', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("profile", "arithmetic"), [("cpu", "even/nearest"), ("cuda", "rceil/nearest"), ("npu", "floor/half_away")]
)
def test_four_bit_activations_reach_actor_and_rollout(profile, arithmetic):
    config = load_recipe(
        "e12", [f"profile={profile}", "aqn.mxfp4.activation=mxfp4", "aqn.mxfp4.cache_dequantized=true"]
    )
    assert parse_aqn(config).mxfp4.activation_arithmetic == arithmetic
    tell_workers(config)
    told, engine = config.actor_rollout_ref.model.override_config, config.actor_rollout_ref.rollout.engine_kwargs.vllm
    assert told.mxfp4_activation == arithmetic
    assert told.mxfp4_cache_dequantized is True
    assert engine.get("linear_backend") == ("auto" if profile == "cuda" else None)  # Marlin would not quantise them
    if profile == "cpu":
        assert engine.additional_config.mxfp4_activation == arithmetic


def test_another_rounding_for_one_side_is_refused():
    mxfp8 = ["profile=cpu", "aqn.mxfp4.activation=mxfp8"]
    with pytest.raises(ConfigError, match="mxfp4_activation=even/nearest: a packed base is built from the config"):
        load_recipe("e12", [*mxfp8, "+actor_rollout_ref.model.override_config.mxfp4_activation=even/nearest"])
    key = "actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.mxfp4_activation"
    config = load_recipe("e12", [*mxfp8, f"+{key}=even/nearest"])
    with pytest.raises(ConfigError, match=rf"^{key}=even/nearest, but .*mxfp8 rounds as {ARITHMETIC} in actor and"):
        tell_workers(config)
    OmegaConf.update(config, key, ARITHMETIC)
    tell_workers(config)
    tell_workers(config)  # an evaluation's config is that of a run


@pytest.mark.parametrize("profile", ["cpu", "cuda", "npu"])
def test_mxfp8_has_one_arithmetic_and_other_settings_for_it_are_refused(profile):
    mxfp8 = [f"profile={profile}", "aqn.mxfp4.activation=mxfp8"]
    plain = parse_aqn(load_recipe("e12", [f"profile={profile}"])).mxfp4
    assert (plain.activation_scale_rule, plain.activation_rounding) == FOUR_BIT[profile]
    explicit = ["aqn.mxfp4.activation_scale_rule=floor", "aqn.mxfp4.activation_rounding=nearest"]
    for overrides in (mxfp8, [*mxfp8, *explicit]):
        assert parse_aqn(load_recipe("e12", overrides)).mxfp4.activation_arithmetic == ARITHMETIC
    for other in ("activation_scale_rule=mse", "activation_rounding=half_away"):
        if profile == "npu" and "half_away" in other:
            continue  # that profile's own value
        with pytest.raises(ConfigError, match=r"are not for aqn.mxfp4.activation=mxfp8, .*: remove them"):
            parse_aqn(load_recipe("e12", [*mxfp8, f"aqn.mxfp4.{other}"]))


@pytest.mark.parametrize("recipe", ["e12_aggressive_1ep", "ppo"])
def test_one_seed_is_everybody_s(recipe):
    config = load_recipe(recipe, ["profile=cpu", "aqn.seed=5"])
    actor_rollout = config.actor_rollout_ref
    seeds = [config.aqn.noise.seed, config.data.seed, actor_rollout.rollout.seed, actor_rollout.actor.fsdp_config.seed]
    seeds += [actor_rollout.actor.data_loader_seed, config.critic.data_loader_seed, config.critic.fsdp.seed]
    assert set(seeds) == {5}
    assert parse_aqn(load_recipe(recipe, ["profile=cpu", "aqn.noise.seed=3"])).noise.seed == 3


def test_noise_in_the_actor_is_told_and_refused_where_it_cannot_be():
    in_actor = "aqn.noise.apply_to=rollout+actor"
    for override, told in ((in_actor, True), ("aqn.noise.apply_to=rollout", None)):
        config = load_recipe("e12", ["profile=cpu", override])
        tell_workers(config)
        assert config.actor_rollout_ref.model.override_config.get("noise_in_actor") is told
    with pytest.raises(ConfigError, match="packed layers do not support"):
        load_recipe("e12", ["profile=cpu", in_actor, "aqn.noise.targets=[norm,linear]"])
    overrides = [in_actor, "actor_rollout_ref.actor.strategy=fsdp", "aqn.mxfp4.enabled=false"]
    config = load_recipe("e12", ["profile=cpu", *overrides])
    with pytest.raises(ConfigError, match=r"needs actor\.strategy=fsdp2"):
        tell_workers(config)


def test_weight_only_is_the_default_and_forced_on_gpus():
    config = load_recipe("e12", ["profile=cuda"])
    tell_workers(config)
    assert parse_aqn(config).mxfp4.activation_arithmetic == "none"
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.linear_backend == "marlin"
    assert "mxfp4_activation" not in config.actor_rollout_ref.model.override_config
    for activation in ("mxfp4", "mxfp8"):
        config = load_recipe("e12", ["profile=cuda", f"aqn.mxfp4.activation={activation}", "aqn.mxfp4.enabled=false"])
        with pytest.raises(ConfigError, match=f"aqn.mxfp4.activation={activation} needs the quantised base"):
            tell_workers(config)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("trainer: {total_epoch: 2}", "unknown key trainer.total_epoch: did you mean 'total_epochs'?"),
        ("actor_rollout_ref: {rollout: {temprature: 1}}", "rollout.temprature: did you mean 'temperature'?"),
        ("actor_rollout_ref: {actor: {lr: 1e-4}}", "did you mean actor_rollout_ref.actor.optim.lr or "),
        ("embeded: {items: 4}", "unknown key embeded: did you mean 'embedded'?"),
        ("aqn: {noise: {sgima_end: 0.1}}", "unknown key aqn.noise.sgima_end: did you mean 'sigma_end'?"),
    ],
)
def test_a_key_of_a_recipe_s_file_that_nothing_reads_is_told(tmp_path, block, words):
    (file := tmp_path / "mine.yaml").write_text(f"defaults: [base, _self_]\n{block}\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(str(file), ["profile=cpu"])
    assert words in str(error.value)


@pytest.mark.parametrize(
    "block",
    [
        "actor_rollout_ref: {rollout: {engine_kwargs: {vllm: {block_size: 32}}}}",  # free in verl, set by a profile
        "actor_rollout_ref: {model: {override_config: {rope_theta: 1.0}}}\n"
        "aqn: {mxfp4: {enabled: false}, noise: {enabled: false}}",
        "reward: {reward_kwargs: {mine: 1}}",
        "aqn: {noise: {layers: {kind: uniform}}}",
    ],
)
def test_what_is_free_in_verl_is_free_in_a_recipe_s_file(tmp_path, block):
    (file := tmp_path / "mine.yaml").write_text(f"defaults: [base, _self_]\n{block}\n")
    load_recipe(str(file), ["profile=cpu", "+ray_kwargs.mine=1", "++data.sampler.own.depth=2"])
