"""Measure the accuracy of a run, a checkpoint or a model folder with verl's own validation, without training.

The process is the same as for a run (trainer, engines, agent loop, reward and evidence), but it validates and stops:
the base is packed as in the rollout, the adapter is unmerged, and clean norms are read back before anything is
generated.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from verl_aqn.cache import cache_dir
from verl_aqn.config.allowed import check_names, check_numbers
from verl_aqn.config.compose import followers, load_recipe, unknown_key
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.verl_keys import check_keys
from verl_aqn.errors import AqnError, ConfigError, DataError, EnvironmentFault, EvidenceError, first_line
from verl_aqn.launch.console import RULES, Console
from verl_aqn.launch.train import attempt, identity, launch, ready
from verl_aqn.preflight.prepare import untell_workers
from verl_aqn.runs.checkpoints import config_of, find_checkpoint
from verl_aqn.runs.evidence import check_proved
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.stats.arms import run_in, versions_of
from verl_aqn.runs.stats.intervals import samples_of, score_interval, wilson
from verl_aqn.runs.stats.passk import ks
from verl_aqn.runs.stats.scores import answers_in
from verl_aqn.safe_files import own_folder

PRECISIONS = ("mxfp4", "bf16")
_LENGTHS = ("data.max_prompt_length=", "data.max_response_length=")
_ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Score:
    """The share of right responses by one rule (avg@k), or pass@k, as a fraction of 1, with its 95 % interval.

    The interval is Wilson's for one response each, and `score_interval`, clustered by problem, for several.
    """

    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and the result.

    `items` problems are in `file`, with a JSON line for each of their `samples` responses. `scores`, by rule, are means
    over all responses. `pass_at`, by k, is for the rule "strict"; {} with one response each. `failed`: responses that
    are missing and count as wrong (None: an older record without this number). `step`: RL steps of the adapter. `base`
    and `adapter`: actual digests in the rollout; None for an unquantised base. `run`: the folder of the evaluation,
    a run folder like any other. `adapter_is`: what the digest of the adapter was compared with, in words, or that it
    was not compared.
    """

    target: str
    run: str
    file: str
    step: int
    precision: str
    items: int
    scores: dict[str, Score]
    base: str | None
    adapter: str
    samples: int = 1
    pass_at: dict[str, Score] = field(default_factory=dict)
    failed: int | None = None
    adapter_is: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """What to evaluate: a model folder, or a checkpoint of a run."""

    path: Path
    run: RunFolder | None = None
    checkpoint: Path | None = None


def find_target(path: Path) -> Target:
    """Find a checkpoint (global_step_N), a run or experiment folder (its last checkpoint), or a model folder.

    Raises:
        DataError: the path is none of these, or a run without a complete checkpoint.
    """
    path = path.expanduser()
    if (path / "config.json").is_file():
        return Target(path.resolve())
    if run_in(path) is None and not path.resolve().name.startswith("global_step_"):
        raise DataError(f"{path} is not a run, a checkpoint or a model folder (no config.json): give one of them")
    run, step = find_checkpoint(path)
    return Target(path.resolve(), run, run.checkpoints / f"global_step_{step}")


def settings(
    target: Target, overrides: list[str], adapter: Path | None, precision: str | None, samples: int | None = None
) -> DictConfig:
    """Return the config of a run that only validates.

    A run's own config with its noise block untouched, so that two evaluations differ in what their runs differ in; for
    a model folder the recipe `base` without noise. `precision` None is that of the run, or of the folder; in bf16
    nothing rounds activations, whatever the run did. `samples` answers to each problem are drawn as in training
    (temperature, top-p and top-k of the rollout) unless `overrides` say otherwise; None is what the run or the recipe
    has.
    """
    if precision not in (None, *PRECISIONS):
        raise ConfigError(f"--precision {precision} is not one of {', '.join(PRECISIONS)}")
    if samples is not None:
        told = {"n": samples, "do_sample": "true"}
        told |= {key: f"${{{_ROLLOUT}.{key}}}" for key in ("temperature", "top_p", "top_k")}
        overrides = [*(f"{_ROLLOUT}.val_kwargs.{key}={value}" for key, value in told.items()), *overrides]
    if target.run:
        config = config_of(target.run)
        untell_workers(config)
        if precision == "bf16":  # before the overrides, so that a contradiction between them is an error
            config.aqn.mxfp4.activation, config.aqn.mxfp4.cache_dequantized = "none", False
        config = with_overrides(config, overrides)
        if any(override.startswith(_LENGTHS) for override in overrides):
            config.actor_rollout_ref.rollout.max_model_len = None  # computed again, so that it fits both lengths
            config = with_overrides(config, [o for o in overrides if "max_model_len=" in o])
    else:
        config = load_recipe("base", ["aqn.noise.enabled=false", *overrides])
        if not any(override.startswith("actor_rollout_ref.model.path=") for override in overrides):
            config.actor_rollout_ref.model.path = str(target.path)  # not as an override, which Hydra would parse
    OmegaConf.set_struct(config, False)
    trainer = config.trainer
    trainer.val_only = trainer.val_before_train = True
    trainer.save_freq, trainer.logger = -1, ["console"]
    trainer.resume_mode = "resume_path" if target.checkpoint and not adapter else "disable"
    trainer.resume_from_path = str(target.checkpoint) if target.checkpoint and not adapter else None
    # Load only the adapter of the checkpoint: with a bf16 base the optimizer has other parameters than with a packed
    # one.
    config.actor_rollout_ref.actor.checkpoint.load_contents = ["model"]
    config.aqn.noise.probe = False
    config.algorithm.adv_estimator, config.critic.enable = "grpo", None  # validation needs no critic
    model = config.actor_rollout_ref.model
    if adapter:
        from verl_aqn.preflight.adapter_folder import read_config

        model.lora_adapter_path = str(adapter.expanduser().resolve())
        # With these values `prepare_model` does not reject the adapter because of the recipe's; it reads the exact ones
        # from the tensors.
        told = read_config(Path(model.lora_adapter_path))
        model.lora_rank, model.lora_alpha = told["r"], told["lora_alpha"]
    base = Path(str(model.path))
    packed = _is_packed(base)
    if packed and target.run:  # its base is already rounded by these settings
        for key, value in (("calibrate", []), ("keep.worst", 0.0)):
            if not any(override.startswith(f"aqn.mxfp4.{key.partition('.')[0]}") for override in overrides):
                OmegaConf.update(config, f"aqn.mxfp4.{key}", value)
    if packed and precision == "bf16":
        from verl_aqn.checkpoints.cached import check_made, dequantized_cache

        check_made(base)
        model.path = str(dequantized_cache(base, cache_dir() / "bf16"))
    if precision or not target.run:
        config.aqn.mxfp4.enabled = packed if precision is None else precision == "mxfp4"
    return config


def evaluate(
    path: Path,
    overrides: list[str],
    adapter: Path | None = None,
    precision: str | None = None,
    samples: int | None = None,
) -> Evaluation:
    """Validate once, in a new run folder in the aqn.run.dir of `overrides`; `samples` is as in `settings`.

    By default the folder is in `evaluations/` in the run, or in /tmp/mxfp4_eval_NAME for a model folder.

    Raises:
        EvidenceError: the evidence of the run has a fault, or the rollout had another adapter than its run recorded.
        AqnError: the evaluation failed, or was stopped.
    """
    target, console = find_target(path), Console()
    trained = None if adapter else target.run
    if trained:
        check_proved(trained)
    config = settings(target, overrides, adapter, precision, samples)
    named = any(override.startswith("aqn.run.dir=") for override in overrides) and parse_aqn(config).run.dir
    usual = target.run.path / "evaluations" if target.run else Path(f"/tmp/mxfp4_eval_{target.path.name}")
    base = Path(named).expanduser() if named else usual
    own_folder(base, make=False)
    OmegaConf.update(config, "aqn.run.dir", str(base))
    with ready(config, fit=False) as (prepared, ahead):
        run = open_run(base, identity(prepared.config), fresh=True)
        launch(run, prepared)
        if trained:
            run.append("events.jsonl", trained_by(trained))
        used = "mxfp4" if parse_aqn(config).mxfp4.enabled else "bf16"
        console.say(f"run      {run.path}")
        console.say(f"model    {config.actor_rollout_ref.model.path} ({used})")
        console.say(f"adapter  {adapter or target.checkpoint or 'none'}, unmerged")
        console.say(f"data     {prepared.rows['test']:,} validation prompts, noise off")
        for text in prepared.warnings:
            console.warn(text)
        outcome = attempt(run, console, ahead)
    if outcome.status != "finished":
        raise AqnError(f"{outcome.message} (log: {run.log})")
    result = read(run, str(path), used)
    if adapter:
        result = replace(result, adapter_is=check_folder(config, result))
    if target.run:
        if not adapter:
            result = replace(result, adapter_is=check_adapter(target.run, result))
        try:
            target.run.append("evaluations.jsonl", result.to_dict())
        except EnvironmentFault as error:  # the run's folder is read-only
            console.warn(f"the result was not recorded in the run: {error}")
    return result


def trained_by(run: RunFolder) -> dict[str, Any]:
    """Return the event of an evaluation that says what trained the policy, for `compare`.

    The versions count beside those of the evaluation, and the seed instead of its own: two evaluations of one run are
    not two seeds.
    """
    seed, versions = config_of(run).aqn.seed, versions_of(run.path)
    return {"kind": "evaluated", "run": str(run.path), "seed": seed, "versions": versions}


def read(run: RunFolder, target: str, precision: str) -> Evaluation:
    """Read the result of a finished evaluation from its folder."""
    (validation,) = run.by_step("metrics.jsonl", "validation").values()
    file = run.path / "validation" / f"{validation['step']}.jsonl"
    items, samples = validation["items"], samples_of(validation)
    lines = list(run.read(f"validation/{validation['step']}.jsonl"))
    scores = {
        rule: Score(validation[key], _interval(lines, key, validation))
        for rule, key in RULES.items()
        if key in validation
    }
    passed = {}
    if samples > 1:
        answers = answers_in(lines, record=validation)
        for k in ks(samples):
            each = answers.values(f"pass@{k}")
            passed[str(k)] = Score(sum(each) / len(each), score_interval(each, samples))
    evidence = {record["kind"]: record for record in run.read("evidence.jsonl")}
    return Evaluation(
        target, str(run.path), str(file), validation["step"], precision, items, scores,
        evidence["base"].get("disk"), evidence["adapter"]["sent"], samples=samples, pass_at=passed,
        failed=validation.get("failed"),
    )  # fmt: skip


def _interval(lines: list[dict[str, Any]], key: str, validation: dict[str, Any]) -> tuple[float, float]:
    """Return the interval by problem, or the widest possible interval if the lines do not identify the problems."""
    try:
        answers = answers_in(lines, "acc" if key == "accuracy" else key, validation)
    except DataError:
        return wilson(validation[key] * validation["items"], validation["items"])
    return score_interval(answers.values(), answers.samples)


def check_adapter(run: RunFolder, result: Evaluation) -> str:
    """Check that the evaluated adapter is the one that the run had after that step, and return a description of it.

    Raises:
        EvidenceError: it is another adapter.
    """
    after = run.by_step("evidence.jsonl", "adapter").get(result.step) or {}
    if not after.get("sent"):
        return f"unknown: {run.path} did not record the adapter of step {result.step}, so it was not checked"
    if after["sent"] != result.adapter:
        raise EvidenceError(
            f"{result.run} evaluated another adapter than the one recorded after step {result.step} of {run.path}"
        )
    return f"the one recorded after step {result.step} of {run.path}"


def check_folder(config: DictConfig, result: Evaluation) -> str:
    """Check that the evaluated adapter is the one in the folder, with PEFT's scalings, and return a description of it.

    Raises EvidenceError if it is another adapter.
    """
    from verl_aqn.preflight.adapter_folder import read_folder

    model = config.actor_rollout_ref.model
    if read_folder(Path(model.lora_adapter_path), Path(model.path)).digest() != result.adapter:
        raise EvidenceError(f"{result.run} evaluated another adapter than the one in {model.lora_adapter_path}")
    return f"the one in {model.lora_adapter_path}"


def with_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Return a run's `config` with key=value on top; settings that copy such a key in the recipe are changed too.

    Raises:
        ConfigError: `config` does not have a key (the message has the nearest valid key), or a value is invalid.
    """
    OmegaConf.set_struct(config, True)
    recorded = {
        override.partition("=")[0]: OmegaConf.select(config, override.partition("=")[0]) for override in overrides
    }
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        key = override.partition("=")[0]
        try:
            before = OmegaConf.select(config, key)
            config.merge_with_dotlist([override])
            _follow(config, key, before)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise ConfigError(unknown_key(key, OmegaConf.to_container(config))) from error
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{override}: {first_line(error)}") from error
    parse_aqn(config)
    check_numbers(config)
    check_names(config)
    usual = config.copy()  # the values that were not overridden, and those that follow an override
    for key, value in recorded.items():
        OmegaConf.update(usual, key, value, merge=False)
    check_keys(config, OmegaConf.to_container(usual))
    return config


def _follow(config: DictConfig, key: str, before: Any) -> None:
    """Give the keys that take their value from `key`, and so had the value `before` too, the present value of `key`."""
    for other, source in followers("base", config.aqn.profile).items():
        if source == key and (value := OmegaConf.select(config, other)) is not None and value == before:
            OmegaConf.update(config, other, OmegaConf.select(config, key))
            _follow(config, other, before)


def _is_packed(base: Path) -> bool:
    from verl_aqn.checkpoints.packing import is_packed

    return base.is_dir() and is_packed(base)
