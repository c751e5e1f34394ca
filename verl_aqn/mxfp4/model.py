"""Packed checkpoints as transformers models: build, load, and write out as plain bfloat16."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import dequantize
from verl_aqn.mxfp4.linear import Mxfp4Linear
from verl_aqn.mxfp4.storage import Spec, Weights, new_folder, read_config, write_model

PACKED_FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = ".weight_packed", ".weight_scale"


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The model of a packed folder, in evaluation mode: `Mxfp4Linear` where it is packed, other weights in ``dtype``.

    Raises:
        ModelError: the folder is not a packed checkpoint, its weights are damaged, or they are not the model's.
    """
    path = Path(path)
    weights = open_packed(path)
    model = empty_model(path, dtype, attn_implementation)
    for name in packed_modules(weights):
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"{path} packs {name}, which is not a linear layer of {type(model).__name__}")
        packed = Mxfp4Linear(linear.in_features, linear.out_features, linear.bias is not None, "meta", dtype)
        model.set_submodule(name, packed)
    check_names(model, weights, path)

    state = {}
    for name in model.state_dict().keys() & weights.specs.keys():
        tensor = weights.read(name)
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # its lines name the tensor and both shapes
        raise ModelError(f"the weights of {path} do not fit its config.json: {' '.join(str(error).split())}") from error
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.to(device).eval()


def dequantize_checkpoint(src: str | Path, dst: str | Path) -> None:
    """Write packed folder ``src`` as an ordinary bfloat16 folder ``dst``: the same model, for whatever reads no MXFP4.

    Raises:
        ModelError: ``src`` is not a packed checkpoint or is damaged, or ``dst`` exists.
    """
    src, dst = Path(src), Path(dst)
    weights = open_packed(src)
    modules = packed_modules(weights)
    config = read_config(src)
    del config["quantization_config"]

    layout = {name: spec for name, spec in weights.specs.items() if not name.endswith((PACKED, SCALE))}
    for name in modules:
        n, half = weights.specs[name + PACKED].shape
        layout[name + ".weight"] = Spec(torch.bfloat16, (n, 2 * half))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in layout.keys() & weights.specs.keys():
            yield name, weights.read(name)
        for name in modules:
            yield name + ".weight", dequantize(weights.read(name + PACKED), weights.read(name + SCALE))

    with new_folder(dst) as folder:
        write_model(folder, config, layout, tensors(), source=src)


def empty_model(path: Path, dtype: torch.dtype = torch.bfloat16, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The causal language model that ``path/config.json`` describes, unquantised: parameters on meta, buffers real."""
    from accelerate import init_empty_weights

    read_config(path)
    try:
        config = AutoConfig.from_pretrained(path)
        # Otherwise transformers' own quantiser would start.
        config.__dict__.pop("quantization_config", None)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except (ValueError, KeyError, OSError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"transformers cannot build the model of {path / 'config.json'}: {first_line}") from error


def check_names(model: PreTrainedModel, weights: Weights, path: Path) -> None:
    """Raise ModelError unless ``weights`` names exactly the model's tensors (a tied copy may be left out)."""
    expected = set(model.state_dict())
    missing = expected - weights.specs.keys() - set(model.all_tied_weights_keys)
    # transformers ignores these as well; old checkpoints store the rotary frequencies, which are computed.
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    unexpected = {
        name for name in weights.specs.keys() - expected if not any(re.search(pattern, name) for pattern in ignored)
    }
    for names, fault in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            raise ModelError(
                f"{path} {fault} tensor {min(names)} ({len(names)} in all): its weights must carry the names that "
                f"{type(model).__name__} of this transformers gives them (fused experts are not supported)"
            )


def open_packed(path: Path) -> Weights:
    """The weights of a packed folder; ModelError where it is not one."""
    quantization: dict[str, Any] = read_config(path).get("quantization_config") or {}
    if quantization.get("format") != PACKED_FORMAT:
        raise ModelError(f"{path} is not a packed MXFP4 checkpoint: make one with `verl-aqn quantize {path} DST`")
    return Weights(path)


def packed_modules(weights: Weights) -> list[str]:
    """Names of the modules whose weights are packed, sorted; ModelError where a scale is missing or does not fit."""
    modules = sorted(name.removesuffix(PACKED) for name in weights.specs if name.endswith(PACKED))
    for name in modules:
        packed, scale = weights.specs[name + PACKED], weights.specs.get(name + SCALE)
        *lead, half = packed.shape
        if packed.dtype != torch.uint8 or half % 16 or scale != Spec(torch.uint8, (*lead, half // 16)):
            raise ModelError(
                f"{weights.file_of(name + PACKED)}: {name}{PACKED} {list(packed.shape)} and its {SCALE} do not belong "
                "together: quantise the model again"
            )
    return modules
