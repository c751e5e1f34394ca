"""Check whether verl can read and render a run's data, by asking verl in its own process; good answers are stored.

verl takes seconds to import, and a user's own data set class may run any code, so the question is asked by
`verl_aqn.integrations.verl.first_rows`. A good answer is used until a file, a setting or a version changes.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import verl_aqn
from verl_aqn import errors
from verl_aqn.cache import cache_dir
from verl_aqn.checkpoints.checksums import known_digest
from verl_aqn.preflight.asking import ask_module, keep, kept, version_of

TIMEOUT_S = 1800  # a user's own class may read anything
# Settings of the data that do not affect the first rows; all others may.
_UNRELATED = (
    "train_batch_size", "gen_batch_size", "val_batch_size", "max_response_length", "dataloader_num_workers", "seed",
    "shuffle", "validation_shuffle", "filter_overlong_prompts_workers", "train_max_samples", "val_max_samples",
)  # fmt: skip
# The files in a folder from which a tokenizer, a processor and their chat templates are read.
_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
_CODE = (
    "integrations/verl/first_rows.py",
    "integrations/verl/rendering.py",
    "integrations/verl/left_out_rows.py",
    "integrations/verl/verls_reward.py",
    "tasks/data_files.py",
)

Answer = dict[str, Any]
_answers: dict[str, Answer] = {}


def ask(config: DictConfig, folder: Path, files: Iterable[Path], *, own: bool) -> Answer:
    """Return what verl's class reports about the data (see `first_rows.answer`): `rows` and `warnings`.

    Args:
        folder: the folder of the model, whose tokenizer and chat template are read.
        files: the files of both sets.
        own: whether the class is the user's own, which is asked every time.

    Raises:
        DataError, ModelError, ConfigError: the data, the chat template, or the user's class has a fault.
        EnvironmentFault: verl's process ended without an answer.
    """
    if not is_here():
        return {"rows": None, "warnings": []}
    config = with_model(config, folder)
    key = "" if own else _key(config, folder, files)
    file = cache_dir() / "rows" / f"{key}.json"
    found = (_answers.get(key) or kept(file, _is_good)) if key else None
    if found is None:
        found = _ask(config)
        if fault := found.get("fault"):
            raise getattr(errors, found["kind"])(fault)
    if key:
        _answers[key] = found
        if not found["warnings"]:
            keep(file, found)
    return found


def is_here() -> bool:
    """Return whether verl is installed."""
    return version_of("verl") is not None


def with_model(config: DictConfig, folder: Path) -> DictConfig:
    """Return the config with the model as a folder; for a multimodal model, with the tokenizer of the run."""
    from verl_aqn.preflight.text_part import use_text_alone

    config = config.copy()
    config.actor_rollout_ref.model.path = str(folder)
    use_text_alone(config, folder)
    return config


def _key(config: DictConfig, folder: Path, files: Iterable[Path]) -> str:
    """Return a digest of everything that the answer depends on, or "" if that is not known: verl is then asked."""
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    model = config.actor_rollout_ref.model
    settings = [
        {key: value for key, value in data.items() if key not in _UNRELATED},
        [model.get(key) for key in ("tokenizer_path", "custom_chat_template", "trust_remote_code")],
        OmegaConf.select(config, "actor_rollout_ref.rollout.agent.agent_loop_config_path"),
        OmegaConf.select(config, "reward.reward_manager.source"),
        OmegaConf.select(config, "reward.reward_model.enable"),
        not OmegaConf.select(config, "reward.custom_reward_function.path"),
        [importlib.metadata.version(name) for name in ("verl", "transformers", "datasets")],
        verl_aqn.__version__,
    ]
    tools = [Path(data[key]) for key in ("tool_config_path", "function_tool_path") if data.get(key)]
    folders = [folder, *([Path(str(model.tokenizer_path))] if model.get("tokenizer_path") else [])]
    if not all(one.is_dir() for one in folders):
        return ""  # a tokenizer on the hub, whose files are not known here
    found = [file for one in folders for pattern in _FILES for file in sorted(one.glob(pattern))]
    states = [(str(file), _content(file)) for file in [*files, *found, *tools]]
    digest = hashlib.sha256(json.dumps([settings, states], sort_keys=True, default=str).encode())
    for name in _CODE:
        digest.update((Path(verl_aqn.__file__).parent / name).read_bytes())
    return digest.hexdigest()[:24]


def _content(file: Path) -> str:
    """Return the digest of a file, or why it cannot be read: verl then says so if it needs the file."""
    try:
        return known_digest(file)
    except OSError as error:
        return str(error.strerror)


def _is_good(answer: Any) -> bool:
    return isinstance(answer, dict) and {"rows", "warnings"} <= set(answer)


def _fits(answer: Any) -> bool:
    return _is_good(answer) or (isinstance(answer, dict) and "fault" in answer)


def _ask(config: DictConfig) -> Answer:
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if config.aqn.profile == "cpu":
        env["VERL_PLATFORM"] = "cpu"
    text, about = OmegaConf.to_yaml(config, resolve=True), "verl what it reads from the data"
    return ask_module("verl_aqn.integrations.verl.first_rows", about, text=text, env=env, timeout=TIMEOUT_S, fits=_fits)
