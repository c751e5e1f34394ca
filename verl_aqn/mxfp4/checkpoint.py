"""Make packed MXFP4 checkpoints that stock vLLM and compressed-tensors load, cache them, and give them a digest."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4.codec import BLOCK, SCALE_RULES, Mxfp4Tensor, dequantize, energies, quantize, ratio_db
from verl_aqn.mxfp4.linear import Mxfp4Linear
from verl_aqn.mxfp4.model import (
    PACKED,
    PACKED_FORMAT,
    SCALE,
    check_names,
    empty_model,
    open_packed,
    packed_modules,
)
from verl_aqn.mxfp4.storage import Spec, Weights, companions, new_folder, read_config, tensor_bytes, write_model

EXCLUDE = ("lm_head", "embed_tokens")
# A router decides which expert runs: an error there is not noise in a sum but another expert.
_ROUTERS = ("*.mlp.gate", "*.router")
# Part of the cache's key: raise it when the same source would give another packed folder.
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModuleReport:
    """What became of one linear layer; ``signal`` and ``noise`` are the energies behind its SQNR."""

    name: str
    shape: tuple[int, int]
    signal: float
    noise: float
    bytes_before: int
    bytes_after: int

    @property
    def sqnr_db(self) -> float:
        return ratio_db(self.signal, self.noise)


@dataclass(frozen=True)
class QuantReport:
    """What `quantize_checkpoint` did. ``bytes_*`` count all weights, those left in 16 bits included."""

    scale_rule: str
    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def sqnr_db(self) -> float:
        """SQNR of all quantised weights taken together."""
        return ratio_db(sum(m.signal for m in self.modules), sum(m.noise for m in self.modules))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an SQNR without any noise, which is infinite, becomes None."""
        return {
            "scale_rule": self.scale_rule,
            "sqnr_db": _finite(self.sqnr_db),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "modules": [
                {
                    "name": m.name,
                    "shape": list(m.shape),
                    "sqnr_db": _finite(m.sqnr_db),
                    "bytes_before": m.bytes_before,
                    "bytes_after": m.bytes_after,
                }
                for m in self.modules
            ],
        }


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    progress: Callable[[int, int, str], None] | None = None,
    quantizer: Callable[[str, Tensor], Mxfp4Tensor] | None = None,
) -> QuantReport:
    """Quantise the Hugging Face folder ``src`` (bf16, fp16 or fp32 safetensors) into the new folder ``dst``.

    Every ``nn.Linear`` of the model that transformers builds from ``config.json`` is packed, except its output head,
    MoE routers, and those that ``exclude`` names: a module's full name, the last parts of it, or a pattern with ``*``.
    All other float tensors become bfloat16. Tensors are read and written one by one, and ``dst`` appears complete or
    not at all. ``progress(done, total, module)`` is called after each layer. ``quantizer(module, weight)`` replaces
    plain rounding under ``scale_rule``: it gets the weight [N, K] as it is stored and returns its codes.

    Raises:
        ModelError: ``src`` cannot be read or is quantised already, a layer does not fit MXFP4 or holds NaN or Inf, or
            ``dst`` exists.
        ConfigError: an entry of ``exclude`` matches no module.
    """
    src, dst, exclude = Path(src), Path(dst), tuple(exclude)
    if scale_rule not in SCALE_RULES:
        raise ConfigError(f"unknown scale rule {scale_rule!r}: use one of {', '.join(SCALE_RULES)}")
    config = read_config(src)
    weights = Weights(src)
    if "quantization_config" in config or any(name.endswith(PACKED) for name in weights.specs):
        raise ModelError(f"{src} is quantised already: start from the bf16 checkpoint it was made of")
    targets, ignored = _choose(src, weights, exclude)

    layout = {}
    for name, spec in weights.specs.items():
        module = name.removesuffix(".weight")
        if module in targets:
            n, k = spec.shape
            layout[module + PACKED] = Spec(torch.uint8, (n, k // 2))
            layout[module + SCALE] = Spec(torch.uint8, (n, k // BLOCK))
        else:
            layout[name] = spec._replace(dtype=torch.bfloat16) if spec.dtype.is_floating_point else spec
    modules: list[ModuleReport] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights.specs.keys() & layout.keys():
            yield name, weights.read(name).to(layout[name].dtype)
        for done, module in enumerate(targets, start=1):
            weight = weights.read(module + ".weight")
            packed, scale = quantizer(module, weight) if quantizer else quantize(weight, scale_rule)
            if (scale == 255).any():
                file = weights.file_of(module + ".weight")
                raise ModelError(f"tensor {module}.weight of {file} holds NaN or Inf: use another checkpoint")
            yield module + PACKED, packed
            yield module + SCALE, scale
            energy = energies(weight, dequantize(packed, scale))
            shape = (weight.shape[0], weight.shape[1])
            modules.append(ModuleReport(module, shape, *energy, weight.nbytes, packed.nbytes + scale.nbytes))
            if progress is not None:
                progress(done, len(targets), module)

    config.pop("torch_dtype", None)
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(ignored)}
    with new_folder(dst) as folder:
        write_model(folder, config, layout, tensors(), source=src)
    total = [sum(spec.nbytes for spec in specs.values()) for specs in (weights.specs, layout)]
    return QuantReport(scale_rule, tuple(modules), *total)


def quantized_cache(
    src: str | Path,
    cache_dir: str | Path,
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """The packed folder of ``src`` under ``cache_dir``, made where it is not there yet.

    Its name carries a SHA-256 over everything that it is made of, so a changed source gets another folder. Processes
    may race: all make it, the first to finish gives it its name, and the others take that one.

    Raises:
        ModelError, ConfigError: as `quantize_checkpoint`.
    """
    src, exclude = Path(src), tuple(exclude)
    read_config(src)
    key = hashlib.sha256(json.dumps([_FORMAT_VERSION, scale_rule, sorted(exclude)]).encode())
    for file in [src / "config.json", *Weights(src).files, *companions(src)]:
        with file.open("rb") as stream:
            key.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    target = Path(cache_dir) / f"{src.resolve().name}-mxfp4-{scale_rule}-{key.hexdigest()[:16]}"
    if not target.is_dir():
        try:
            quantize_checkpoint(src, target, scale_rule, exclude, progress)
        except ModelError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def quantization_config(ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` by which vLLM and compressed-tensors know weight-only MXFP4."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
    }


def base_digest(tensors: Iterable[tuple[str, Tensor, Tensor]]) -> str:
    """SHA-256 (hex) of a packed base, from (module name, packed, scale) triples in any order.

    Each module is hashed by itself, so that the triples may be made one at a time. Names are those of the Hugging Face
    model, without ``.weight_packed``.
    """
    return combined_digest((name, module_digest(packed, scale)) for name, packed, scale in tensors)


def module_digest(packed: Tensor, scale: Tensor) -> str:
    """SHA-256 (hex) of one module's shapes, packed bytes and scale bytes."""
    digest = hashlib.sha256(json.dumps([list(packed.shape), list(scale.shape)]).encode())
    digest.update(tensor_bytes(packed))
    digest.update(tensor_bytes(scale))
    return digest.hexdigest()


def combined_digest(modules: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) over pairs of module name and `module_digest`, in order of name."""
    return hashlib.sha256(json.dumps(sorted(modules)).encode()).hexdigest()


def checkpoint_digest(path: str | Path) -> str:
    """`base_digest` of a packed folder. Raises ModelError where it is not one or is damaged."""
    weights = open_packed(Path(path))
    return base_digest((m, weights.read(m + PACKED), weights.read(m + SCALE)) for m in packed_modules(weights))


def model_digest(model: nn.Module) -> str:
    """`base_digest` of a model with `Mxfp4Linear` layers, bare or inside PEFT and FSDP.

    Under FSDP2 this gathers every packed weight in turn, so all ranks must call it.
    """
    return base_digest(
        (_plain_name(name), _whole(module.weight_packed), _whole(module.weight_scale))
        for name, module in model.named_modules()
        if isinstance(module, Mxfp4Linear)
    )


def _choose(src: Path, weights: Weights, exclude: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(names of the linear layers to pack, names of those to leave alone), from the model's structure."""
    model = empty_model(src)
    check_names(model, weights, src)
    for pattern in exclude:
        if pattern not in EXCLUDE and not any(_matches(name, pattern) for name, _ in model.named_modules()):
            raise ConfigError(f"exclude names {pattern!r}, which matches no module of {type(model).__name__}")
    targets, ignored = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module is model.get_output_embeddings() or any(_matches(name, p) for p in (*exclude, *_ROUTERS)):
            ignored.append(name)
            continue
        targets.append(name)
        _check_layer(src, weights, name, module)
    if not targets:
        raise ModelError(f"{src} has no linear layer to quantise: {type(model).__name__} with exclude {list(exclude)}")
    return targets, ignored


def _check_layer(src: Path, weights: Weights, name: str, module: nn.Linear) -> None:
    spec = weights.specs[name + ".weight"]
    if spec.shape != (module.out_features, module.in_features) or not spec.dtype.is_floating_point:
        raise ModelError(
            f"tensor {name}.weight of {weights.file_of(name + '.weight')} is {spec.dtype} {list(spec.shape)}, but "
            f"config.json asks for [{module.out_features}, {module.in_features}]: the two are not of the same model"
        )
    if module.in_features % BLOCK:
        raise ModelError(
            f"{name} of {src} takes {module.in_features} inputs, not a multiple of {BLOCK} as MXFP4 needs: exclude it"
        )


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def _plain_name(name: str) -> str:
    """A module's name in the Hugging Face model, whatever it is wrapped in."""
    name = re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def is_packed(path: str | Path) -> bool:
    """Whether a folder's config.json says that its linear weights are packed MXFP4."""
    config = read_config(Path(path)).get("quantization_config") or {}
    return config.get("format") == PACKED_FORMAT
