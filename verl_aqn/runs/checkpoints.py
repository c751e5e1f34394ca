"""The checkpoints of a run: written aside and renamed, each file with its digest; and their config."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import DataError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.old_names import current_names
from verl_aqn.runs.provenance import file_digest
from verl_aqn.runs.stats.arms import find_run

DIGESTS = "digests.json"
WRITING = ".writing"
LATEST = "latest_checkpointed_iteration.txt"  # verl's name
_STEP = re.compile(r"global_step_(\d+)")


@contextmanager
def weights_only() -> Iterator[None]:
    """What this process loads by torch meanwhile is taken as weights: verl would unpickle whatever a checkpoint holds.

    Not for good: verl's own messages between processes are loaded by torch too, and hold more than weights.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch reads it at every load
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


def find_checkpoint(path: Path) -> tuple[RunFolder, int]:
    """The run and the step of the checkpoint `path` (global_step_N), or of the last one of the run `path`, or of the
    newest run in it. DataError where there is none.
    """
    real = path.resolve()
    match = _STEP.fullmatch(real.name)
    run = find_run(real.parent.parent if match else path)
    file = run.checkpoints / LATEST
    try:
        last = int(file.read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{run.path} has no checkpoint (no {file.name}): let it run to one (trainer.save_freq)"
        ) from None
    step = int(match[1]) if match else last
    if step > last:
        raise DataError(f"{path} was not written to its end: the last whole checkpoint is global_step_{last}")
    folder = run.checkpoints / f"global_step_{step}"
    if match and folder.resolve() != real:
        raise DataError(f"{path} is no checkpoint of {run.path}: give {run.checkpoints}/global_step_N")
    if not (folder / "actor").is_dir():
        raise DataError(f"{folder / 'actor'} is not there: name a checkpoint that is (the newest ones are kept)")
    if damage := damage_of(folder):
        raise DataError(f"{damage}: name another checkpoint")
    return run, step


def publish(written: Path, checkpoints: Path, keep: int | None) -> int:
    """Make the folder `written` (global_step_N, on the same disk) a checkpoint: all or nothing, if this is killed.

    Its files are on disk and their digests beside them before it gets its place; only then do older checkpoints go,
    until `keep` are left (None or 0: all stay). Returns its bytes.
    """
    digests = {}
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        digests[str(file.relative_to(written))] = file_digest(file)
    size = sum((written / name).stat().st_size for name in digests)
    _write(written / DIGESTS, json.dumps(digests, indent=2))
    place = checkpoints / written.name
    if place.exists():  # of an attempt that was resumed before it, or damaged
        shutil.rmtree(place)
    written.rename(place)
    step = _step(place)
    point_to(checkpoints, step)
    if keep:
        for old in _folders(checkpoints)[keep:]:
            if _step(old) < step:
                shutil.rmtree(old)
    return size


def point_to(checkpoints: Path, step: int) -> None:
    """Tell verl which checkpoint is the last."""
    _write(checkpoints / f".{LATEST}", str(step))
    (checkpoints / f".{LATEST}").replace(checkpoints / LATEST)


def newest_whole(checkpoints: Path) -> tuple[int, list[str]]:
    """Step of the newest checkpoint that is as it was written, 0 where none was; and what is wrong with newer ones.

    DataError where there are some and none is whole.
    """
    wrong: list[str] = []
    for folder in _folders(checkpoints):
        damage = damage_of(folder)
        if not damage:
            return _step(folder), wrong
        wrong.append(damage)
    if wrong:
        raise DataError(f"{wrong[0]}, and no older checkpoint is whole: move {checkpoints} away to start from step 0")
    return 0, wrong


def damage_of(folder: Path) -> str:
    """What is wrong with a checkpoint by its digests, "" where nothing is. Those of older versions have none."""
    file = folder / DIGESTS
    if not file.is_file():
        return "" if _step(folder) <= _last(folder.parent) else f"{folder} was not written to its end"
    try:
        digests = json.loads(file.read_text())
    except ValueError:
        return f"{file} is damaged"
    for name, digest in digests.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if found != digest:
            return f"{folder / name} is not what was written"
    return ""


def config_of(run: RunFolder) -> DictConfig:
    """The resolved config of a run. DataError where it has none."""
    if run.block("config.yaml") is None:
        raise DataError(f"{run.path} has no config.yaml: it was killed before it began")
    config = OmegaConf.create(current_names((run.path / "config.yaml").read_text()))
    assert isinstance(config, DictConfig)
    return config


def _folders(checkpoints: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    found = [path for path in checkpoints.glob("global_step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _last(checkpoints: Path) -> int:
    try:
        return int((checkpoints / LATEST).read_text())
    except (OSError, ValueError):
        return 0


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
