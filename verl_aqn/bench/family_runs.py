"""Two steps of GRPO on a tiny model of each family, through the command line as a user would start them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from verl_aqn.bench import letters
from verl_aqn.bench.families import FAMILIES, make
from verl_aqn.errors import ConfigError

RECIPE = "e12_aggressive_1ep"
# Prompts of about 75 tokens plus 8 for the response, more than the families' window of 64. σ is 0 in the first step.
SETTINGS = (
    "profile=cpu",
    "experiment=embedded",
    f"reward.custom_reward_function.path={letters.__file__}",
    "data.train_batch_size=2",
    "data.train_max_samples=16",
    "data.val_max_samples=4",
    "data.max_response_length=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "reward.reward_kwargs.overlong_buffer_cfg.len=4",
    "trainer.total_training_steps=2",
    "trainer.save_freq=-1",
    "trainer.val_before_train=false",
    "trainer.logger=[file]",
    "aqn.noise.num_stages=2",
    "aqn.noise.probe=false",
)
ARMS = {
    "works": (),
    "without noise": ("aqn.noise.enabled=false",),
    "bf16 base only": ("aqn.mxfp4.enabled=false",),
    "bf16 base without noise only": ("aqn.mxfp4.enabled=false", "aqn.noise.enabled=false"),
}
"""Arms to try, one after another, until one runs."""
TIMEOUT_S = 600


@dataclass
class Trial:
    """Result of one arm of a family. `refused`: rejected before anything started; `error`: the error message."""

    ok: bool
    seconds: float
    refused: bool = False
    error: str = ""
    layout: str = ""
    mismatch: tuple[float, ...] = ()
    """Mean |Δ log-prob| between trainer and rollout without noise, in nats per token, by step."""
    norms: int | None = None
    """Norms found in the rollout that can carry noise, including those in front of routers."""
    expected: int | None = None
    """Number of such norms in the model that transformers builds."""


@dataclass
class Result:
    """The verdict for a family: a key of `ARMS`, "refused" or "fails".

    `why`: the error message of the first arm.
    """

    name: str
    verdict: str
    why: str
    trial: Trial


def run_families(wanted: Sequence[str], folder: Path, jobs: int, on_result: Callable[[Result], None]) -> list[Result]:
    """Run `wanted` families, `jobs` at a time. Families with a result in `folder` are not run again.

    Raises:
        ConfigError: an unknown family.
    """
    unknown = [name for name in wanted if name not in FAMILIES]
    if unknown:
        raise ConfigError(f"unknown family {unknown[0]}: use some of {', '.join(FAMILIES)}")
    folder.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> Result:
        file = folder / f"{name}.json"
        if file.is_file():
            known = json.loads(file.read_text())
            result = Result(**known | {"trial": Trial(**known["trial"])})
        else:
            result = run_family(name, folder)
            file.write_text(json.dumps(asdict(result), indent=2) + "\n")
        on_result(result)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, wanted))


def run_family(name: str, folder: Path) -> Result:
    """Make a family's model under `folder` and try the arms until one runs."""
    from verl_aqn.cache import cache_dir
    from verl_aqn.tasks.smollm2 import embedded_model

    model = folder / "models" / name
    if not (model / "config.json").is_file():
        make(name, model, embedded_model(cache_dir() / "models"))
    first: Trial | None = None
    for arm, settings in ARMS.items():
        trial = run_arm(model, folder / "runs" / name / arm.replace(" ", "-"), settings)
        first = first or trial
        if trial.ok:
            return Result(name, arm, first.error, trial)
    assert first is not None
    return Result(name, "refused" if first.refused else "fails", first.error, first)


def run_arm(model: Path, base: Path, settings: Sequence[str]) -> Trial:
    """Run two steps with `settings` and read the run's records."""
    command = [sys.executable, "-m", "verl_aqn.cli", "train", RECIPE, *SETTINGS, *settings]
    command += [f"actor_rollout_ref.model.path={model}", f"aqn.run.dir={base}"]
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ, check=False)
    except subprocess.TimeoutExpired:
        return Trial(False, time.monotonic() - began, error=f"not finished within {TIMEOUT_S} s")
    runs = sorted((base / "runs").glob("*"))
    trial = Trial(done.returncode == 0, time.monotonic() - began, refused=not runs)
    if not trial.ok:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        last = said[-1].strip() if said else (done.stderr.strip().splitlines() or ["no error message"])[-1]
        last = re.sub(r" \(log: [^)]*\)", "", last.removeprefix("error: ")).replace(str(model), model.name)
        trial.error = last.replace(str(base.parent), "RUN")  # the table is shown on other machines, too
    for record in _records(runs[-1] / "evidence.jsonl") if runs else ():
        if record["kind"] == "mismatch":
            trial.mismatch = (*trial.mismatch, record["abs_dlogp_mean"])
        elif record["kind"] == "rollout":
            trial.norms, trial.expected = len(record.get("names", ())), len(record.get("expected_norms", ()))
        elif record["kind"] == "layout":
            trial.layout = record["layout"]
    return trial


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        yield from map(json.loads, file.read_text().splitlines())


def table(results: Sequence[Result]) -> Table:
    """Return the results as a table with one row per family."""
    out = Table(title="Families: two steps of GRPO on tiny random models, on the CPU", title_justify="left")
    for column in ("family", "verdict", "layout", "mismatch, nats per token", "norms", "s"):
        out.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for result in results:
        out.add_row(*cells(result))
    return out


def markdown(results: Sequence[Result]) -> str:
    """Return the same table in Markdown."""
    rows = ["| family | verdict | layout | mismatch, nats per token | norms | s |", "|---|---|---|---|---|---|"]
    return "\n".join([*rows, *("| " + " | ".join(cells(result)) + " |" for result in results)])


def cells(result: Result) -> list[str]:
    """Return one row: family, verdict with reason, layout, mismatch by step, found of expected norms, seconds."""
    trial = result.trial
    norms = "–" if trial.norms is None else str(trial.norms)
    if trial.norms is not None and trial.expected is not None:
        norms += f" of {trial.expected}"
    return [
        result.name,
        result.verdict + (f": {result.why}" if result.why else ""),
        trial.layout or "–",
        ", ".join(f"{value:.3f}" for value in trial.mismatch) or "–",
        norms,
        f"{trial.seconds:.0f}",
    ]
