"""Targets of `verl-aqn eval`, and the config that it makes of a run's. The real evaluation is in test_run.py."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig
from typer.testing import CliRunner

from tests.helpers.run_folders import validated_run
from verl_aqn.cli.main import app
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, DataError, EvidenceError, ModelError
from verl_aqn.evaluation import evaluate
from verl_aqn.evaluation.evaluate import Evaluation, Score, check_adapter, find_target, read, settings, trained_by
from verl_aqn.launch.train import Prepared
from verl_aqn.preflight.packed_source import settle_rounding
from verl_aqn.preflight.prepare import tell_workers
from verl_aqn.preflight.settings import uses_critic
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.stats.arms import arms
from verl_aqn.runs.stats.intervals import wilson


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path, model):
    """A run with checkpoints after steps 9 and 10."""
    run = open_run(tmp_path / "base", {})
    config = load_recipe("e12", ["profile=cpu", f"actor_rollout_ref.model.path={model}", "aqn.noise.probe=true"])
    run.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    for step in (9, 10):
        (run.checkpoints / f"global_step_{step}" / "actor").mkdir(parents=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("10")
    return run


def test_a_run_is_its_last_checkpoint(run):
    for path in (run.path, run.path.parent.parent):
        target = find_target(path)
        assert (target.run.path, target.checkpoint.name) == (run.path, "global_step_10")


def test_a_checkpoint_is_itself(run):
    target = find_target(run.checkpoints / "global_step_9")
    assert (target.run.path, target.checkpoint.name) == (run.path, "global_step_9")


def test_a_folder_with_a_config_is_a_model(model):
    assert find_target(model).run is None


@pytest.mark.parametrize("make", ["nothing", "empty", "checkpoint", "run"])
def test_what_is_no_target(tmp_path, make):
    path = tmp_path / ("global_step_3" if make == "checkpoint" else "x")
    if make != "nothing":
        path.mkdir()
    if make == "run":
        open_run(path, {})
    with pytest.raises(DataError) as error:
        find_target(path)
    assert "\n" not in str(error.value)
    if make in ("nothing", "empty"):
        assert str(error.value).startswith(f"{path} is not a run, a checkpoint or a model folder (no config.json)")


def test_a_run_is_validated_as_it_was_and_takes_no_step(run):
    config = settings(find_target(run.path), ["data.val_max_samples=7"], None, None)
    assert (config.trainer.val_only, config.trainer.val_before_train) == (True, True)
    assert (config.trainer.resume_mode, config.trainer.resume_from_path[-14:]) == ("resume_path", "global_step_10")
    assert config.actor_rollout_ref.actor.checkpoint.load_contents == ["model"]
    assert config.data.val_max_samples == 7
    # The noise stays in the config, so that evaluations of two arms differ in the same settings as the arms.
    assert (config.aqn.noise.sigma_end, config.aqn.noise.probe) == (5e-4, False)
    assert config.aqn.mxfp4.enabled


def test_a_run_s_base_is_not_rounded_again(run, model, tmp_path):
    """A run records the settings of rounding beside the folder that they made."""
    (tmp_path / "packed").mkdir()
    packed = {"quantization_config": {"format": "mxfp4-pack-quantized"}}
    (tmp_path / "packed/config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | packed))
    config = OmegaConf.load(run.path / "config.yaml")
    config.actor_rollout_ref.model.path = str(tmp_path / "packed")
    config.aqn.mxfp4.calibrate, config.aqn.mxfp4.keep.worst = ["embedded"], 0.2
    run.replace_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    target = find_target(run.path)
    settle_rounding(settings(target, [], None, None), tmp_path / "packed")
    with pytest.raises(ModelError, match=r"aqn\.mxfp4\.calibrate cannot round it again"):
        settle_rounding(settings(target, ["aqn.mxfp4.calibrate=[embedded]"], None, None), tmp_path / "packed")


@pytest.mark.parametrize("enable", [True, None])
def test_a_validation_has_no_critic(run, enable):
    config = OmegaConf.load(run.path / "config.yaml")
    config.algorithm.adv_estimator, config.critic.enable = "gae", enable
    run.replace_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    assert not uses_critic(settings(find_target(run.path), [], None, None))


@pytest.mark.parametrize("override", ["data.val_max_sample=7", "aqn.nois.enabled=false", "data"])
def test_a_key_that_the_run_has_not_is_refused(run, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].rpartition(".")[2]):
        settings(find_target(run.path), [override], None, None)


def test_the_nearest_key_is_named(run):
    with pytest.raises(ConfigError, match=r"^unknown key data\.val_max_sample: did you mean 'val_max_samples'\?$"):
        settings(find_target(run.path), ["data.val_max_sample=2"], None, None)


def test_what_follows_a_key_in_the_recipe_follows_its_override(run):
    overrides = ["data.max_response_length=48", "data.max_prompt_length=200", "embedded.items=100", "aqn.seed=5"]
    config = settings(find_target(run.path), overrides, None, None)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.response_length, config.reward.reward_kwargs.max_resp_len) == (48, 48)
    assert (rollout.prompt_length, config.data.val_max_samples) == (200, 100)
    assert rollout.max_model_len is None  # the run's 160 are too few, so `prepare_model` sets another value
    given = settings(find_target(run.path), [*overrides, "actor_rollout_ref.rollout.max_model_len=90"], None, None)
    assert given.actor_rollout_ref.rollout.max_model_len == 90
    assert {config.aqn.noise.seed, config.data.seed, rollout.seed} == {5}
    told = settings(find_target(run.path), ["data.val_max_samples=7", "embedded.items=100"], None, None)
    assert told.data.val_max_samples == 7  # it has its own setting


def test_a_damaged_config_is_told(run):
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        settings(find_target(run.path), [], None, None)


def test_a_number_is_checked_as_a_recipe_s(run):
    with pytest.raises(ConfigError, match=r"data\.train_batch_size=abc: give an integer of 1 or more"):
        settings(find_target(run.path), ["data.train_batch_size=abc"], None, None)


def test_a_model_folder_is_validated_without_an_adapter(model):
    config = settings(find_target(model), ["profile=cpu"], None, None)
    assert config.actor_rollout_ref.model.path == str(model)
    assert (config.trainer.resume_mode, config.actor_rollout_ref.model.lora_adapter_path) == ("disable", None)
    assert not config.aqn.mxfp4.enabled  # the folder's own precision
    assert settings(find_target(model), ["profile=cpu"], None, "mxfp4").aqn.mxfp4.enabled


@pytest.mark.parametrize("name", ["lr=1e-4,seed=0", "m (1)", "m[x]", "it's"])
def test_a_model_folder_may_be_named_as_hydra_names_folders(model, name):
    folder = model.rename(model.with_name(name))
    assert settings(find_target(folder), ["profile=cpu"], None, None).actor_rollout_ref.model.path == str(folder)


def test_an_evaluation_goes_where_it_is_told(run, tmp_path, monkeypatch):
    def opened(base, identity, fresh):
        raise ModelError(str(base))

    @contextmanager
    def prepared(config, *, fit):
        yield Prepared(config, 0, {}, tmp_path), None

    monkeypatch.setattr(evaluate, "ready", prepared)
    monkeypatch.setattr(evaluate, "open_run", opened)
    for overrides, base in (([], run.path / "evaluations"), ([f"aqn.run.dir={tmp_path}/x"], tmp_path / "x")):
        with pytest.raises(ModelError, match=f"^{base}$"):
            evaluate.evaluate(run.path, overrides)


def test_a_run_whose_evidence_does_not_hold_is_not_evaluated(run):
    run.add_evidence({"kind": "stopped", "reason": "the norms are not clean"})
    with pytest.raises(EvidenceError, match="has a fault: the run was stopped: the norms are not clean"):
        evaluate.evaluate(run.path, [])


def test_evaluations_stand_for_the_runs_that_were_trained(tmp_path):
    """Sampling one policy twice does not make two seeds, and its run may have had other packages."""

    def evaluated(name, trained, seed, noise=True):
        path = validated_run(tmp_path / name, name, [1, 0, 1], seed=seed, enabled=noise)
        RunFolder(path).append("events.jsonl", trained_by(RunFolder(trained)))
        return path

    runs = [validated_run(tmp_path / str(seed), "trained", [1, 0, 1], seed=seed) for seed in (0, 1)]
    control = evaluated("control", runs[0], 0, noise=False)
    one, again, other = (evaluated(f"e{seed}", trained, seed) for seed, trained in enumerate([*runs[:1] * 2, runs[1]]))
    with pytest.raises(DataError, match=r"the same seed \(aqn\.seed=0\): they do not count as two seeds"):
        arms([control, one, again])
    assert [run.seed for run in arms([control, one, other])[1].runs] == [0, 1]
    (runs[1] / "versions.json").write_text('{"torch": "2.12.0"}')
    late = evaluated("late", runs[1], 3)
    with pytest.raises(ConfigError, match=r"differ in more than aqn\.noise: versions\.torch"):
        arms([control, late])


def test_precision_is_one_of_two(model):
    with pytest.raises(ConfigError, match="--precision int4 is not one of mxfp4, bf16"):
        settings(find_target(model), [], None, "int4")


@pytest.fixture(
    params=[("cpu", "mxfp4"), ("cuda", "mxfp4"), ("npu", "mxfp4"), ("cpu", "mxfp8"), ("npu", "mxfp8")], ids="-".join
)
def rounded(request, tmp_path, model):
    """A run with rounded activations, whose config has what the workers were told; and the config of a run without."""
    profile, activation = request.param
    configs = []
    for wanted in ([f"aqn.mxfp4.activation={activation}", "aqn.mxfp4.cache_dequantized=true"], []):
        path = f"actor_rollout_ref.model.path={model}"
        configs.append(load_recipe("e12", [f"profile={profile}", path, *wanted]))
        tell_workers(configs[-1])
    run = open_run(tmp_path / "rounded", {})
    run.write_text("config.yaml", OmegaConf.to_yaml(configs[0], resolve=True))
    (run.checkpoints / "global_step_3" / "actor").mkdir(parents=True)
    (run.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    return find_target(run.path), *configs


def told(config):
    """Return what a config says about the layers' arithmetic, and everything that actor and engine are told."""
    actor_rollout = config.actor_rollout_ref
    engine = actor_rollout.rollout.engine_kwargs.vllm
    return parse_aqn(config).mxfp4.activation_arithmetic, actor_rollout.model.override_config, engine


def test_in_bf16_nothing_is_left_of_rounded_activations(rounded):
    target, _, plain = rounded
    config = settings(target, [], None, "bf16")
    assert not config.aqn.mxfp4.enabled
    tell_workers(config)
    assert told(config) == told(plain)
    config = settings(target, ["aqn.mxfp4.activation=mxfp4"], None, "bf16")
    with pytest.raises(ConfigError, match="needs the quantised base"):
        tell_workers(config)


def test_activations_are_rounded_as_in_the_run_unless_told_otherwise(rounded):
    target, run, plain = rounded
    config = settings(target, [], None, None)
    tell_workers(config)
    assert told(config) == told(run)
    config = settings(target, ["aqn.mxfp4.activation=none", "aqn.mxfp4.cache_dequantized=false"], None, None)
    tell_workers(config)
    assert told(config) == told(plain)


def test_an_adapter_brings_its_size(run, tmp_path):
    with pytest.raises(DataError, match="not a PEFT adapter folder"):
        settings(find_target(run.path), [], tmp_path, None)
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()  # it is opened together with the base
    config = settings(find_target(run.path), [], tmp_path, None)
    model = config.actor_rollout_ref.model
    assert (model.lora_adapter_path, model.lora_rank, model.lora_alpha) == (str(tmp_path), 4, 8)
    assert config.trainer.resume_mode == "disable"
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="use_dora=true is not plain LoRA"):
        settings(find_target(run.path), [], tmp_path, None)


def test_scores_are_columns_with_intervals_of_their_own(run):
    shares = {"accuracy": 0.25, "flexible": 0.5, "math_verify": 0.75}
    run.append("metrics.jsonl", {"kind": "validation", "step": 10, **shares, "items": 4})
    run.append("evidence.jsonl", {"kind": "base", "disk": "b"})
    run.append("evidence.jsonl", {"kind": "adapter", "step": 10, "sent": "a"})
    found = read(run, "x", "mxfp4")
    scores = {name: score.accuracy for name, score in found.scores.items()}
    assert scores == {"strict": 0.25, "flexible": 0.5, "math-verify": 0.75}
    assert found.scores["strict"].interval == pytest.approx((0.0456, 0.6994), abs=1e-3)
    assert (found.base, found.adapter, found.step, found.items) == ("b", "a", 10, 4)
    assert found.failed is None, "an older record does not tell"
    counts = {"items": 4, "answered": 3, "failed": 1}
    run.append("metrics.jsonl", {"kind": "validation", "step": 10, **shares, **counts})
    assert read(run, "x", "mxfp4").failed == 1


@pytest.mark.parametrize("samples", [1, 2])
def test_a_problem_without_any_response_counts_in_every_figure(run, samples):
    """A reward that fails for some problems (aqn.run.allow_failed) leaves them without a line."""
    counts = {"items": 100, "samples": samples, "answered": 70 * samples, "failed": 30 * samples}
    run.append("metrics.jsonl", {"kind": "validation", "step": 10, "accuracy": 0.7, **counts})
    run.append("evidence.jsonl", {"kind": "base", "disk": "b"}, {"kind": "adapter", "step": 10, "sent": "a"})
    (run.path / "validation").mkdir()
    told = {"gts": "1", "output": "", "acc": 1.0}
    lines = [{"input": f"{n}?", "item": n, "sample": k, **told} for n in range(70) for k in range(samples)]
    run.append("validation/10.jsonl", *lines)
    found = read(run, "x", "mxfp4")
    assert found.scores["strict"] == Score(0.7, pytest.approx(wilson(70, 100)))
    assert found.pass_at == {
        k: Score(0.7, pytest.approx(wilson(70, 100))) for k in ("1", "2")[: samples * (samples > 1)]
    }


SAMPLING = ["n", "do_sample", "temperature", "top_p", "top_k"]


def test_several_answers_are_drawn_as_in_training(run, model):
    for path in (run.path, model):
        target = find_target(path)
        few = ["profile=cpu"] if path == model else []
        config = settings(target, few, None, None, samples=8)
        rollout = config.actor_rollout_ref.rollout
        assert [rollout.val_kwargs[key] for key in SAMPLING] == [8, True, 1.0, rollout.top_p, rollout.top_k]
        told = [
            "actor_rollout_ref.rollout.val_kwargs.temperature=0.6",
            "actor_rollout_ref.rollout.val_kwargs.top_p=0.9",
        ]
        chosen = settings(target, [*few, *told], None, None, samples=4).actor_rollout_ref.rollout.val_kwargs
        assert [chosen[key] for key in SAMPLING[:4]] == [4, True, 0.6, 0.9]
        greedy = settings(target, few, None, None).actor_rollout_ref.rollout.val_kwargs
        assert [greedy[key] for key in SAMPLING[:3]] == [1, False, 0]


def test_of_several_answers_avg_and_pass_have_intervals_by_problem(run, monkeypatch):
    table = [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    shares = {"accuracy": 0.5, "flexible": 0.5}
    run.append("metrics.jsonl", {"kind": "validation", "step": 10, **shares, "items": 4, "samples": 4, "pass_at": {}})
    run.append("evidence.jsonl", {"kind": "base", "disk": "b"})
    run.append("evidence.jsonl", {"kind": "adapter", "step": 10, "sent": "a"})
    (run.path / "validation").mkdir()
    for item, answers in enumerate(table):
        for sample, acc in enumerate(answers):
            line = {"input": "the same prompt", "gts": "1", "output": "", "acc": acc, "item": item, "sample": sample}
            run.append("validation/10.jsonl", line)
    found = read(run, "x", "mxfp4")
    assert (found.samples, found.items) == (4, 4)
    assert {k: score.accuracy for k, score in found.pass_at.items()} == pytest.approx(
        {"1": 0.5, "2": (1 + 0 + 1 + 0.5) / 4, "4": 0.75}
    )
    strict, flexible = found.scores["strict"].interval, found.scores["flexible"].interval
    assert flexible == wilson(2, 4)  # the lines do not have it, so the widest possible interval is used
    assert wilson(8, 16)[0] > strict[0] > flexible[0]
    assert found.pass_at["1"].interval == pytest.approx(strict)
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: found if given[-1] == 4 else None)
    shown = CliRunner().invoke(app, ["eval", str(run.path), "--samples", "4"]).stdout
    assert all(text in shown for text in ("strict, avg@4", "flexible, avg@4", "strict, pass@1", "strict, pass@4"))
    assert json.loads(CliRunner().invoke(app, ["eval", "x", "--samples", "4", "--json"]).stdout)["samples"] == 4


def test_failed_responses_are_counted_among_all_responses(monkeypatch):
    score = {"strict": Score(0.5, (0.2, 0.8))}
    result = Evaluation("x", "x", "x", 0, "mxfp4", 32, score, None, "mine", samples=8, failed=40)
    monkeypatch.setattr(evaluate, "evaluate", lambda *given: result)
    shown = CliRunner().invoke(app, ["eval", "x"]).stdout
    assert "40 of 256 responses failed and count as wrong" in shown


def test_another_adapter_than_the_run_s_is_told(run):
    result = Evaluation("x", "x", "x", 10, "mxfp4", 1, {"strict": Score(1.0, (0.2, 1.0))}, None, "other")
    for sent in ({}, {"sent": None}, {"sent": ""}):  # a missing record passed without a word
        assert check_adapter(run, result).startswith("unknown: ")
        run.append("evidence.jsonl", {"kind": "adapter", "step": 10, **sent})
    run.append("evidence.jsonl", {"kind": "adapter", "step": 10, "sent": "mine"})
    with pytest.raises(EvidenceError, match="another adapter than the one recorded after step 10"):
        check_adapter(run, result)
    assert check_adapter(run, replace(result, adapter="mine")) == f"the one recorded after step 10 of {run.path}"
