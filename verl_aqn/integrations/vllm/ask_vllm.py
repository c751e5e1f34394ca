"""Check whether the installed vLLM can serve a model.

Use: `python -m verl_aqn.integrations.vllm.ask_vllm FOLDER OPTIONS_JSON`.

vLLM builds the model of FOLDER/config.json, with its slots for adapters, on the meta device. It reads no weights, so
the size of the model does not matter. The last line of standard output is the answer as JSON, which
`verl_aqn.preflight.vllm_says` reads.
"""

import json
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from verl_aqn.checkpoints.building import linear_layers

COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
RANK = 8  # rank of the adapter slots in this check


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(json.dumps(answer(folder, options)), flush=True)
    sys.stdout.flush()
    os._exit(0)  # vLLM's process groups print warnings at a normal exit


def answer(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what vLLM can do with the model in `folder`.

    `options`: arguments of vLLM's engine. The answer always has `platform`; `fault` says why vLLM cannot build the
    model.
    """
    from vllm.platforms import current_platform

    said: dict[str, Any] = {
        "platform": "npu" if current_platform.device_name == "npu" else current_platform.device_type
    }
    if said["platform"] != "cpu":
        # Not yet tested on an accelerator: return only what is known without using the device.
        return said | _class_of(folder)
    with TemporaryDirectory() as copy:
        _copy_without_weights(folder, Path(copy))
        try:
            return said | _build(Path(copy), options, folder)
        except Exception as error:  # any error of vLLM is the answer
            return said | {"fault": reason(error)}


def _copy_without_weights(folder: Path, copy: Path) -> None:
    """Link the folder's small files into `copy`, with a config.json that names no quantisation.

    A packed base may be served packed or in bf16; vLLM uses the class of the unquantised config for both.
    """
    for file in (file for pattern in COPIED for file in folder.glob(pattern)):
        if file.stat().st_size < 1 << 26 and not file.name.endswith(".index.json"):
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").unlink(missing_ok=True)
    (copy / "config.json").write_text(json.dumps(config))


def _class_of(folder: Path) -> dict[str, Any]:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    known = [name for name in names if name in ModelRegistry.models]
    if not known:
        return {}  # vLLM may still run it through transformers
    try:
        cls = ModelRegistry.models[known[0]].load_model_cls()
    except ImportError as error:
        return {"fault": reason(error)}
    return {"class": cls.__name__, "lora": bool(supports_lora(cls))}


def _build(folder: Path, options: dict[str, Any], weights: Path) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import ModelRegistry, registry
    from vllm.model_executor.models.interfaces import supports_lora

    # vLLM inspects classes in a subprocess, to keep its own process clean; this process is already separate.
    registry._run_in_subprocess = lambda look: look()
    for name in json.loads((folder / "config.json").read_text()).get("architectures") or []:
        if name in ModelRegistry.models:
            ModelRegistry.models[name].load_model_cls()  # raises the real error, which vLLM would hide
    hf_linears = linear_layers(folder)
    config: Any = EngineArgs(
        model=str(folder),
        load_format="dummy",
        enforce_eager=True,
        skip_tokenizer_init=True,
        distributed_executor_backend="mp",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=RANK,
        lora_target_modules=sorted({name.rpartition(".")[2] for name in hf_linears}) or None,
        **options,
    ).create_engine_config()
    with set_current_vllm_config(config), TemporaryDirectory() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting}/store", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            model = initialize_model(config)
        said = {
            "class": type(model).__name__,
            "lora": bool(supports_lora(model)),
            "hybrid": bool(config.model_config.is_hybrid),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "head_is_embedding": _head_is_embedding(model),
            **_attention(config),
        }
        if refused := refused_tensor(model, weights):
            said["fault"] = refused
        if said["lora"]:
            said["without_slot"] = without_slot(model, config, sent_names(folder, hf_linears))
    return said


def _attention(config: Any) -> dict[str, Any]:
    """Return whether all attention layers have a window, and the head sizes that their backend does not support."""
    windows, unfit = set(), set()
    for layer in config.compilation_config.static_forward_context.values():
        backend, size = getattr(layer, "attn_backend", None), getattr(layer, "head_size", None)
        if backend is None or size is None:
            continue
        windows.add(getattr(layer, "sliding_window", None))
        sizes = backend.get_supported_head_sizes()
        if sizes and size not in sizes:
            unfit.add(f"heads of {size} (it supports {', '.join(map(str, sizes))})")
    return {"all_windowed": bool(windows) and None not in windows, "unfit": sorted(unfit)}


def _head_is_embedding(model: Any) -> bool:
    """Return whether logits are computed with an embedding that vLLM would wrap for LoRA; Cohere's class then fails."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = list(model.modules())
    wrapped = any(getattr(module, "embedding_modules", None) for module in modules)
    return wrapped and not any(isinstance(module, ParallelLMHead) for module in modules)


def refused_tensor(model: Any, folder: Path) -> str | None:
    """Return vLLM's error about a tensor of `folder` for which its model has no parameter; reads no values.

    The model loads tensors on the meta device. Only errors about names count, because other errors may be caused by the
    meta device.
    """
    import torch

    from verl_aqn.checkpoints.loading import DenseView
    from verl_aqn.checkpoints.packing import is_packed
    from verl_aqn.checkpoints.storage import Weights, has_weights, read_config

    packed = is_packed(folder)
    if not has_weights(folder) or (read_config(folder).get("quantization_config") and not packed):
        return None
    specs = DenseView(folder).specs if packed else Weights(folder).specs
    tensors = ((n, torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for n, spec in specs.items())
    try:
        model.load_weights(tensors)
    except KeyError as error:
        return f"it has no parameter named {error} for a tensor of {folder}"
    except ValueError as error:
        if "no module or parameter named" in str(error):
            return f"{str(error).split('. ')[0]}, for a tensor of {folder}"
    except Exception:
        return None
    return None


def sent_names(folder: Path, linears: list[str]) -> dict[str, str]:
    """Map transformers' names of linear layers to the names under which the actor sends their adapters."""
    from verl_aqn.checkpoints.building import is_multimodal
    from verl_aqn.checkpoints.naming import Naming

    if not is_multimodal(folder):
        return {name: name for name in linears}
    names = Naming.of_folder(folder)
    return {name: names.adapter_name(name) for name in linears}


def without_slot(model: Any, config: Any, linears: dict[str, str]) -> list[str]:
    """Return the linear layers whose adapter has no place in vLLM.

    `linears` maps transformers' names of layers to the names under which their adapters are sent.
    """
    import torch
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import parse_fine_tuned_lora_name

    with torch.device("meta"):
        manager = LoRAModelManager(
            model,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            vocab_size=config.model_config.get_vocab_size(),
            lora_config=config.lora_config,
            device=torch.device("meta"),
            vllm_config=config,
        )
    accepted = set(manager.modules)
    for fused, parts in manager.packed_modules.items():
        accepted |= set(parts) | {fused}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = getattr(mapper, "get_unstacked_mapper", lambda: mapper)()  # as verl does when it loads an adapter
    return [
        name
        for name, sent in linears.items()
        if parse_fine_tuned_lora_name(f"base_model.model.{sent}.lora_A.weight", mapper)[0] not in accepted
    ]


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, with the error's type."""
    if hasattr(error, "errors") and callable(error.errors):  # pydantic's
        return str(error.errors()[0].get("msg", error)).split("\n")[0]
    text = (str(error).strip() or "no message").splitlines()[0]
    text = re.sub(r" \(/[^)]*\)$", "", text)  # the file in an ImportError's message
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
