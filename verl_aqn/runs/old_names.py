"""Recorded configs of older runs, read with today's names of modules and settings.

A run's config names classes and modules by their full path, and settings by their keys. Some have other names since.
Whatever reads a recorded config reads it with this module, so that an old run is shown, compared and evaluated as
before.
"""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.renamed import rename_keys

_VERL = "verl_aqn.integrations.verl"
OLD_NAMES = {
    "verl_aqn.verl_api.calculator": f"{_VERL}.calculator",
    "verl_aqn.verl_api.engine": f"{_VERL}.engine",
    "verl_aqn.verl_api.rewarding": f"{_VERL}.rewarding",
    "verl_aqn.verl_api.rows": f"{_VERL}.left_out_rows",
    "verl_aqn.verl_api.worker_extension": f"{_VERL}.worker_extension",
    "verl_aqn.rewards.gsm8k": "verl_aqn.tasks.gsm8k",
    "verl_aqn.rewards.math_verify": "verl_aqn.tasks.math_verify",
}
_OLD = re.compile(rf"\b({'|'.join(map(re.escape, OLD_NAMES))})\b")


def current_names(text: str) -> str:
    """Return the text of a recorded config with today's names of modules."""
    return _OLD.sub(lambda match: OLD_NAMES[match[1]], text)


def rename_settings(config: Any) -> None:
    """Give the settings of a recorded config (a dict or a DictConfig) their present names, in place."""
    if isinstance(aqn := config.get("aqn"), dict | DictConfig):
        rename_keys(aqn)


def load_recorded(path: Path) -> DictConfig:
    """Return the resolved config in a file of a run's folder, with today's names."""
    config = OmegaConf.create(current_names(path.read_text()))
    assert isinstance(config, DictConfig)
    rename_settings(config)
    return config
