"""The main path: recipe → checks → run folder → verl in its own process → result.

Read `train` first: it shows the whole sequence.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.noise_settings import schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import Stopped, StrengthError
from verl_aqn.launch.console import Console
from verl_aqn.launch.forkserver.ahead import Ahead, ahead_of
from verl_aqn.launch.supervise import Outcome, supervise
from verl_aqn.preflight.prepare import check_steps, prepare_model, warnings_of
from verl_aqn.preflight.recipe_checks import check_machine, check_model, check_request, check_stated
from verl_aqn.preflight.run_data import data_files, prepare_data
from verl_aqn.preflight.strength_figures import Strength, read_start, store_start, stored_start
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.judge.records import VERSION
from verl_aqn.runs.provenance import checkout_fault, model_digest, own_code, provenance, unknown_code
from verl_aqn.runs.stats.arms import differences, flatten
from verl_aqn.safe_files import own_folder
from verl_aqn.terminal import progress_bar

OWN_CODE = (
    "reward.custom_reward_function.path",
    "reward.reward_manager.module.path",
    "data.custom_cls.path",
    "actor_rollout_ref.rollout.multi_turn.function_tool_path",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
)
"""Settings that name a file of the user's own whose content decides a result."""


@dataclass
class Prepared:
    """A recipe that is resolved and checked: everything that a run needs to start."""

    config: DictConfig
    steps: int
    rows: dict[str, int]
    source: Path
    fitted: Strength | None = None
    """The measurement at the σ_start that was found for `aqn.noise.target_kl`."""
    warnings: list[str] = field(default_factory=list)
    """Warnings of verl about the first rows of the data."""


def compose(recipe: str, overrides: list[str]) -> DictConfig:
    """Compose the recipe into one config and reject what is wrong in it, σ included, before any file is touched."""
    config = load_recipe(recipe, overrides)
    if (stated := config.trainer.total_training_steps) is not None:
        schedule_of(config, stated)
    return config


@contextmanager
def ready(config: DictConfig, *, fit: bool = True) -> Iterator[tuple[Prepared, Ahead | None]]:
    """Check all that can be checked without a run, and prepare its model and data as files (`resolve`).

    Yield the result and, where the run's processes are forked, the fork server, which imports meanwhile.
    """
    check_stated(config)
    with ahead_of(config) as ahead:
        check_model(config)
        yield resolve(config, fit=fit, here=True), ahead


def resolve(config: DictConfig, *, fit: bool = True, here: bool = False) -> Prepared:
    """Prepare data and model as files, and set the steps and, if the recipe gives a target KL, σ_start in `config`.

    `fit`: set σ_start; without it, a recipe can be looked at without measuring. `here`: the run starts on this machine
    now, so check the machine between the data and the model, whose quantisation takes time.
    """
    data = prepare_data(config)
    steps = check_steps(config, data.rows["train"])
    if here:
        check_machine(config)
    config.trainer.total_training_steps = steps  # for the schedule and the trainer, which stops if it finds fewer steps
    if config.trainer.test_freq < 1:
        config.trainer.test_freq = steps  # with 0 or -1 verl skips the validation after the last step, too
    source = prepare_model(config)
    fitted = None
    if fit and (noise := parse_aqn(config).noise).enabled and noise.target_kl is not None:
        from verl_aqn.preflight.probe import fit_sigma

        fitted = fit_sigma(config, steps)
    return Prepared(config, steps, data.rows, source, fitted, data.warnings)


def train(recipe: str, overrides: list[str], *, dry_run: bool = False) -> int:
    """Run a recipe to its end, or resume it if its last run did not finish. Return the exit code."""
    console = Console()
    config = compose(recipe, overrides)
    base = Path(parse_aqn(config).run.dir or f"/tmp/mxfp4_{Path(recipe).stem}").expanduser()
    if dry_run:
        check_request(config, elsewhere=True)
        prepared = resolve(config)
        for text in prepared.warnings:
            console.warn(text)
        print(OmegaConf.to_yaml(prepared.config, resolve=True))
        return 0
    own_folder(base, make=False)  # fails early, before the first minute of work
    with ready(config) as (prepared, ahead):
        run, outcome = execute(prepared, base, console, ahead)
    return console.end(run, prepared, outcome)


def execute(prepared: Prepared, base: Path, console: Console, ahead: Ahead | None = None) -> tuple[RunFolder, Outcome]:
    """Run in a folder under `base`. After a crash or a hang, resume up to `aqn.run.restarts` times.

    `ahead`: a fork server that was started before (`ahead_of`).
    """
    settings = parse_aqn(prepared.config).run
    run = open_run(base, identity(prepared.config), fresh=settings.fresh)
    changed = launch(run, prepared)
    console.start(run, prepared)
    warn(run, [*warnings_of(prepared.config), *prepared.warnings, *changed], console)
    measure_noise(run, prepared, console, ahead)
    try:
        outcome = attempt(run, console, ahead)
        for restart in range(settings.restarts if outcome.again else 0):
            console.warn(f"{outcome.message}: restart {restart + 1} of {settings.restarts}")
            run = open_run(base, identity(prepared.config))
            console.say(run.note)
            warn(run, launch(run, prepared), console)
            measure_noise(run, prepared, console)  # of a new run, which follows one that its evidence stopped
            outcome = attempt(run, console)
            if not outcome.again:
                break
    except Stopped as stop:
        raise Stopped(f"{stop}: the same command resumes this run from its last checkpoint", stop.signal) from None
    return run, outcome


def warn(run: RunFolder, texts: list[str], console: Console) -> None:
    """Record warnings and print them."""
    for text in texts:
        run.append("events.jsonl", {"kind": "warning", "text": text})
        console.warn(text)


def attempt(run: RunFolder, console: Console, ahead: Ahead | None = None) -> Outcome:
    """Make one attempt at a run and record how it ends.

    Raises:
        Stopped: a signal ended the attempt.
    """
    outcome = supervise(run, console, ahead)
    run.set_status(outcome.status, outcome.message)
    run.close()
    if outcome.status == "interrupted":
        raise Stopped(f"{outcome.message} (log: {run.log})", outcome.signal)
    return outcome


def measure_noise(run: RunFolder, prepared: Prepared, console: Console, ahead: Ahead | None = None) -> None:
    """Measure and record, once per run and before anything starts, the effect of σ_start (`aqn.noise.probe`).

    The figures are deterministic. If an earlier run had the same inputs, its figures are recorded.

    Raises:
        StrengthError: σ_start is so strong that nothing is left to learn from. The run is recorded as failed.
    """
    config = prepared.config
    noise = parse_aqn(config).noise
    if not noise.enabled or not noise.probe or noise.sigma_start == 0:
        return
    if any(record["kind"] == "strength" for record in run.read("evidence.jsonl")):
        return
    file = stored_start(identity(prepared.config), versions_now(config), config)
    figures = read_start(file)
    if figures is None:
        from verl_aqn.preflight.probe import measure_start

        console.say("measuring what σ_start does to the policy")
        if ahead:
            ahead.wait()  # two cores are too few for its imports and for this
        try:
            with progress_bar("tokens of responses:") as progress:
                figures = measure_start(config, prepared.steps, progress)
        except StrengthError as error:
            run.set_status("failed", str(error))
            raise
        store_start(file, figures)
    clean, noisy = figures
    run.add_evidence({"kind": "strength", "clean": clean.to_dict(), "noisy": noisy.to_dict()})
    console.strength(clean, noisy)


def versions_now(config: DictConfig) -> dict[str, Any]:
    """Return the versions and digests that a run of the resolved `config` would have if it started now."""
    model = config.actor_rollout_ref.model
    found = provenance(data_files(config), model.path)
    if model.lora_adapter_path:
        found["adapter"] = model_digest(Path(model.lora_adapter_path))
    if code := own_code({key: OmegaConf.select(config, key) for key in OWN_CODE}):
        found["code"] = code
    return found


def identity(config: DictConfig) -> dict:
    """Return the resolved config that identifies a run, without the folders that it is in and without its target."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    container["aqn"]["run"] = None
    container["aqn"].pop("target", None)  # changes nothing that is computed
    return container


def launch(run: RunFolder, prepared: Prepared) -> list[str]:
    """Write the config that the training process reads, and the records of the request that do not exist yet.

    Return warnings: each version in which this attempt differs from the start of the run, and what is not known of
    the code.
    """
    config = prepared.config.copy()
    config.trainer.default_local_dir = str(run.path / "checkpoints")
    config.trainer.validation_data_dir = str(run.path / "validation")
    if not config.trainer.val_only and any(r["kind"] == "validation" for r in run.read("metrics.jsonl")):
        # It is already recorded. With val_only this must stay true: otherwise verl would train.
        config.trainer.val_before_train = False
    text, versions = OmegaConf.to_yaml(config, resolve=True), versions_now(config)
    contents = {
        "config.yaml": text,
        "versions.json": json.dumps(versions, indent=2),
        "schedule.json": json.dumps(schedule_of(config, prepared.steps).table()),
    }
    quantization = Path(config.actor_rollout_ref.model.path) / "quantization.json"
    if quantization.is_file():  # absent with a bf16 base, or with one that another tool packed
        contents[quantization.name] = quantization.read_text()
    began = run.block("versions.json")  # None in the first attempt
    for name, content in contents.items():
        if not (run.path / name).exists():  # a resumed run has them, unless it died before its launch
            run.write_text(name, content)
    run.replace_text("launch.yaml", text)  # the config of the newest attempt
    run.append("events.jsonl", {"kind": "attempt", **run.state, "versions": versions, "evidence": VERSION})
    changed = differences(flatten(began or versions), flatten(versions))
    unknown = [f"the commit of this run's code is not known: {fault}"] if (fault := checkout_fault()) else []
    if began and not {"commit", "dirty"} & changed.keys() and (why := unknown_code(versions)):
        unknown.append(f"the code may have changed since the run began, which cannot be checked: {why}")
    return unknown + [
        f"{key} changed from {was} to {now} since the run began: `compare` will reject this run"
        for key, (was, now) in changed.items()
    ]
