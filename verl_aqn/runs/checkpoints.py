"""The checkpoints of a run, and the config that they were made under."""

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import DataError
from verl_aqn.runs.arms import find_run
from verl_aqn.runs.folder import RunFolder

_STEP = re.compile(r"global_step_(\d+)")


def find_checkpoint(path: Path) -> tuple[RunFolder, int]:
    """The run and the step of the checkpoint `path` (global_step_N), or of the last one of the run `path`, or of the
    newest run in it. DataError where there is none.
    """
    real = path.resolve()
    match = _STEP.fullmatch(real.name)
    run = find_run(real.parent.parent if match else path)
    file = run.checkpoints / "latest_checkpointed_iteration.txt"
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
        raise DataError(f"{folder / 'actor'} is not there: name a checkpoint that is (verl keeps the newest ones)")
    return run, step


def config_of(run: RunFolder) -> DictConfig:
    """The resolved config of a run. DataError where it has none."""
    path = run.path / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run.path} has no config.yaml: it was killed before it began")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config
