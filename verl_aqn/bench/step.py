"""The whole RL step beside stock verl: same machine, model, prompts, seed and number of generated tokens.

Each arm is a run in its own processes, as a user would start it. The arms take turns in each round.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from verl_aqn.bench.arm_processes import ArmProcesses
from verl_aqn.cluster.process_environment import engine_environment, local_ray
from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs.processes import SharedMemory, adopt_orphans, end_descendants, start_module
from verl_aqn.runs.tail import Tail

ARMS = ("ours", "stock tuned", "stock")
PHASES = {"generation": "gen", "log-probs": "old_log_prob", "update": "update_actor", "sync": "update_weights"}
RECIPE = "e12_aggressive_1ep"
SYNCED_LOG = "VERL_AQN_BENCH_SYNCED"
"""Environment variable: the file where stock's engine records the bytes it sent (`verl_aqn/bench/stock_run.py`)."""
WORKLOADS = {"24": (), "192": (4, 4, 192), "512": (2, 8, 512)}
"""Tokens of a response → prompts, responses to each and tokens of each; () is the recipe's 6 × 8 of 24."""
_PROMPT = 256  # tokens; enough for GSM8K's prompts too


@dataclass
class Arm:
    """Measurements of one run: seconds by phase of each step after the first, start-up time and memory."""

    steps: list[dict[str, float]] = field(default_factory=list)
    start_s: float = 0.0
    """From the call to the beginning of the first step, including a validation of a few prompts."""
    synced: int = 0
    """Bytes that the last sync sent to each replica of the rollout."""
    peak: dict[str, int] = field(default_factory=dict)
    """Bytes: resident memory of `actor` and `rollout`; `all`: decrease of the machine's available memory."""


def batch_of(prompts: int, samples: int) -> list[str]:
    """Return the overrides of a batch that is one mini-batch: prompts, and responses to each."""
    return [
        f"data.train_batch_size={prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"actor_rollout_ref.rollout.n={samples}",
    ]


def sizes_of(workload: str) -> list[str]:
    """Return the overrides of a workload: batch, responses, and lengths."""
    if not (told := WORKLOADS[workload]):
        return []
    prompts, samples, tokens = told
    return [
        *batch_of(prompts, samples),
        f"data.max_prompt_length={_PROMPT}",
        f"data.max_response_length={tokens}",
        f"actor_rollout_ref.rollout.max_model_len={_PROMPT + tokens}",
        "reward.reward_kwargs.overlong_buffer_cfg.len=32",
    ]


def overrides(model: str, steps: int, small: bool, workload: str = "24") -> list[str]:
    """Return the overrides of all arms. All responses have full length, so that arms generate as many tokens."""
    return [
        "profile=cpu",
        "experiment=embedded",
        f"actor_rollout_ref.model.path={model}",
        *sizes_of(workload),
        *(batch_of(2, 4) if small else ()),
        "actor_rollout_ref.rollout.ignore_eos=true",
        f"trainer.total_training_steps={steps + 1}",
        "data.val_max_samples=8",
        "trainer.test_freq=1000",
        "trainer.save_freq=-1",
        "trainer.logger=[file]",
    ]


def check(settings: list[str]) -> None:
    """Check the settings and the model of all arms, and raise before the first arm starts."""
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.preflight.prepare import find_model

    find_model(load_recipe(RECIPE, settings), weights=False)


def stock_config(settings: list[str], *, tuned: bool) -> DictConfig:
    """Return the same task for verl's own trainer: bf16 base, bf16 LoRA, verl's settings except what a CPU needs.

    `tuned`: also with our profile's settings for threads, processes and cache.
    """
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.launch.train import resolve

    # The recipe enables MXFP4 and noise; stock verl has neither.
    config = load_recipe(RECIPE, [*settings, "aqn.mxfp4.enabled=false", "aqn.noise.enabled=false"])
    config = resolve(config).config
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    OmegaConf.set_struct(config, False)
    model.external_lib = "verl_aqn.bench.stock_run"
    model.override_config = {"attn_implementation": "sdpa"}
    config.actor_rollout_ref.actor.fsdp_config.model_dtype = "bf16"
    kwargs = dict(rollout.engine_kwargs.vllm)
    kwargs.pop("worker_extension_cls")
    if not tuned:
        kwargs.pop("block_size")
        rollout.agent.num_workers = 8
    rollout.engine_kwargs.vllm = kwargs
    OmegaConf.resolve(config)
    config.pop("aqn")
    return config


def command(name: str, settings: list[str], folder: Path, temporary: str) -> tuple[str, list[str], dict[str, str]]:
    """Return what starts an arm's run: module, arguments, environment."""
    if name == "ours":
        arguments = ["train", RECIPE, *settings, "aqn.noise.probe=false", f"aqn.run.dir={folder}"]
        return "verl_aqn.cli", arguments, dict(os.environ)
    config = stock_config(settings, tuned=name == "stock tuned")
    config.trainer.default_local_dir = str(folder / "checkpoints")
    (path := folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    env = engine_environment(temporary, cpu=True, ranks=1) | local_ray(temporary)
    env |= {"VLLM_PLUGINS": "", SYNCED_LOG: str(folder / "synced.txt")}  # without our plugin
    if name == "stock":
        del env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"]
    return "verl_aqn.bench.stock_run", [str(path)], env


def run_arm(name: str, settings: list[str], folder: Path, on_step: Callable[[], None]) -> Arm:
    """Run an arm once.

    Raises:
        EnvironmentFault: the run failed.
    """
    adopt_orphans()
    begun, arm = time.time(), Arm()
    tracked, log = Tail(folder / "tracked.jsonl"), folder / "log.txt"
    with tempfile.TemporaryDirectory(prefix="aqn-", dir="/tmp") as temporary:
        module, arguments, env = command(name, settings, folder, temporary)
        process = start_module(module, arguments, env | {"VERL_FILE_LOGGER_PATH": str(tracked.path)}, log)
        try:
            memory = SharedMemory(Path(temporary))
            with ArmProcesses(arm.peak) as processes:
                while process.poll() is None:
                    time.sleep(0.2)
                    processes.raise_if_missing(f"bench step: {name}, see {log}")
                    for record in tracked.new():
                        if "timing_s/step" in record["data"]:
                            add_step(arm, record["data"], time.time() - begun)
                            on_step()
        finally:
            memory.look()
            end_descendants()
            memory.remove(begun)
    if process.returncode:
        raise EnvironmentFault(f"bench step: {name} ended with exit code {process.returncode}: see {log}")
    if name == "ours":
        runs = list(folder.glob("runs/*/events.jsonl"))
        if len(runs) != 1:
            raise EnvironmentFault(f"bench step: {name} ended with {len(runs)} runs in {folder}, not one: see {log}")
        run = runs[0].parent
        add_evidence(arm, run / "events.jsonl")
        arm.synced = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]["aqn/synced_bytes"]
    else:
        arm.synced = int((folder / "synced.txt").read_text().split()[-1])
    return arm


def add_step(arm: Arm, data: dict[str, float], after: float) -> None:
    """Add a step that ended `after` seconds after the start. The first step is the warm-up."""
    if not arm.start_s:
        arm.start_s = after - data["timing_s/step"]
    else:
        arm.steps.append(seconds(data))


def seconds(data: dict[str, float]) -> dict[str, float]:
    """Return seconds of one step by phase, of the whole step (without a validation), and its tokens.

    verl's generation timer includes our rescoring without noise, which is subtracted.
    """
    found = {phase: data[f"timing_s/{key}"] for phase, key in PHASES.items()}
    if rescoring := data.get("timing_s/rescore"):
        found["generation"] -= rescoring
        found["rescoring"] = rescoring
    found["step"] = data["timing_s/step"]
    found["tokens"] = data["perf/total_num_tokens"]
    return found


def add_evidence(arm: Arm, events: Path) -> None:
    """Add the seconds per step for noise and reading back.

    These are the time of the noise phase before generation, and the part of the sync phase that is not verl's own.
    """
    doing = [one for one in map(json.loads, events.read_text().splitlines()) if one["kind"] == "doing"]
    spent: dict[int, float] = {}
    for one, after in pairwise(doing):
        if one["phase"] in ("noise", "sync") and one["step"]:
            spent[one["step"]] = spent.get(one["step"], 0.0) + after["time"] - one["time"]
    for number, step in enumerate(arm.steps, 2):
        step["noise and evidence"] = spent[number] - step["sync"]


def measure(
    settings: list[str],
    steps: int,
    rounds: int,
    base: Path,
    on_step: Callable[[int], None],
    names: Sequence[str] = ARMS,
) -> dict:
    """Run the arms in turn, `steps` measured steps each, for `rounds` rounds. Return what `table` shows.

    If stock verl fails, the result has the other arms, and `failed` says how: its arm of this name is not run again.

    `settings`: the `overrides` of all arms. `base`: a folder for the runs. `on_step` gets the number of finished steps.
    `names`: the arms, ours first.

    Raises:
        EnvironmentFault: our own run failed.
    """
    from verl_aqn.bench.codec_speed import device_name
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.preflight.recipe_checks import recipe_shape

    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_step(done)

    runs: dict[str, list[Arm]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in names:
            if name in failed:
                continue
            folder = base / f"{number + 1}-{name.replace(' ', '-')}"
            folder.mkdir(parents=True)
            try:
                runs[name].append(run_arm(name, settings, folder, count))
            except EnvironmentFault as error:
                if name == "ours":
                    raise
                failed[name] = str(error)
    config = load_recipe(RECIPE, settings)
    arms = {name: summary(of_arm) for name, of_arm in runs.items() if of_arm}
    against = {
        name: {key: arms["ours"][key] / value for key, value in arms[name].items() if key in arms["ours"]}
        for name in [*arms][1:]
    }
    return {
        "device": device_name("cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "model": Path(config.actor_rollout_ref.model.path).name,
        "steps": steps * rounds,
        "arms": arms,
        "ours_of": against,
        "failed": failed,
        "synced_of_bf16_weights": arms["ours"]["synced"] / (2 * recipe_shape(config).parameters),
        "runs": {name: [vars(arm) for arm in of_arm] for name, of_arm in runs.items()},
    }


def summary(runs: list[Arm]) -> dict[str, float]:
    """Return medians over all measured steps (seconds) and runs (start, bytes synced), and the largest peaks."""
    steps = [step for arm in runs for step in arm.steps]
    found = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
    found["tokens/s"] = statistics.median(step["tokens"] / step["step"] for step in steps)
    found["start"] = statistics.median(arm.start_s for arm in runs)
    found["synced"] = statistics.median(arm.synced for arm in runs)
    return found | {f"memory: {kind}": max(arm.peak[kind] for arm in runs) for kind in ("actor", "rollout", "all")}


def table(result: dict) -> Table:
    """Return a table with one row per figure: each arm's value, and ours relative to each other arm."""
    view = Table(
        title=f"RL step of {result['model']}, {result['cores']} cores of {result['device']}, medians of "
        f"{result['steps']} steps per arm",
        title_justify="left",
    )
    view.add_column("")
    names = list(result["arms"])
    for name in (*names, *(f"ours of {name}'s" for name in names[1:])):
        view.add_column(name, justify="right")
    for key, ours in result["arms"]["ours"].items():
        cells = [shown(key, result["arms"][name].get(key)) for name in names]
        ratios = [result["ours_of"][name].get(key) for name in names[1:]]
        view.add_row(label(key), *cells, *(f"{ratio:.2f}" if ratio else "" for ratio in ratios))
        if key in ("rescoring", "noise and evidence"):
            share = ours / result["arms"]["ours"]["step"]
            view.add_row("… of the step", f"{share:.2%}", *[""] * (len(view.columns) - 2))
    return view


def label(key: str) -> str:
    """Return the name of a figure of `summary` with its unit."""
    if key.startswith("memory"):
        return f"{key}, GB"
    if key == "synced":
        return "bytes synced, MB"
    return key if key in ("tokens", "tokens/s") else f"{key}, s"


def shown(key: str, value: float | None) -> str:
    """Return a value as text in that unit; "" if an arm does not have it."""
    if value is None:
        return ""
    if key.startswith("memory"):
        return f"{value / 1e9:.1f}"
    if key == "synced":
        return f"{value / 1e6:.1f}"
    return f"{value:,.0f}" if key in ("tokens", "tokens/s") else f"{value:.2f}"
