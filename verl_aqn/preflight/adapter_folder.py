"""Loading of PEFT adapters that users bring (`eval --adapter`, `lora_adapter_path`), with PEFT's own code.

The rollout adds scaling·B·A to linear layers and supports nothing else. It would serve any other kind of adapter
wrongly, or the run would stop minutes after its start. Such adapters are therefore rejected here, before a run starts.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from verl_aqn.checkpoints.adapter import ADAPTER_DTYPE, PEFT_PREFIX, Adapter
from verl_aqn.checkpoints.loading import empty_model
from verl_aqn.config.serving import ADAPTER_RANKS
from verl_aqn.errors import DataError, ModelError, first_line, reason, remedy

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")  # names that safetensors uses
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that do not change the base
MERGE = "merge it into its base with PEFT (merge_and_unload) and give the merged model, or train a plain LoRA adapter"
# Fields of LoraConfig that may be set: they say where A and B are, how they were initialised and how they are scaled.
# The effect of any other field is unknown here. This includes the fields of later versions of PEFT.
PLAIN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core", "ensure_weight_tying", "runtime_config",
    "fan_in_fan_out",  # PEFT ignores this field for nn.Linear, and other layers are rejected
}  # fmt: skip


def take_adapter(config: DictConfig, base: Path) -> None:
    """Check the recipe's `lora_adapter_path` against the base, and copy rank, α and layers from it into the recipe.

    verl's FSDP actor reads these values from the adapter folder. verl's vLLM server and the read-back of this project
    read them from the recipe.

    Raises:
        DataError, ModelError: as `read_folder`.
    """
    model = config.actor_rollout_ref.model
    if not model.lora_adapter_path:
        return
    folder = Path(model.lora_adapter_path).expanduser().absolute()
    adapter = read_folder(folder, base)
    model.lora_adapter_path = str(folder)
    model.lora_rank = adapter.widest
    model.lora_alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    model.target_modules = sorted({module.rpartition(".")[2] for module in adapter.matrices})


def check_new_adapter(config: DictConfig, base: Path) -> None:
    """Check that the rollout can serve the new adapter of a recipe that names the layers itself.

    Raises:
        ModelError: `target_modules` matches no module of the base, or a module that is not a linear layer below the
            head.
    """
    from peft import LoraConfig, get_peft_model

    model, what = config.actor_rollout_ref.model, "actor_rollout_ref.model.target_modules"
    if model.lora_adapter_path or model.lora_rank <= 0 or model.target_modules == "all-linear":
        return
    told: Any = OmegaConf.to_container(model, resolve=True)
    try:
        lora = LoraConfig(r=1, **{key: told.get(key) for key in ("target_modules", "exclude_modules")})
        built = get_peft_model(empty_model(base), lora, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ModelError(f"{what}={told['target_modules']} does not fit {base}: {first_line(error)}") from error
    for _ in _layers(what, built, "leave it out"):
        pass


def read_folder(folder: Path, base: Path) -> Adapter:
    """Read the adapter of a PEFT folder for the model in folder `base`; only config.json of the base is read.

    PEFT decides which tensor belongs to which module and which rank it has. No file is unpickled.

    Raises:
        DataError: the folder does not exist or lacks a file, or a file is damaged or contains NaN or infinity.
        ModelError: the adapter is not plain LoRA on linear layers, or it belongs to another model.
    """
    told = read_config(folder)
    _check_tensors(folder)
    model, strange, missing = _load(folder, base)
    if strange:
        raise ModelError(
            f"{folder} does not fit {base}: the model has no module for {_some(strange)}: give the base that the "
            "adapter was trained on"
        )
    if missing:
        raise ModelError(
            f"{folder} lacks {_some(missing)}, although its {CONFIG} lists these modules: copy or save it again"
        )
    adapter = Adapter(
        _matrices(folder, model), told["r"], float(told["lora_alpha"]), bool(told.get("use_rslora")),
        told.get("rank_pattern") or {}, told.get("alpha_pattern") or {},
    )  # fmt: skip
    if adapter.widest > ADAPTER_RANKS[-1]:
        raise ModelError(
            f"{folder} has rank {adapter.widest}: vLLM serves adapters of rank {ADAPTER_RANKS[-1]} at most"
        )
    return adapter


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of adapter_config.json after checking that they describe plain LoRA.

    Raises:
        DataError: the folder does not exist, or lacks a file or an entry.
        ModelError: the adapter is of another kind; the message names the entry that says so.
    """
    if not folder.is_dir():
        raise DataError(
            f"adapter folder {folder} does not exist: give a folder with {CONFIG} and {WEIGHTS} "
            "(`hf download NAME --local-dir DIR` downloads one)"
        )
    try:
        told = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a PEFT adapter folder: cannot read {CONFIG} ({first_line(error)})") from error
    lacking = [key for key in ("peft_type", "r", "lora_alpha") if not isinstance(told, dict) or told.get(key) is None]
    kind = told.get("peft_type") if isinstance(told, dict) else None
    if kind not in (None, "LORA"):
        raise ModelError(f"{folder} is a {kind} adapter, but the rollout serves only LoRA: {MERGE}")
    if lacking:
        raise DataError(
            f"{folder} is not a PEFT adapter folder: {CONFIG} lacks {', '.join(lacking)}: save the adapter with PEFT"
        )
    _check_fields(folder, told)
    if not (folder / WEIGHTS).is_file():
        fix = "convert it: safetensors.torch.save_file(torch.load(BIN, weights_only=True), SAFETENSORS)"
        fix = (
            fix if (folder / PICKLED).is_file() else "`verl-aqn export` makes an adapter folder from a run's checkpoint"
        )
        raise DataError(f"{folder} has no {WEIGHTS}, and no other format is read: {fix}")
    return told


def _check_fields(folder: Path, told: dict[str, Any]) -> None:
    from peft import LoraConfig

    known = {each.name: each for each in fields(LoraConfig)}
    for key, value in told.items():
        if key not in known and value and _newer(told.get("peft_version")):
            raise ModelError(
                f"{folder} was saved by PEFT {told['peft_version']} with {key}={value!r}, which the installed PEFT "
                f"{version('peft')} does not know: save the adapter without this entry"
            )
        if key in known and key not in PLAIN and value and value != _default(known[key]):
            raise ModelError(
                f"{folder}: {key}={json.dumps(value)[:80]} is not plain LoRA, and the rollout serves only plain LoRA: "
                f"{MERGE}"
            )
    if told.get("init_lora_weights", True) not in INITS:
        raise ModelError(
            f"{folder}: init_lora_weights={told['init_lora_weights']!r} changes the base weights: save the adapter as "
            "plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if told.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(f"{folder} is for task_type={told['task_type']}: give an adapter for task_type=CAUSAL_LM")
    numbers = {"r": told["r"], "lora_alpha": told["lora_alpha"]}
    for name in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{name}.{key}": value for key, value in (told.get(name) or {}).items()}
    for key, value in numbers.items():
        whole = key.startswith("r")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 1e9:
            raise DataError(f"{folder}: {key}={value!r} in {CONFIG} is not a {'whole ' * whole}number above 0")


def _default(known: Field) -> Any:
    return known.default_factory() if known.default_factory is not MISSING else known.default


def _newer(said: Any) -> bool:
    """Return whether an adapter was saved by a later version of PEFT than the installed one."""
    try:
        return Version(str(said).partition("@")[0]) > Version(version("peft"))
    except InvalidVersion:
        return False


def _check_tensors(folder: Path) -> None:
    """Check that all tensors of the adapter are floating-point numbers and finite."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise ModelError(f"{folder}: {name} is {dtype}, not a float type: save the adapter in bfloat16")
                if not torch.isfinite(file.get_tensor(name)).all():
                    raise DataError(f"{folder}: {name} contains NaN or infinity: give an adapter with finite weights")
    except OSError as error:
        todo = remedy(error) or "copy it again"
        raise DataError(f"cannot read {folder / WEIGHTS} ({reason(error)}): {todo}") from error
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is damaged ({first_line(error)}): copy it again") from error


def _load(folder: Path, base: Path) -> tuple["PeftModel", list[str], list[str]]:
    """Load the adapter with PEFT onto an empty model.

    Returns:
        The PEFT model, the names of tensors that the model has no module for, and the names of missing LoRA tensors.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    empty = empty_model(base)
    mapping = getattr(empty, "_checkpoint_conversion_mapping", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever PEFT warns about is an error here
        try:
            model = get_peft_model(empty, LoraConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
            for layer in model.modules():
                if isinstance(layer, LoraLayer):  # PEFT would leave these tensors on the meta device of the base
                    for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
                        part.to_empty(device="cpu").float()
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), "cpu", key_mapping=mapping))
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            said = " ".join(str(error).split())[:400]
            raise ModelError(
                f"{folder} does not fit {base}, PEFT says: {said}: give the base that the adapter was trained on"
            ) from error
    return model, list(found.unexpected_keys), [name for name in found.missing_keys if "lora_" in name]


def _matrices(folder: Path, model: "PeftModel") -> dict[str, tuple[Tensor, Tensor]]:
    matrices = {}
    for module, layer in _layers(str(folder), model, MERGE):
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        if not a.any() and not b.any():
            # The rollout cannot distinguish such a pair from an adapter that was never received.
            raise ModelError(f"{folder}: A and B of {module} are zero: leave the layer out of target_modules")
        matrices[module] = (a.to(ADAPTER_DTYPE), b.to(ADAPTER_DTYPE))
    return matrices


def _layers(what: str, model: "PeftModel", fix: str) -> Iterator[tuple[str, Any]]:
    """Yield every adapted module of the model with its name.

    Raises:
        ModelError: an adapted module is not a linear layer below the head.
    """
    from peft.tuners.lora import Linear, LoraLayer

    base = model.get_base_model()
    ends = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            for layer in (base.get_input_embeddings(), base.get_output_embeddings())]  # fmt: skip
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        inner = layer.get_base_layer()
        if type(layer) is not Linear or not isinstance(inner, nn.Linear) or any(inner is end for end in ends):
            raise ModelError(
                f"{what} changes {name.removeprefix(PEFT_PREFIX)} ({type(inner).__name__}): the rollout serves "
                f"adapters only on linear layers below the head: {fix}"
            )
        yield name.removeprefix(PEFT_PREFIX), layer


def _some(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix(PEFT_PREFIX) for name in sorted(names)[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown
