"""Finished runs, grouped into the arms of an experiment: what differs between arms, and what was answered by whom."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.folder import RunFolder

FACTOR = "aqn.noise"
STEP = "step of the last validation"


class Item(NamedTuple):
    """A validation problem: the prompt and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Run:
    """A finished run. `settings`: all that decides its result, its seed aside, by dotted key."""

    path: Path
    name: str
    seed: Any
    settings: dict[str, Any]
    answers: dict[Item, bool]


@dataclass(frozen=True)
class Arm:
    """Runs of equal settings. `right` is [seeds, items], bool, with the same order of items in every arm."""

    name: str
    runs: tuple[Run, ...]
    right: np.ndarray

    @property
    def settings(self) -> dict[str, Any]:
        return self.runs[0].settings


def find_run(path: Path) -> RunFolder:
    """The run in `path`, or the newest of the base folder `path`. DataError where it is neither."""
    for folder in (path, (path / "training.log").resolve().parent):
        if (folder / "state.json").is_file():
            return RunFolder(folder.resolve())
    raise DataError(f"{path} holds no run: give <base>/runs/<time>-<id>, or <base> for its newest run")


def read_run(path: Path) -> Run:
    """What `path` holds, as `find_run` finds it.

    DataError where it has not finished, was never validated, or answers a prompt more than once: several answers to
    one prompt are no independent items.
    """
    folder = find_run(path)
    status = folder.state["status"]
    if status != "finished":
        raise DataError(f"{folder.path} is {status}: only finished runs are compared, so finish it or leave it out")
    steps = [record["step"] for record in folder.read("metrics.jsonl") if record.get("kind") == "validation"]
    file = f"validation/{max(steps, default=0)}.jsonl"
    if not steps or not (folder.path / file).is_file():
        raise DataError(f"{folder.path} has no answers of a validation ({file}): it cannot be compared")
    lines = list(folder.read(file))
    try:
        answers = {Item(line["input"], str(line["gts"])): line["acc"] > 0 for line in lines}
    except KeyError as error:
        raise DataError(
            f"{folder.path / file} has no {error} in a line: it is no validation of a run of ours"
        ) from error
    if not answers or len(answers) < len(lines):
        raise DataError(
            f"{folder.path / file} has {len(lines)} answers to {len(answers)} problems: one to each is needed "
            "(actor_rollout_ref.rollout.val_kwargs.n=1)"
        )
    settings = _config(folder.path)
    seed, name = settings.get("aqn.seed"), str(settings.get("trainer.experiment_name") or folder.path.name)
    settings = {key: value for key, value in settings.items() if not _is_seed_or_place(key)}
    if settings.get("aqn.noise.target_kl") is not None:
        # σ_start was searched for, with the run's own seed: chosen were the KL and how far σ falls.
        start, end = settings.pop("aqn.noise.sigma_start"), settings.pop("aqn.noise.sigma_end")
        settings["aqn.noise.sigma_end / sigma_start"] = float(f"{end / start:.4g}")
    return Run(folder.path, name, seed, settings | {STEP: max(steps)}, answers)


def arms(paths: Sequence[Path], factors: Iterable[str] = (FACTOR,), any_difference: bool = False) -> list[Arm]:
    """The runs grouped by their settings; the first is the control, the arm of the first path.

    Settings of arms may differ under the keys `factors`, anywhere with `any_difference`. ConfigError where fewer than
    two arms are left, where they differ elsewhere, or where a factor names no key. DataError where a run cannot be
    read, where two runs of an arm share their `aqn.seed` (they share noise, first adapter and order of the data, so
    that they are closer to each other than two seeds are), or where not all have answered the same items.
    """
    runs = [read_run(path) for path in paths]
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if group[0].settings == run.settings), None)
        if same is None:
            groups.append([run])
            continue
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin:
            raise DataError(
                f"{twin.path} and {run.path} have one config and one seed (aqn.seed={run.seed}): they are no two "
                "seeds, leave one out"
            )
        same.append(run)
    if len(groups) < 2:
        raise ConfigError(f"{len(runs)} run(s) of one config: a comparison takes runs that differ, such as e12 and e6a")
    _check_factors(groups, list(factors), any_difference)
    items = sorted(runs[0].answers)
    for run in runs:
        if unlike := run.answers.keys() ^ runs[0].answers.keys():
            raise DataError(f"{runs[0].path} and {run.path} differ in {len(unlike)} items: the same are needed in all")
    names = [group[0].name for group in groups]
    return [
        Arm(
            name if names.count(name) == 1 else f"{name} ({place})",
            tuple(group),
            np.array([[run.answers[item] for item in items] for run in group]),
        )
        for place, (name, group) in enumerate(zip(names, groups, strict=True), 1)
    ]


def differences(one: Arm | Run, other: Arm | Run) -> dict[str, tuple[Any, Any]]:
    """Settings that are not equal, by key: (of one, of the other), None where there is none."""
    keys = sorted(one.settings.keys() | other.settings.keys())
    pairs = {key: (one.settings.get(key), other.settings.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _check_factors(groups: list[list[Run]], factors: list[str], any_difference: bool) -> None:
    known = {key for group in groups for key in group[0].settings}
    for factor in factors:
        if not any(_under(key, factor) for key in known):
            raise ConfigError(f"--factor {factor}: no key of these runs is called that or lies under it")
    found = {key for group in groups[1:] for key in differences(groups[0][0], group[0])}
    others = sorted(key for key in found if not any(_under(key, factor) for factor in factors))
    if others and not any_difference:
        listed = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        raise ConfigError(
            f"these runs differ in more than {', '.join(factors)}: {listed}. Name what may differ with --factor KEY, "
            "or allow everything with --any"
        )


def _under(key: str, factor: str) -> bool:
    # What `aqn.noise.apply_to` says to the actor is copied into the model's config.
    if key.endswith(".noise_in_actor"):
        key = "aqn.noise.apply_to"
    return key == factor or key.startswith(f"{factor}.")


def _is_seed_or_place(key: str) -> bool:
    last = key.rsplit(".", 1)[-1]
    return (
        last == "seed"
        or last.endswith("_seed")
        or last in ("experiment_name", "project_name")
        or key.startswith("aqn.run.")
        or (key.startswith("trainer.") and last.endswith("dir"))
    )


def _config(folder: Path) -> dict[str, Any]:
    """Config and versions of packages by dotted key. Lists are values."""
    from omegaconf import OmegaConf  # not for those who only want the statistics

    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{folder} has no config.yaml: what it was a run of is unknown, so it cannot be compared")
    versions = folder / "versions.json"
    flat: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", OmegaConf.to_container(OmegaConf.load(path)))]
    todo.append(("versions.", json.loads(versions.read_text()) if versions.is_file() else {}))
    while todo:
        prefix, block = todo.pop()
        for key, value in block.items():
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
            else:
                flat[f"{prefix}{key}"] = value
    return flat
