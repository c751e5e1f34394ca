"""Packed checkpoints as transformers models: build, load, and write out as plain bfloat16."""

import copy
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from verl_aqn.checkpoints.building import build, is_multimodal
from verl_aqn.checkpoints.building import empty_model as empty_model  # asked for here, too
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.storage import Spec, Weights, read_config
from verl_aqn.checkpoints.writing import MAX_SHARD_BYTES, new_folder, write_model
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import dequantize
from verl_aqn.mxfp4.experts import Mxfp4Experts, is_fused
from verl_aqn.mxfp4.linear import Mxfp4Linear
from verl_aqn.mxfp4.names import ROLES, is_expert, parts_in, parts_of

PACKED_FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = ".weight_packed", ".weight_scale"


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of a packed folder, in evaluation mode: `Mxfp4Linear` where it is packed, other weights in ``dtype``.

    The folder's names of its modules are in ``checkpoint_names``, a `Naming`.
    Without ``attn_implementation`` it is transformers' choice: SDPA, or eager where the architecture has no other.
    On device ``meta`` no values are read: the call checks that the folder's names, shapes and config belong together.

    Raises:
        ModelError: the folder is not a packed checkpoint, its weights are damaged, or they are not the model's.
    """
    path = Path(path)
    weights = open_packed(path)
    return _load(path, weights, packed_modules(weights), dtype, device, attn_implementation)


def load_dense(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model of an unquantised folder, or of its text part where it is multimodal, in evaluation mode.

    ``checkpoint_names`` and ``attn_implementation`` are those of `load_model`; on device ``meta`` it has no values.

    Raises:
        ModelError: the folder's weights are damaged, or they are not the model's.
    """
    path = Path(path)
    if is_multimodal(path):
        return _load(path, Weights(path), [], dtype, device, attn_implementation)
    from accelerate import init_empty_weights

    with init_empty_weights() if torch.device(device).type == "meta" else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation)
    model.checkpoint_names = Naming.of_folder(path)
    return model.to(device).eval()


def read_values(model: PreTrainedModel, path: str | Path, names: Iterable[str]) -> None:
    """Give tensors ``names`` of a model on meta the values of the folder that it was made of, on the CPU."""
    weights, naming, expected = Weights(Path(path)), model.checkpoint_names, model.state_dict()
    sources = naming.sources(weights.specs)
    state: dict[str, Tensor] = {}
    for name in names:
        if name not in state:
            state |= _gather(weights, naming, name, expected, sources[name], Path(path))
    state = {name: state[name].to(expected[name].dtype) for name in names}
    model.load_state_dict(state, strict=False, assign=True)


def _load(
    path: Path,
    weights: Weights,
    packed: list[str],
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str | None,
) -> PreTrainedModel:
    weights.device = "meta" if torch.device(device).type == "meta" else "cpu"
    built = build(path, dtype, attn_implementation)
    model, naming = built.model, Naming(built, weights.specs)
    _place_packed_layers(model, naming, packed, weights, dtype, path)
    sources = naming.sources(weights.specs)
    check_names(model, naming, sources, path)

    state: dict[str, Tensor] = {}
    expected = model.state_dict()
    for name in sorted(expected.keys() & sources.keys()):
        if name not in state:
            state |= _gather(weights, naming, name, expected, sources[name], path)
    for name, tensor in state.items():
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    _check_tied(model, state, path)
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # its lines name the tensor and both shapes
        raise ModelError(f"the weights of {path} do not fit its config.json: {' '.join(str(error).split())}") from error
    model.tie_weights()
    model.checkpoint_names = naming
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.to(device).eval()


class DenseView:
    """A packed folder read as the bfloat16 folder that it equals; ``specs`` and ``read`` are those of `Weights`.

    A stack of packed experts [E, N, K/2] is gpt-oss's (`verl_aqn.checkpoints.foreign`) and becomes [E, K, N], as transformers
    holds it.

    Raises:
        ModelError: ``folder`` is not a packed checkpoint or is damaged.
    """

    def __init__(self, folder: Path):
        self._weights = open_packed(folder)
        self._module: dict[str, str] = {}
        self.specs = {n: spec for n, spec in self._weights.specs.items() if not n.endswith((PACKED, SCALE))}
        for module in packed_modules(self._weights):
            *lead, n, half = self._weights.specs[module + PACKED].shape
            name = module if lead else module + ".weight"
            self._module[name] = module
            self.specs[name] = Spec(torch.bfloat16, (*lead, 2 * half, n) if lead else (n, 2 * half))

    def read(self, name: str) -> Tensor:
        """The tensor's values on the CPU, dequantised where they are packed."""
        module = self._module.get(name)
        if module is None:
            return self._weights.read(name)
        weight = dequantize(self._weights.read(module + PACKED), self._weights.read(module + SCALE))
        return weight.transpose(1, 2) if weight.dim() == 3 else weight


def dequantize_checkpoint(src: str | Path, dst: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write packed folder ``src`` as an ordinary bfloat16 folder ``dst``: the same model, for whatever reads no MXFP4.

    Tensors are read, dequantised and written one by one, so that memory is bounded by the largest of them.

    Raises:
        ModelError: ``src`` is not a packed checkpoint or is damaged, or ``dst`` exists.
    """
    src = Path(src)
    view = DenseView(src)
    layout = dict(sorted(view.specs.items()))
    with new_folder(Path(dst)) as folder:
        tensors = ((name, view.read(name)) for name in layout)
        write_model(folder, dense_config(src), layout, tensors, src, {}, max_shard_bytes)


def dense_config(src: Path) -> dict[str, Any]:
    """``config.json`` of a folder's bfloat16 equal."""
    config = read_config(src)
    return {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")} | {"dtype": "bfloat16"}


def check_names(model: PreTrainedModel, naming: Naming, sources: dict[str, list[str]], path: Path) -> None:
    """Raise ModelError unless ``sources`` has exactly the model's tensors (a tied copy may be left out).

    ``sources`` is what ``naming`` makes of the checkpoint's names: the model's tensors, and what each is made of.
    """
    expected = model.state_dict()
    missing = expected.keys() - sources.keys() - set(model.all_tied_weights_keys)
    ignored = ignored_names(model)
    unexpected = {
        sources[name][0]
        for name in sources.keys() - expected.keys()
        if not any(re.search(pattern, name) for pattern in ignored)
    }
    for name in expected.keys() & sources.keys():
        if naming.expert(sources[name][0]):
            parts = {naming.of_expert(expert) + suffix for expert, suffix in parts_of(name, len(expected[name]))}
            missing |= parts - set(sources[name])
            unexpected |= set(sources[name]) - parts
    for names, fault in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            raise ModelError(
                f"{path} {fault} tensor {min(names)} ({len(names)} in all): its weights must carry the names that "
                f"{type(model).__name__} of this transformers gives them, with one name for each expert or fused ones"
            )


def ignored_names(model: PreTrainedModel) -> list[str]:
    """Patterns of tensors that a checkpoint may hold for nothing: transformers ignores them as well."""
    # Old checkpoints store the rotary frequencies, which are computed.
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]


def _check_tied(model: PreTrainedModel, state: dict[str, Tensor], path: Path) -> None:
    """Raise ModelError where config.json ties two weights that the folder stores with different values."""
    for copied, original in model.all_tied_weights_keys.items():
        pair = [state[name] for name in (copied, original) if name in state]
        if len(pair) == 2 and not pair[0].is_meta and not torch.equal(*pair):
            raise ModelError(
                f"{path / 'config.json'} ties {copied} to {original}, but the folder stores other values for it: set "
                "tie_word_embeddings to false, or remove the tensor"
            )


def _place_packed_layers(
    model: PreTrainedModel, naming: Naming, packed: list[str], weights: Weights, dtype: torch.dtype, path: Path
) -> None:
    """Put an `Mxfp4Linear` or `Mxfp4Experts`, on meta, where the checkpoint's modules ``packed`` belong."""
    modules = dict(model.named_modules())
    for name in packed:
        expert, stack = naming.expert(name), len(weights.specs[name + PACKED].shape) == 3
        where = expert.module if expert else naming.module_in_model(name)
        where = where.rpartition(".")[0] if stack else where
        module = modules.get(where)
        if (expert or stack) and module is not None and is_fused(module):
            modules[where] = Mxfp4Experts(module, naming)
        elif isinstance(module, nn.Linear) and not expert:
            bias = module.bias is not None
            modules[where] = Mxfp4Linear(module.in_features, module.out_features, bias, "meta", dtype)
            modules[where].name_in_checkpoint = name
        elif not isinstance(module, Mxfp4Experts):
            raise ModelError(f"{path} packs {name}, which is not a linear layer of {type(model).__name__}")
        model.set_submodule(where, modules[where])


def _gather(
    weights: Weights, naming: Naming, name: str, expected: dict[str, Tensor], sources: list[str], path: Path
) -> dict[str, Tensor]:
    """Tensor ``name`` of the model: the checkpoint's one tensor, or what transformers makes of those in ``sources``.

    A fused stack of experts is put together one matrix at a time. With ``name`` come its siblings, where one tensor of
    the checkpoint becomes several.
    """
    if naming.expert(sources[0]):
        return {name: _stack(weights, naming, expected[name], sources, path)}
    first = next((key for key, (c, _) in naming.converters.items() if key == name or _is_sibling(c, key, name)), None)
    if first is None:
        return {name: weights.read(sources[0])}
    converter, patterns = copy.deepcopy(naming.converters[first][0]), naming.converters[first][1]
    for source in sorted(patterns, key=_natural):
        converter.add_tensor(first, source, patterns[source], weights.read(source))
    try:
        # Some operations look at the shape that the model has.
        made = converter.convert(first, model=_Shapes(expected), config=None)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the weights of {path} do not fit its config.json: {first}: {error}") from error
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _is_sibling(converter: Any, first: str, name: str) -> bool:
    targets = converter.target_patterns
    return any(first.replace(targets[0], other) == name for other in targets[1:])


class _Shapes:
    """A model's tensors by name, as transformers' operations ask for them."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.get_parameter = tensors.__getitem__


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _stack(weights: Weights, naming: Naming, target: Tensor, names: list[str], path: Path) -> Tensor:
    """A fused stack like ``target`` out of the matrices of its experts."""
    stack = torch.empty(target.shape, dtype=weights.specs[names[0]].dtype, device=weights.device)
    for name in names:
        expert = naming.expert(name)
        assert expert
        fused, half = ROLES[expert.role]
        part = stack[expert.number].chunk(parts_in(fused))[half]
        if part.shape != weights.specs[name].shape:
            raise ModelError(
                f"the weights of {path} do not fit its config.json: {name} is {list(weights.specs[name].shape)}, not "
                f"{list(part.shape)}"
            )
        part.copy_(weights.read(name))
    return stack


def has_packed_experts(path: Path) -> bool:
    """Whether a packed folder holds experts of a MoE model among its packed modules.

    Raises:
        ModelError: the folder is not a packed checkpoint or is damaged.
    """
    weights = open_packed(path)
    return any(is_expert(name) or len(weights.specs[name + PACKED].shape) == 3 for name in packed_modules(weights))


def has_packed_stacks(path: Path) -> bool:
    """Whether a packed folder holds experts as stacks, one tensor for all, under names that vLLM does not read.

    Raises:
        ModelError: the folder is not a packed checkpoint or is damaged.
    """
    weights = open_packed(path)
    return any(len(weights.specs[name + PACKED].shape) == 3 for name in packed_modules(weights))


def open_packed(path: Path) -> Weights:
    """The weights of a packed folder; ModelError where it is not one."""
    quantization: dict[str, Any] = read_config(path).get("quantization_config") or {}
    if quantization.get("format") != PACKED_FORMAT:
        raise ModelError(f"{path} is not a packed MXFP4 checkpoint: make one with `verl-aqn quantize {path} DST`")
    if quantization.get("kv_cache_scheme"):
        raise ModelError(
            f"{path / 'config.json'} asks for a quantised KV cache (kv_cache_scheme), which the trainer does not have: "
            "remove kv_cache_scheme, and the k_scale and v_scale tensors"
        )
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
