"""Names of modules in the records of older runs, and what these modules are called today.

A run's config names classes and modules by their full path. The modules have moved since; whatever reads a recorded
config reads it through `current_names`, so that an old run is shown, compared and evaluated as before.
"""

import re

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
