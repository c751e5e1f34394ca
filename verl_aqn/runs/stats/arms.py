"""Finished runs, grouped into the arms of an experiment: their settings, and which items each run got right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.evidence import check_proved
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.scores import AVG, Answers, Item, answers_in, k_of

FACTOR = "aqn.noise"
_COPIES = {  # settings that are derived from another one
    ".noise_in_actor": "aqn.noise.apply_to",
    ".noise_measured": "aqn.noise.enabled",
    ".update_keeps_forward": "actor_rollout_ref.actor.ppo_mini_batch_size",
    ".mxfp4_activation": "aqn.mxfp4.activation",
    ".mxfp4_cache_dequantized": "aqn.mxfp4.cache_dequantized",
    ".served_path": "aqn.mxfp4.rollout_weight_format",
    ".engine_kwargs.vllm.quantization": "aqn.mxfp4.rollout_weight_format",
    "critic.model.path": "actor_rollout_ref.model.path",
    ".prometheus.served_model_name": "actor_rollout_ref.model.path",
    "versions.base": "actor_rollout_ref.model.path",
}
STEP = "step of the last validation"


@dataclass(frozen=True)
class Run:
    """A finished run. `settings`: everything that decides its result except the seed, by dotted key."""

    path: Path
    name: str
    seed: Any
    settings: dict[str, Any]
    answers: Answers


@dataclass(frozen=True)
class Arm:
    """Runs with equal settings.

    `scores` is [seeds, items], in [0, 1], with the same order of items in every arm. `metric`: what the scores are, for
    example accuracy (one response per item), avg@8 or pass@4.
    """

    name: str
    runs: tuple[Run, ...]
    scores: np.ndarray
    metric: str = "accuracy"

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings


def run_in(path: Path) -> RunFolder | None:
    """Return the run in `path`, or the newest run of the base folder `path`, or None if there is neither."""
    for folder in (path, (path / "training.log").resolve().parent):
        if (folder / "state.json").is_file():
            return RunFolder(folder.resolve())
    return None


def find_run(path: Path) -> RunFolder:
    """Return what `run_in` returns. Raises DataError if there is no run."""
    if run := run_in(path):
        return run
    raise DataError(f"{path} contains no run: give <base>/runs/<time>-<id>, or <base> for its newest run")


def find_each(paths: Sequence[Path]) -> list[RunFolder]:
    """Return what `find_run` returns for each path. Raises ConfigError if two paths are the same run."""
    runs = [find_run(path) for path in paths]
    if twice := [path for path, count in Counter(run.path for run in runs).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice: remove one of them")
    return runs


def read_run(path: Path) -> Run:
    """Read the run that `find_run` finds in `path`.

    Raises DataError if the run has not finished, was never validated, its answers cannot be assigned to problems, or
    the records do not say for each answer whether it is right, or contradict each other (`answers_in`). Raises
    EvidenceError if its evidence has faults.
    """
    folder = find_run(path)
    status = folder.state["status"]
    if status != "finished":
        raise DataError(f"{folder.path} is {status}: only finished runs can be compared; finish it or leave it out")
    check_proved(folder)
    steps = folder.by_step("metrics.jsonl", "validation")
    file = f"validation/{max(steps, default=0)}.jsonl"
    if not steps or not (folder.path / file).is_file():
        raise DataError(f"{folder.path} has no validation responses ({file}): it cannot be compared")
    lines = list(folder.read(file))
    try:
        answers = answers_in(lines, record=steps[max(steps)])
    except DataError as error:
        raise DataError(f"{folder.path / file} {error}") from error
    config, versions = records_of(folder.path)
    seed, name = config.get("aqn", {}).get("seed"), config.get("trainer", {}).get("experiment_name")
    for event in folder.read("events.jsonl"):
        if event.get("kind") == "evaluated":  # the policy of another run, which its seed stands for
            seed = event["seed"]
    settings = settings_of(config | {"versions": versions}) | {STEP: max(steps)}
    return Run(folder.path, str(name or folder.path.name), seed, settings, answers)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a resolved config decides a result, by dotted key: no seeds, no places, no `aqn.target`.

    Lists are values.
    """
    flat = {
        key: value
        for key, value in flatten(config).items()
        if not is_seed_or_place(key) and not key.startswith("aqn.target.")
    }
    if flat.get("aqn.noise.target_kl") is not None:
        # σ_start was found by a search that uses the run's own seed. What the user chose is the KL and the ratio of
        # σ_end to σ_start.
        start, end = flat.pop("aqn.noise.sigma_start"), flat.pop("aqn.noise.sigma_end")
        flat["aqn.noise.sigma_end / sigma_start"] = float(f"{end / start:.4g}")
    return flat


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested blocks into one dict by dotted key. Lists are kept as values."""
    flat: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        prefix, block = todo.pop()
        for key, value in block.items():
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
            else:
                flat[f"{prefix}{key}"] = value
    return flat


def arms(
    paths: Sequence[Path], factors: Sequence[str] = (FACTOR,), any_difference: bool = False, metric: str = AVG
) -> list[Arm]:
    """Group the runs by their settings. The first arm, which contains the first path, is the control.

    `metric`: the score of an item, avg (the share of its responses that are right) or pass@K. Settings of arms may
    differ under the keys `factors`, or anywhere if `any_difference` is True.

    Raises ConfigError if fewer than two arms remain, if the arms differ in other keys, if a run is given twice, if a
    factor matches no key, or if a run has fewer responses to a problem than `metric` needs.

    Raises DataError if a run cannot be read, if two runs of an arm have the same `aqn.seed` (they share noise, initial
    adapter and order of the data, so they are more alike than two seeds are), or if not all runs were asked the same
    items.
    """
    k_of(metric)
    runs = [read_run(folder.path) for folder in find_each(paths)]
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if group[0].settings == run.settings), None)
        if same is None:
            groups.append([run])
            continue
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin:
            raise DataError(
                f"{twin.path} and {run.path} have the same config and the same seed (aqn.seed={run.seed}): they "
                "do not count as two seeds, leave one out"
            )
        same.append(run)
    if len(groups) < 2:
        raise ConfigError(f"{len(runs)} run(s), all with the same config: give runs whose configs differ")
    if (others := beyond(factors, [group[0].settings for group in groups])) and not any_difference:
        raise ConfigError(
            f"these runs differ in more than {', '.join(factors)}: {others}. Name what may differ with --factor "
            "KEY, or allow all differences with --any"
        )
    items: set[Item] = set()
    first = runs[0].answers
    for run in runs:
        items |= run.answers.right.keys()
        # An item that a run lacks is one of those of which no response came, if it has so many.
        if run.answers.items != first.items or len(items) > first.items:
            unlike = max(len(run.answers.right.keys() ^ first.right.keys()), abs(run.answers.items - first.items))
            raise DataError(
                f"{runs[0].path} and {run.path} differ in {unlike} items: all runs must have been asked the same items"
            )
    names = [group[0].name for group in groups]
    counts = sorted({run.answers.samples for run in runs})
    label = metric if metric != AVG else "accuracy" if counts == [1] else f"avg@{', '.join(map(str, counts))}"
    return [
        Arm(
            name if names.count(name) == 1 else f"{name} ({place})",
            tuple(group),
            np.array([_scores(run, sorted(items), metric) for run in group]),
            label,
        )
        for place, (name, group) in enumerate(zip(names, groups, strict=True), 1)
    ]


def _scores(run: Run, items: Sequence[Item], metric: str) -> list[float]:
    try:
        scores = run.answers.scores(metric)
    except ConfigError as error:
        raise ConfigError(f"{run.path}: {error}") from error
    # A response that never came is wrong; of some items none came in any run.
    return [*(scores.get(item, 0.0) for item in items), *[0.0] * (run.answers.items - len(items))]


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by key: (value in one, value in other), with None for a missing key."""
    pairs = {key: (one.get(key), other.get(key)) for key in sorted(one.keys() | other.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def beyond(factors: Sequence[str], settings: Sequence[dict[str, Any]]) -> str:
    """Return, as a text, the keys in which `settings` differ from the first of them and that no factor covers.

    The text is "" if there are none. Raises ConfigError if a factor matches no key at all.
    """
    known = {key for one in settings for key in one}
    for factor in factors:
        if not any(_under(key, factor) for key in known):
            raise ConfigError(f"factor {factor}: these runs have no key with this name or below it")
    found = {key for one in settings[1:] for key in differences(settings[0], one)}
    others = sorted(key for key in found if not any(_under(key, factor) for factor in factors))
    return ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")


def _under(key: str, factor: str) -> bool:
    key = next((source for copy, source in _COPIES.items() if key.endswith(copy)), key.removeprefix("versions.code."))
    return key == factor or key.startswith(f"{factor}.")


def is_seed_or_place(key: str) -> bool:
    """Return whether a setting may differ between runs of one arm: seeds, names, and folders that a run writes to."""
    last = key.rsplit(".", 1)[-1]
    return (
        last in ("seed", "resume_from_path")
        or last.endswith("_seed")
        or last in ("experiment_name", "project_name")
        or key.startswith("aqn.run.")
        or (key.startswith("trainer.") and last.endswith("dir"))
    )


def records_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resolved config of a run and its recorded versions ({} if an old record has none)."""
    config = RunFolder(folder).block("config.yaml")
    if config is None:
        raise DataError(f"{folder} has no config.yaml: its settings are unknown, so it cannot be compared")
    return config, versions_of(folder)


def versions_of(folder: Path) -> dict[str, Any]:
    """Return the versions that a run used; a value that differs between its attempts becomes "one → other".

    For an evaluation of a run, the versions of that run count as another attempt.
    """
    run = RunFolder(folder)
    began = run.block("versions.json")
    attempts = [] if began is None else [began]
    attempts += [one["versions"] for one in run.read("events.jsonl") if one.get("versions")]
    return _merged(attempts) if attempts else {}


def _merged(attempts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in attempts for key in one):
        values = [one.get(key) for one in attempts]
        if blocks := [value for value in values if isinstance(value, dict)]:
            found[key] = _merged(blocks)
        elif all(value == values[0] for value in values):
            found[key] = values[0]
        else:
            found[key] = " → ".join(dict.fromkeys(map(str, values)))
    return found
