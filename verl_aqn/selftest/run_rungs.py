"""Rungs of a whole run: two steps of GRPO with all evidence, and the memory that they took."""

from pathlib import Path
from typing import Any

from verl_aqn.bench import letters
from verl_aqn.launch.train import train
from verl_aqn.preflight.recipe_checks import memory_of, recipe_shape
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.old_names import load_recorded
from verl_aqn.runs.run_list import find_runs
from verl_aqn.selftest import small_model
from verl_aqn.selftest.rung import Broken, Context, Reading
from verl_aqn.selftest.setting_up import RECIPE, overrides

# σ is 0 in the first step and above 0 in the second. The reward has variance for a model that knows nothing.
SETTINGS = (
    f"reward.custom_reward_function.path={letters.__file__}",
    "data.train_batch_size=2",
    "data.train_max_samples=16",
    "data.val_max_samples=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_num_seqs=16",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=2",
    "trainer.save_freq=-1",
    "trainer.val_before_train=false",
    "trainer.logger=[file]",
    "aqn.noise.num_stages=2",
    "aqn.noise.probe=false",
    "aqn.run.restarts=0",
)
REQUIRED = ("placed", "layout", "rollout", "base", "adapter", "noise", "clean", "mismatch")
"""Kinds of evidence that this run must have, all of them right."""
OVER = 1.25
"""A peak may be this many times the estimate."""


def grpo(context: Context) -> Reading:
    """Run two steps, and judge every record of evidence again."""
    source = small_model.make(context.folder.parent / "models" / "small" / "bf16")
    folder = context.folder / "run"
    code = train(RECIPE, [*overrides(context.device, source), *SETTINGS, f"aqn.run.dir={folder}", "aqn.run.fresh=true"])
    run = newest(folder)
    if code or run.state["status"] != "finished":
        raise Broken(f"the run ended with code {code}: {run.state['status']}, {run.state.get('message', '')}")
    return judged(run)


def newest(folder: Path) -> RunFolder:
    """Return the newest run in a folder.

    Raises:
        Broken: there is none.
    """
    if not (runs := find_runs(folder)):
        raise Broken("the run made no folder")
    return runs[-1]


def judged(run: RunFolder) -> Reading:
    """Return what the evidence of a run shows.

    Raises:
        Broken: a record is wrong or missing, or no noise was in the rollout.
    """
    judgement = judge_run(run, finished=True)
    if judgement.faults:
        raise Broken(f"{len(judgement.faults)} faults in the evidence, the first: {judgement.faults[0]}")
    for kind in REQUIRED:
        finding = judgement.findings.get(kind)
        if finding is None or finding.good is not True:
            raise Broken(f"the evidence has no right record of kind {kind!r}")
    records = list(run.read("evidence.jsonl"))
    sigmas = [record["sigma_measured"] for record in records if record["kind"] == "noise"]
    if not any(sigma > 0 for sigma in sigmas):
        raise Broken("no step had noise")
    if len({record["sent"] for record in records if record["kind"] == "adapter"}) < 2:
        raise Broken("no step changed the adapter")
    metrics = list(run.by_step("metrics.jsonl", "step").values())
    took = [record["metrics"] for record in metrics]
    figures: dict[str, Any] = {
        "records": {kind: one.right for kind, one in judgement.findings.items()},
        "sigma_measured": sigmas,
        "mismatch_nats": [r["abs_dlogp_mean"] for r in records if r["kind"] == "mismatch"],
        "step_s": [one["timing_s/step"] for one in took],
        "sync_s": [one.get("timing_s/update_weights") for one in took],
    }
    right = sum(figures["records"].values())
    return Reading(
        f"{len(took)} steps of {', '.join(f'{s:.1f}' for s in figures['step_s'])} s; {right} records of evidence are "
        f"right; σ {max(sigmas):.3g} measured; mismatch {max(figures['mismatch_nats']):.3g} nats a token",
        figures,
    )


def memory(context: Context) -> Reading:
    """Compare the peaks that actor and rollout recorded with the estimate for the run's recipe."""
    run = newest(context.folder / "run")
    peaks = [record for record in run.read("events.jsonl") if record["kind"] == "memory"]
    if not peaks:
        raise Broken("the run recorded no memory")
    config = load_recorded(run.path / "launch.yaml")
    return compared(peaks[-1], memory_of(config, recipe_shape(config)), context.device)


def compared(peaks: dict[str, Any], estimate: dict[str, Any], device: str) -> Reading:
    """Compare peaks and estimates in bytes. On an accelerator the rollout's cache takes what it is given: not judged.

    Raises:
        Broken: a peak is too far above its estimate, or was not measured.
    """
    kind = "resident" if device == "cpu" else "device"
    figures, said = {}, []
    for side in ("actor", "rollout"):
        measured = max((one.get(kind, 0) for one in peaks[side]), default=0)
        planned = estimate[side]["bytes"]
        if measured <= 0:
            raise Broken(f"the {side} recorded no {kind} memory")
        figures[side] = {"peak": measured, "estimate": planned, "parts": estimate[side]["parts"]}
        said.append(f"{side} {measured / 1e9:.2f} of {planned / 1e9:.2f} GB estimated")
        if measured > OVER * planned and (side == "actor" or device == "cpu"):
            raise Broken(f"the {side} took {measured / 1e9:.2f} GB, the estimate is {planned / 1e9:.2f} GB")
    return Reading("; ".join(said), figures)
