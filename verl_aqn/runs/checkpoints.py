"""The checkpoints of a run and their config.

A checkpoint is written to a temporary folder with a digest of each file, and then renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from verl_aqn.errors import AqnError, DataError, EnvironmentFault, is_full
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.old_names import load_recorded
from verl_aqn.runs.provenance import file_digest
from verl_aqn.runs.stats.arms import find_run

DIGESTS = "digests.json"
WRITING = ".writing"
LATEST = "latest_checkpointed_iteration.txt"  # verl's name
# What torch and safetensors say if a file cannot be written; neither raises an OSError, and torch names no reason.
_NOT_WRITTEN = re.compile(r"inline_container|PytorchStreamWriter|\(os error (27|28|122)\)")
_STEP = re.compile(r"global_step_(\d+)")


@contextmanager
def weights_only() -> Iterator[None]:
    """Make torch load weights only in this process; otherwise verl would unpickle whatever a checkpoint contains.

    The setting is temporary: verl's own messages between processes are also loaded by torch and contain more than
    weights.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch reads this variable at every load
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn the error of a checkpoint in `folder` that could not be written into one line about its disk.

    Raises:
        EnvironmentFault: a file could not be written. All other errors stay as they are.
    """
    try:
        yield
    except AqnError:
        raise
    except Exception as error:
        full = is_full(error) if isinstance(error, OSError) else _NOT_WRITTEN.search(str(error))
        if not full:
            raise
        left = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        raise EnvironmentFault(
            f"the checkpoint in {folder} could not be written ({left / 1e9:.1f} GB are free): free some space, or "
            "choose another disk (aqn.run.dir), and start the run again"
        ) from error


def find_checkpoint(path: Path) -> tuple[RunFolder, int]:
    """Return the run and the step of a checkpoint.

    `path` is a checkpoint (global_step_N), or a run or base folder, for which the last checkpoint of the (newest) run
    is returned. Raises DataError if there is none.
    """
    real = path.resolve()
    match = _STEP.fullmatch(real.name)
    run = find_run(real.parent.parent if match else path)
    file = run.checkpoints / LATEST
    try:
        last = int(file.read_text())
    except (OSError, ValueError):
        raise DataError(
            f"{run.path} has no checkpoint (no {file.name}): continue the run until it writes one (trainer.save_freq)"
        ) from None
    step = int(match[1]) if match else last
    if step > last:
        raise DataError(f"{path} was not written completely: the last complete checkpoint is global_step_{last}")
    folder = run.checkpoints / f"global_step_{step}"
    if match and folder.resolve() != real:
        raise DataError(f"{path} is not a checkpoint of {run.path}: give {run.checkpoints}/global_step_N")
    if not (folder / "actor").is_dir():
        raise DataError(
            f"{folder / 'actor'} does not exist: give a checkpoint that exists (only the newest ones are kept)"
        )
    if damage := damage_of(folder):
        raise DataError(f"{damage}: give another checkpoint")
    return run, step


def publish(written: Path, checkpoints: Path, keep: int | None) -> int:
    """Turn the folder `written` (global_step_N, on the same disk) into a checkpoint, completely or not at all.

    Its files and their digests are flushed to disk before the folder is moved into place. Only then are older
    checkpoints deleted, until `keep` are left (None or 0: all are kept). Returns the size in bytes.
    """
    digests = {}
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        digests[str(file.relative_to(written))] = file_digest(file)
    size = sum((written / name).stat().st_size for name in digests)
    _write(written / DIGESTS, json.dumps(digests, indent=2))
    place = checkpoints / written.name
    if place.exists():  # left by an earlier attempt that was resumed from an older step, or damaged
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
    """Write the file that tells verl which checkpoint is the last."""
    _write(checkpoints / f".{LATEST}", str(step))
    (checkpoints / f".{LATEST}").replace(checkpoints / LATEST)


def newest_whole(checkpoints: Path) -> tuple[int, list[str]]:
    """Return the step of the newest undamaged checkpoint (0 if there is no checkpoint), and the faults of newer ones.

    Raises DataError if there are checkpoints and all are damaged.
    """
    wrong: list[str] = []
    for folder in _folders(checkpoints):
        damage = damage_of(folder)
        if not damage:
            return _step(folder), wrong
        wrong.append(damage)
    if wrong:
        raise DataError(
            f"{wrong[0]}, and there is no undamaged older checkpoint: move {checkpoints} away to start from step 0"
        )
    return 0, wrong


def damage_of(folder: Path) -> str:
    """Return what is wrong with a checkpoint according to its digests, or "" if nothing is.

    Checkpoints of older versions have no digests.
    """
    file = folder / DIGESTS
    if not file.is_file():
        return "" if _step(folder) <= _last(folder.parent) else f"{folder} was not written completely"
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
            return f"{folder / name} has changed since it was written"
    return ""


def config_of(run: RunFolder) -> DictConfig:
    """Return the resolved config of a run. Raises DataError if it has none."""
    if run.block("config.yaml") is None:
        raise DataError(f"{run.path} has no config.yaml: it was stopped before training began")
    return load_recorded(run.path / "config.yaml")


def _folders(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
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
