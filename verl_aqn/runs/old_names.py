"""Configs and records of older runs, read with today's names of modules, settings, fields and metrics.

A run's config names classes and modules by their full path, and settings by their keys; its records name fields and
metrics. Some have other names since. Whatever reads a config or records reads them with this module, so that an old run
is shown, compared and evaluated as before.
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
# Fields of records, and prefixes of metrics.
OLD_FIELDS = {
    "sigma_asked": "sigma_target",
    "sigma_realised": "sigma_measured",
    "aqn/sigma_realised": "aqn/sigma_measured",
    "aqn/parity/": "aqn/mismatch/",
}
# Fields of records of the base and of adapters. Other files may have such keys of the user's own.
OLD_SIDES = {"held": "actual", "wanted": "expected"}
# A quote in a text is escaped in JSON, so these match keys only.
_FIELD = re.compile(rb'"(sigma_asked|sigma_realised|aqn/sigma_realised|aqn/parity/)([^"\\]*": )')
_SIDE = re.compile(rb'"(held|wanted)": ')
_WITH_SIDES = re.compile(rb'"kind": "(base|adapter)"')
_OLD = re.compile(rf"\b({'|'.join(map(re.escape, OLD_NAMES))})\b")


def current_names(text: str) -> str:
    """Return the text of a recorded config with today's names of modules."""
    return _OLD.sub(lambda match: OLD_NAMES[match[1]], text)


def current_fields(line: bytes) -> bytes:
    """Return a line of a JSON-lines file with today's names of fields and metrics."""
    line = _FIELD.sub(lambda match: b'"%s%s' % (OLD_FIELDS[match[1].decode()].encode(), match[2]), line)
    if _WITH_SIDES.search(line):
        line = _SIDE.sub(lambda match: b'"%s": ' % OLD_SIDES[match[1].decode()].encode(), line)
    return line


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
