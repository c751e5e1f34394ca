"""Run folders with the records that the trainer writes, for tests of code that reads them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from verl_aqn.noise.checks import sigma_interval
from verl_aqn.runs.folder import RunFolder, open_run

BASE, CLEAN = "b" * 64, "c" * 64


def metrics(step: int, sigma: float) -> dict[str, float]:
    """Return the metrics of one step under verl's names and ours."""
    mismatch = {
        f"aqn/mismatch/{part}{name}": value / step
        for part in ("", "noise/", "kernels/")
        for name, value in (("abs_dlogp_mean", 0.02), ("abs_dlogp_p99", 0.3), ("kl_k3", 0.002), ("clipped_share", 0.03))
    }
    return mismatch | {
        "critic/score/mean": 0.1 * step,
        "actor/entropy": 0.4 / step,
        "actor/grad_norm": 0.1,
        "response_length/mean": 13.0 + step,
        "response_length/clip_ratio": 0.25,
        "aqn/sigma": sigma,
        "aqn/sigma_measured": sigma * 1.001,
        "aqn/groups": 6.0,
        "aqn/groups_without_variance": 3.0,
        "aqn/mismatch/rollout_entropy_sampled": 0.5 / step,
        "timing_s/step": 20.0,
        "timing_s/gen": 8.0,
        "timing_s/rescore": 1.0,
        "timing_s/old_log_prob": 4.0,
        "timing_s/update_actor": 7.0,
        "timing_s/update_weights": 0.5,
        "training/strange": float("nan"),
    }


def begin_run(base: Path, config: Mapping[str, Any], versions: Mapping[str, Any] | None = None) -> RunFolder:
    """Open a new run under `base` as the trainer does, with its config, its versions and room for validations."""
    run = open_run(base, dict(config), fresh=True)
    run.write_text("config.yaml", yaml.safe_dump(dict(config)))
    if versions is not None:
        run.write_text("versions.json", json.dumps(versions))
    (run.path / "validation").mkdir()
    return run


def end_run(run: RunFolder, status: str | None = "finished", message: str = "") -> RunFolder:
    """Give a run its last status, None for one whose process died, and let go of its folder."""
    if status:
        run.set_status(status, message)
    run.close()
    return run


def write_run(
    base: Path,
    name: str = "e12",
    *,
    seed: int = 0,
    steps: int = 4,
    status: str | None = "finished",
    message: str = "",
    noise: bool = True,
    answers: Mapping[str, tuple[str, str, bool | None]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Write a run under `base` that was validated before its first step and after its last one.

    `answers`, of the last validation: prompt → (right answer, response, whether it was right: None if the reward did
    not return that).
    """
    settings = {
        "aqn": {"seed": seed, "noise": {"enabled": noise, "sigma_start": 0.05, "sigma_end": 1e-5}},
        "trainer": {"experiment_name": name, "total_training_steps": steps, "default_local_dir": str(base)},
        "actor_rollout_ref": {"model": {"path": "not there"}},
    }
    versions = {"torch": "2.13.0", "commit": "abcdef0123", "dirty": True, "device": "2 cores"}
    run = begin_run(base, settings | dict(config or {}), versions)
    run.write_text("quantization.json", json.dumps(quantization()))
    evidence = {"clean_digest": CLEAN, "modules": 5, "elements": 1000, "changed_outside": 0}
    clean = {"rank": 0, "sigma_target": 0.0, "sigma_measured": 0.0, "weights_digest": CLEAN, **evidence}
    ends = {"disk": BASE, "actor": [BASE]}
    rollout = {"base_digest": BASE, "slices": {}, "weights_equal_base": True, "kernel": "CpuMxfp4LinearKernel"}
    answers = answers or {
        f"{number} + 1?": (str(number + 1), f"#### {number + number % 2}", number % 2 == 1) for number in range(9)
    }

    def validate(step: int) -> None:
        run.append("evidence.jsonl", {"kind": "clean", "step": None, **clean})
        right = 0
        for prompt, (truth, said, good) in answers.items():
            good, said = (good, said) if step else (False, "no idea")
            right += bool(good)
            line = {
                "input": prompt,
                "output": said,
                "gts": truth,
                "score": float(bool(good)),
                "step": step,
                "acc": None if good is None else float(good),
            }
            run.append(f"validation/{step}.jsonl", line)
        share = right / len(answers)
        run.append("metrics.jsonl", {"kind": "validation", "step": step, "accuracy": share, "items": len(answers)})

    run.append("evidence.jsonl", {"kind": "rollout", "norms": 5, "clean_digest": CLEAN})
    run.append("evidence.jsonl", {"kind": "base", "when": "start", **ends, "rollout": [rollout]})
    run.append("events.jsonl", {"kind": "warning", "text": "rollout.top_p=0.9: biased"})
    validate(0)
    for step in range(1, steps + 1):
        sigma = 0.05 / 10 ** (step - 2) if noise and step > 1 else 0.0
        interval = sigma_interval(sigma, 1000)
        order = {"step": step - 1, "sigma_target": sigma, "sigma_measured": sigma * 1.001, "sigma_interval": interval}
        digest = f"{step}" * 64 if sigma else CLEAN
        run.append(
            "evidence.jsonl", {"kind": "noise", "rank": 0, "stage": step, **evidence, **order, "weights_digest": digest}
        )
        adapter = f"{step:064d}"
        run.append(
            "evidence.jsonl",
            {"kind": "adapter", "step": step, "sent": adapter, "actual": [{"adapter_digest": adapter}]},
        )
        if step == steps:
            validate(step)
        run.append("metrics.jsonl", {"kind": "step", "step": step, "total": steps, "metrics": metrics(step, sigma)})
    run.append("evidence.jsonl", {"kind": "base", "when": "end", **ends, "rollout": [rollout]})
    return end_run(run, status, message)


def validated_run(
    base: Path,
    name: str,
    right: Sequence[float | None],
    *,
    seed: int = 0,
    status: str = "finished",
    prompts: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    **noise: Any,
) -> Path:
    """Return the folder of a run of which only two validations are on record, before step 1 and after step 29.

    `right`: the score of each answer of the last one. `noise`: settings of `aqn.noise`.
    """
    settings = {
        "trainer": {"experiment_name": name, "total_training_steps": 29, "default_local_dir": str(base / name)},
        "actor_rollout_ref": {"actor": {"optim": {"lr": 1e-5}, "data_loader_seed": seed}},
        "data": {"seed": seed},
        "aqn": {"seed": seed, "noise": {"enabled": True, "seed": seed, **noise}, "run": {"dir": str(base)}},
    }
    run = begin_run(base, settings | dict(config or {}), {"torch": "2.13.0"})
    prompts = prompts or [f"{number} + 1?" for number in range(len(right))]
    for step, answers in ((0, [0] * len(right)), (29, right)):
        lines = [
            line(prompt, None if acc is None else float(acc)) for prompt, acc in zip(prompts, answers, strict=True)
        ]
        write_lines(run.path / f"validation/{step}.jsonl", lines)
        run.append("metrics.jsonl", {"kind": "validation", "step": step, "accuracy": 0.5, "items": len(right)})
    return end_run(run, status).path


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records to a JSONL file in place of its old content."""
    file.write_text("".join(json.dumps(one) + "\n" for one in records))


def line(prompt, acc, item=None, sample=None, gts="1"):
    made = {"input": prompt, "output": "", "gts": gts, "acc": acc}
    return made | ({} if item is None else {"item": item, "sample": sample})


def lines_of(table, prompts=None):
    """Return the lines of [problems][samples] answers, the samples of all problems in turn."""
    prompts = prompts or [f"{number} + 1?" for number in range(len(table))]
    return [
        line(prompts[item], table[item][sample], item, sample)
        for sample in range(len(table[0]))
        for item in range(len(table))
    ]


def quantization() -> dict[str, Any]:
    """Return `QuantReport.to_dict` of two layers, the second with two experts and a shared one."""
    parts = ["0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.shared_experts.down_proj"]
    names = [f"model.layers.{part}" for part in (*parts, "1.mlp.experts.0.up_proj", "1.mlp.experts.1.up_proj")]
    modules = [
        {"name": name, "shape": [64, 32], "sqnr_db": 18.0 + at, "signal": 100.0, "noise": 1.0 + at,
         "deadzone_share": 0.1, "clipped_share": 0.01, "bytes_before": 4096, "bytes_after": 1088}
        for at, name in enumerate(names)
    ]  # fmt: skip
    return {"scale_rule": "mse", "base_digest": BASE, "sqnr_db": 18.9, "bytes_before": 24576, "bytes_after": 6528,
            "modules": modules}  # fmt: skip
