"""Accuracy of a run, a checkpoint or a model folder: verl's own validation, in the rollout, without a step of training.

The process is that of a run (the same trainer, engines, agent loop, reward and evidence), told to validate and stop:
the base is packed as in the rollout, the adapter is unmerged, clean norms are read back before anything is answered.
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
from verl_aqn.launch.train import attempt, identity, launch, resolve
from verl_aqn.preflight.prepare import untell_workers
from verl_aqn.preflight.recipe_checks import check_machine
from verl_aqn.runs.checkpoints import config_of, find_checkpoint
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.stats.arms import run_in
from verl_aqn.runs.stats.intervals import samples_of, score_interval, wilson
from verl_aqn.runs.stats.passk import ks
from verl_aqn.runs.stats.scores import answers_in
from verl_aqn.safe_files import own_folder

PRECISIONS = ("mxfp4", "bf16")
_LENGTHS = ("data.max_prompt_length=", "data.max_response_length=")
_ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Score:
    """Right answers by one rule (avg@k), or pass@k, as a fraction of 1, with its 95 % interval.

    Of one answer each: Wilson's. Of several: `score_interval`, clustered by problem.
    """

    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated and how it went. `items` problems are in `file`, a JSON line for each of `samples` answers.

    `scores`, by rule, are means over all answers. `pass_at`, by k, is of the rule "strict"; {} of one answer each.

    `failed` of their answers never came and count as wrong (None: an older record, which does not tell).
    `step`: RL steps behind the adapter. `base` and `adapter`: digests of what the rollout held; None for an
    unquantised base. `run`: the folder of the evaluation, a run folder like any other. `adapter_is`: what the digest of
    the adapter was held against, in words; that it was held against nothing is said too.
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
    """A checkpoint (global_step_N), a run or experiment folder (its last checkpoint), or a model folder.

    Raises:
        DataError: it is none of these, or a run without a checkpoint that was written to its end.
    """
    path = path.expanduser()
    if (path / "config.json").is_file():
        return Target(path.resolve())
    if run_in(path) is None and not path.resolve().name.startswith("global_step_"):
        raise DataError(f"{path} is no run, no checkpoint and no model folder (no config.json): give one of them")
    run, step = find_checkpoint(path)
    return Target(path.resolve(), run, run.checkpoints / f"global_step_{step}")


def settings(
    target: Target, overrides: list[str], adapter: Path | None, precision: str | None, samples: int | None = None
) -> DictConfig:
    """The config of a run that only validates.

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
        if precision == "bf16":  # before the overrides: who asks for both is told that it cannot be
            config.aqn.mxfp4.activation, config.aqn.mxfp4.keep_dense = "none", False
        config = with_overrides(config, overrides)
        if any(override.startswith(_LENGTHS) for override in overrides):
            config.actor_rollout_ref.rollout.max_model_len = None  # anew, to hold both
            config = with_overrides(config, [o for o in overrides if "max_model_len=" in o])
    else:
        config = load_recipe("base", ["aqn.noise.enabled=false", *overrides])
        if not any(override.startswith("actor_rollout_ref.model.path=") for override in overrides):
            config.actor_rollout_ref.model.path = str(target.path)  # as an override Hydra would parse it
    OmegaConf.set_struct(config, False)
    trainer = config.trainer
    trainer.val_only = trainer.val_before_train = True
    trainer.save_freq, trainer.logger = -1, ["console"]
    trainer.resume_mode = "resume_path" if target.checkpoint and not adapter else "disable"
    trainer.resume_from_path = str(target.checkpoint) if target.checkpoint and not adapter else None
    # Of the checkpoint only the adapter: over a bf16 base the optimiser has other parameters than over a packed one.
    config.actor_rollout_ref.actor.checkpoint.load_contents = ["model"]
    config.aqn.noise.probe = False
    config.algorithm.adv_estimator = "grpo"  # a critic has nothing to say about answers
    model = config.actor_rollout_ref.model
    if adapter:
        from verl_aqn.preflight.adapter_folder import read_config

        model.lora_adapter_path = str(adapter.expanduser().resolve())
        # With these `prepare_model` does not refuse it for the recipe's; it takes the very ones from the tensors.
        told = read_config(Path(model.lora_adapter_path))
        model.lora_rank, model.lora_alpha = told["r"], told["lora_alpha"]
    base = Path(str(model.path))
    if (packed := _is_packed(base)) and precision == "bf16":
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
    """Validate once, in a new run folder in aqn.run.dir of `overrides`; `samples` as in `settings`.

    By default that is `evaluations/` in the run, or /tmp/mxfp4_eval_NAME for a model folder.

    Raises:
        EvidenceError: the rollout held another adapter than the run that it is of had recorded.
        AqnError: the evaluation failed, or was stopped.
    """
    target, console = find_target(path), Console()
    config = settings(target, overrides, adapter, precision, samples)
    named = any(override.startswith("aqn.run.dir=") for override in overrides) and parse_aqn(config).run.dir
    usual = target.run.path / "evaluations" if target.run else Path(f"/tmp/mxfp4_eval_{target.path.name}")
    base = Path(named).expanduser() if named else usual
    own_folder(base, make=False)
    check_machine(config)
    todo = resolve(config, fit=False)
    run = open_run(base, identity(todo.config), fresh=True)
    launch(run, todo)
    used = "mxfp4" if parse_aqn(config).mxfp4.enabled else "bf16"
    console.say(f"run      {run.path}")
    console.say(f"model    {config.actor_rollout_ref.model.path} ({used})")
    console.say(f"adapter  {adapter or target.checkpoint or 'none'}, unmerged")
    console.say(f"data     {todo.rows['test']:,} validation prompts, noise off")
    for text in todo.warnings:
        console.warn(text)
    outcome = attempt(run, console)
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
        except EnvironmentFault as error:  # a folder that is kept read-only
            console.warn(f"not on record in the run: {error}")
    return result


def read(run: RunFolder, target: str, precision: str) -> Evaluation:
    """The result of a finished evaluation out of its folder."""
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
        answers = answers_in(lines, samples=samples)
        for k in ks(samples):
            each = list(answers.scores(f"pass@{k}").values())
            passed[str(k)] = Score(sum(each) / len(each), score_interval(each, samples))
    evidence = {record["kind"]: record for record in run.read("evidence.jsonl")}
    return Evaluation(
        target, str(run.path), str(file), validation["step"], precision, items, scores,
        evidence["base"].get("disk"), evidence["adapter"]["sent"], samples=samples, pass_at=passed,
        failed=validation.get("failed"),
    )  # fmt: skip


def _interval(lines: list[dict[str, Any]], key: str, validation: dict[str, Any]) -> tuple[float, float]:
    """By problem where the lines tell them apart; else the widest that such a share of so many problems can have."""
    try:
        answers = answers_in(lines, "acc" if key == "accuracy" else key, validation.get("samples"))
    except DataError:
        return wilson(validation[key] * validation["items"], validation["items"])
    return score_interval(list(answers.scores().values()), answers.samples)


def check_adapter(run: RunFolder, result: Evaluation) -> str:
    """Check that the adapter that was evaluated is the one that the run had after that step. Returns what was found.

    Raises:
        EvidenceError: it is another one.
    """
    after = run.by_step("evidence.jsonl", "adapter").get(result.step) or {}
    if not after.get("sent"):
        return f"not on record: {run.path} did not record the adapter of step {result.step}, so it was not checked"
    if after["sent"] != result.adapter:
        raise EvidenceError(
            f"{result.run} evaluated another adapter than the one on record after step {result.step} of {run.path}"
        )
    return f"the one on record after step {result.step} of {run.path}"


def check_folder(config: DictConfig, result: Evaluation) -> str:
    """Check that the adapter that was evaluated is the one in the folder, with the scalings that PEFT gives it.

    Returns what was found. Raises EvidenceError where it is another one.
    """
    from verl_aqn.preflight.adapter_folder import read_folder

    model = config.actor_rollout_ref.model
    if read_folder(Path(model.lora_adapter_path), Path(model.path)).digest() != result.adapter:
        raise EvidenceError(f"{result.run} evaluated another adapter than the one in {model.lora_adapter_path}")
    return f"the one in {model.lora_adapter_path}"


def with_overrides(config: DictConfig, overrides: list[str]) -> DictConfig:
    """A run's `config` with key=value on top; settings that followed such a key in the recipe follow it here.

    Raises:
        ConfigError: a key that `config` has not, with the nearest that it has; a value that cannot be.
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
    usual = config.copy()  # what was not asked for, and what follows what was
    for key, value in recorded.items():
        OmegaConf.update(usual, key, value, merge=False)
    check_keys(config, OmegaConf.to_container(usual))
    return config


def _follow(config: DictConfig, key: str, before: Any) -> None:
    """Set what takes its value from `key`, and so held `before` too, to what `key` holds now."""
    for other, source in followers("base", config.aqn.profile).items():
        if source == key and (held := OmegaConf.select(config, other)) is not None and held == before:
            OmegaConf.update(config, other, OmegaConf.select(config, key))
            _follow(config, other, before)


def _is_packed(base: Path) -> bool:
    from verl_aqn.checkpoints.packing import is_packed

    return base.is_dir() and is_packed(base)
