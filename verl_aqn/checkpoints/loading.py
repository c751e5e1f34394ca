"""Packed checkpoints as transformers models: building, loading, and writing as plain bfloat16."""

import copy
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from verl_aqn.checkpoints.building import build, is_multimodal, stays_float32
from verl_aqn.checkpoints.building import empty_model as empty_model  # imported from here, too
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
    """Load the model of a packed folder in evaluation mode, with packed layers and other weights in ``dtype``.

    The weights of `stays_float32` have at least float32 and are buffers.

    The attribute ``checkpoint_names`` of the model, a `Naming`, has the names of its modules in the folder. Without
    ``attn_implementation`` transformers chooses: SDPA, or eager if the architecture has no other. On device ``meta`` no
    values are read: the call only checks that names, shapes and config of the folder match.

    Raises:
        ModelError: the folder is not a packed checkpoint, or its weights are damaged or do not fit the model.
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
    """Load the model of an unquantised folder, or its text part if it is multimodal, in evaluation mode.

    ``checkpoint_names`` and ``attn_implementation`` are as in `load_model`. On device ``meta`` the model has no values.

    Raises:
        ModelError: the weights of the folder are damaged or do not fit the model.
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
    """Load the values of tensors ``names`` on the CPU into a model on meta, from the folder of the model."""
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
        wide = torch.promote_types(dtype, torch.float32) if stays_float32(model, name) else dtype
        state[name] = tensor.to(device, wide if tensor.is_floating_point() else None)
    _check_tied(model, state, path)
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # the lines of the error name the tensor and both shapes
        raise ModelError(f"the weights of {path} do not fit its config.json: {' '.join(str(error).split())}") from error
    for name, tensor in list(model.named_parameters()):
        if stays_float32(model, name):
            # FSDP2 casts parameters to bfloat16 before each forward, and leaves buffers as they are.
            holder, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            delattr(holder, leaf)
            holder.register_buffer(leaf, tensor.data)
    model.tie_weights()
    model.checkpoint_names = naming
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.to(device).eval()


class DenseView:
    """A view of a packed folder as a dequantised bfloat16 folder; ``specs`` and ``read`` are as in `Weights`.

    A stack of packed experts [E, N, K/2] comes from gpt-oss (`verl_aqn.checkpoints.foreign`). It is read as [E, K, N],
    the layout of transformers.

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
        """Read the tensor's values on the CPU, dequantised if they are packed."""
        module = self._module.get(name)
        if module is None:
            return self._weights.read(name)
        weight = dequantize(self._weights.read(module + PACKED), self._weights.read(module + SCALE))
        return weight.transpose(1, 2) if weight.dim() == 3 else weight


def dequantize_checkpoint(src: str | Path, dst: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write packed folder ``src`` as a plain bfloat16 folder ``dst`` with the same values, for tools without MXFP4.

    Tensors are read, dequantised and written one by one, so that memory is bounded by the largest tensor.

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
    """Return the ``config.json`` of the bfloat16 equivalent of a folder."""
    config = read_config(src)
    return {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")} | {"dtype": "bfloat16"}


def check_names(model: PreTrainedModel, naming: Naming, sources: dict[str, list[str]], path: Path) -> None:
    """Check that ``sources`` has exactly the tensors of the model; tied copies may be missing.

    ``sources`` is the result of ``naming.sources``: for each tensor of the model the tensors of the checkpoint that it
    is made of.

    Raises:
        ModelError: the checkpoint lacks a tensor or has an unknown one.
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
                f"{path} {fault} tensor {min(names)} ({len(names)} in all): its weights must have the names that "
                f"{type(model).__name__} has in this version of transformers, with experts separate or fused"
            )


def ignored_names(model: PreTrainedModel) -> list[str]:
    """Return patterns of tensors in a checkpoint that are not used; transformers ignores them too."""
    # Old checkpoints store the rotary frequencies, which are computed from the config.
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]


def _check_tied(model: PreTrainedModel, state: dict[str, Tensor], path: Path) -> None:
    """Check that weights that config.json ties have equal values in the folder.

    Raises:
        ModelError: the folder stores two tied weights with different values.
    """
    for copied, original in model.all_tied_weights_keys.items():
        pair = [state[name] for name in (copied, original) if name in state]
        if len(pair) == 2 and not pair[0].is_meta and not torch.equal(*pair):
            raise ModelError(
                f"{path / 'config.json'} ties {copied} to {original}, but the folder stores different values for the "
                "two: set tie_word_embeddings to false, or remove the tensor"
            )


def _place_packed_layers(
    model: PreTrainedModel, naming: Naming, packed: list[str], weights: Weights, dtype: torch.dtype, path: Path
) -> None:
    """Replace the modules of the model for the packed modules ``packed`` by `Mxfp4Linear` or `Mxfp4Experts` on meta."""
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
    """Return tensor ``name`` of the model: one tensor of the checkpoint, or what transformers makes of ``sources``.

    A fused stack of experts is assembled one matrix at a time. If one tensor of the checkpoint becomes several tensors
    of the model, all of these are returned.
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
        # Some operations need the shape of the tensor in the model.
        made = converter.convert(first, model=_Shapes(expected), config=None)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the weights of {path} do not fit its config.json: {first}: {error}") from error
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _is_sibling(converter: Any, first: str, name: str) -> bool:
    targets = converter.target_patterns
    return any(first.replace(targets[0], other) == name for other in targets[1:])


class _Shapes:
    """The tensors of a model by name, with the interface that the operations of transformers use."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.get_parameter = tensors.__getitem__


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _stack(weights: Weights, naming: Naming, target: Tensor, names: list[str], path: Path) -> Tensor:
    """Assemble a fused stack with the shape of ``target`` from the matrices of its experts."""
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
    """Return whether the packed modules of a folder include experts of a MoE model.

    Raises:
        ModelError: the folder is not a packed checkpoint or is damaged.
    """
    weights = open_packed(path)
    return any(is_expert(name) or len(weights.specs[name + PACKED].shape) == 3 for name in packed_modules(weights))


def has_packed_stacks(path: Path) -> bool:
    """Return whether a packed folder holds experts as stacks (one tensor for all experts), which vLLM does not read.

    Raises:
        ModelError: the folder is not a packed checkpoint or is damaged.
    """
    weights = open_packed(path)
    return any(len(weights.specs[name + PACKED].shape) == 3 for name in packed_modules(weights))


def open_packed(path: Path) -> Weights:
    """Open the weights of a packed folder.

    Raises:
        ModelError: ``path`` is not a packed folder.
    """
    quantization: dict[str, Any] = read_config(path).get("quantization_config") or {}
    if quantization.get("format") != PACKED_FORMAT:
        raise ModelError(f"{path} is not a packed MXFP4 checkpoint: make one with `verl-aqn quantize {path} DST`")
    if quantization.get("kv_cache_scheme"):
        raise ModelError(
            f"{path / 'config.json'} asks for a quantised KV cache (kv_cache_scheme), which the trainer does not "
            "support: remove kv_cache_scheme, and the k_scale and v_scale tensors"
        )
    return Weights(path)


def packed_modules(weights: Weights) -> list[str]:
    """Return the sorted names of the modules whose weights are packed.

    Raises:
        ModelError: a scale is missing or has another shape or dtype.
    """
    modules = sorted(name.removesuffix(PACKED) for name in weights.specs if name.endswith(PACKED))
    for name in modules:
        packed, scale = weights.specs[name + PACKED], weights.specs.get(name + SCALE)
        *lead, half = packed.shape
        if packed.dtype != torch.uint8 or half % 16 or scale != Spec(torch.uint8, (*lead, half // 16)):
            raise ModelError(
                f"{weights.file_of(name + PACKED)}: {name}{PACKED} {list(packed.shape)} and its {SCALE} do not match: "
                "quantise the model again"
            )
    return modules
