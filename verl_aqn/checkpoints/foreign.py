"""Import of checkpoints that are already MXFP4: they are rewritten in another layout bit for bit, without rounding.

==================  ========================================================  ============================
layout              tensors                                                   ``quant_method``
==================  ========================================================  ============================
compressed-tensors  ``M.weight_packed`` [N, K/2], ``M.weight_scale`` [N, K/32]  ``compressed-tensors``
Quark               ``M.weight`` uint8 [N, K/2], ``M.weight_scale`` [N, K/32]   ``quark``, weights fp4 / e8m0
gpt-oss             ``S_blocks`` uint8 [E, N, K/32, 16], ``S_scales`` [E, N, K/32]  ``mxfp4``
ModelSlim           as Quark, for modules with a scheme of `SCHEMES` in ``quant_model_description.json``
==================  ========================================================  ============================

All have the even index in the low nibble and E8M0 scales along K. Bytes are kept; only names and shapes change.

gpt-oss stores all experts of a layer in one stack S, ``...experts.gate_up_proj`` or ``...experts.down_proj``. The stack
is kept: ``S.weight_packed`` [E, N, K/2]. Its rows are output features. In ``gate_up_proj`` the rows of gate and up
alternate (gate is 0::2, up is 1::2), and ``gate_up_proj_bias`` [E, 2I] has the same order. transformers holds the
transpose [E, K, N], which `dequantize_checkpoint` writes. Stock vLLM reads this form and the original, but not stacks
of codes under the names of compressed-tensors.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.building import build
from verl_aqn.checkpoints.formats import FORMATS, MODELSLIM_FORMATS, finish, packed_specs
from verl_aqn.checkpoints.loading import PACKED, PACKED_FORMAT, SCALE, ignored_names
from verl_aqn.checkpoints.modelslim import DESCRIPTION, SCHEMES
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.packing_plan import of_other_parts, routers
from verl_aqn.checkpoints.promises import as_kept, check_opens
from verl_aqn.checkpoints.storage import Spec, Weights, read_config, read_json
from verl_aqn.checkpoints.writing import MAX_SHARD_BYTES, new_folder, write_model
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4.kernels.reference import NAN_SCALE

# Suffixes of (codes, scales) after the name of the module or stack, by layout.
_SUFFIXES = {
    "compressed-tensors": (PACKED, SCALE),
    "quark": (".weight", ".weight_scale"),
    "gpt-oss": ("_blocks", "_scales"),
    "modelslim": FORMATS["modelslim"],
}
_METHODS = {"quark": "quark", "mxfp4": "gpt-oss"}


@dataclass(frozen=True)
class ImportReport:
    """The result of `import_checkpoint`: ``imported`` is the source layout, ``modules`` counts packed modules."""

    imported: str
    modules: int
    bytes_before: int
    bytes_after: int


def foreign_layout(config: dict[str, Any], folder: Path) -> str | None:
    """Return the MXFP4 layout of ``folder`` with ``config`` (config.json): a key of `_SUFFIXES`, or None."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("format") == PACKED_FORMAT:
        return "compressed-tensors"
    if not quantization and (folder / DESCRIPTION).is_file():
        return "modelslim"
    return _METHODS.get(quantization.get("quant_method", ""))


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    format: str = "compressed-tensors",
    progress: Callable[[int, int, str], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ImportReport:
    """Rewrite ``src``, an MXFP4 checkpoint in a layout of `_SUFFIXES`, to the new folder ``dst`` with the same codes.

    Raises:
        ModelError: ``src`` has another layout, a tensor is not MXFP4, is damaged or contains NaN, or ``dst`` exists.
        ConfigError: ``format`` is not one of ``verl_aqn.checkpoints.formats.FORMATS``.
    """
    src, dst = Path(src), Path(dst)
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    config = read_config(src)
    kind = foreign_layout(config, src)
    if kind is None:
        raise ModelError(
            f"{src} is not an MXFP4 checkpoint of compressed-tensors, Quark, gpt-oss or ModelSlim: start from bf16"
        )
    if kind == format or (kind == "modelslim" and format in MODELSLIM_FORMATS.values()):
        raise ModelError(f"{src} is already MXFP4 in the format {kind}: there is nothing to convert")
    weights = Weights(src)
    codes, scales = _SUFFIXES[kind]
    shapes = {name: _matrix_shape(kind, name + codes, weights) for name in _packed(kind, weights)}
    if kind == "modelslim":
        _check_schemes(src)
    if not shapes:
        raise ModelError(f"{src} has no MXFP4 tensor, although its config.json says {kind}: download it again")
    if kind == "gpt-oss" and format in MODELSLIM_FORMATS.values():
        raise ModelError(f"{src}: the format {format} does not support fused experts: use compressed-tensors")
    used = {module + suffix for module in shapes for suffix in (codes, scales)}
    kept = [name for name in weights.specs if name not in used]
    _check_kept(src, weights, kept)

    layout: dict[str, Spec] = {name: weights.specs[name] for name in kept}
    for module, shape in shapes.items():
        layout |= packed_specs(module, shape, format)
    layout = dict(sorted(layout.items()))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in kept:
            yield name, as_kept(name, weights, weights.specs[name].dtype)
        for done, module in enumerate(shapes, start=1):
            for suffix, out in zip((codes, scales), FORMATS[format], strict=True):
                values = weights.read(module + suffix)
                if suffix == scales and (values == NAN_SCALE).any():
                    file = weights.file_of(module + suffix)
                    raise ModelError(f"tensor {module + suffix} of {file} contains NaN: use another checkpoint")
                yield module + out, values.view(layout[module + out].shape)
            if progress is not None:
                progress(done, len(shapes), module)

    config, extra = finish(format, config, layout, set(shapes), _unpacked(src, set(shapes)), src)
    with new_folder(dst) as folder:
        write_model(folder, config, layout, tensors(), src, extra, max_shard_bytes)
        if format == "compressed-tensors":
            (folder / DESCRIPTION).unlink(missing_ok=True)  # copied with the tokenizer from a ModelSlim folder
            check_opens(folder, dst)
    total = [sum(spec.nbytes for spec in specs.values()) for specs in (weights.specs, layout)]
    return ImportReport(kind, len(shapes), *total)


def packed_names(folder: Path) -> list[str]:
    """Return the names of the modules and stacks of ``folder`` that are MXFP4, in a layout of `_SUFFIXES`."""
    kind = foreign_layout(read_config(folder), folder)
    return _packed(kind, Weights(folder)) if kind else []


def _packed(kind: str, weights: Weights) -> list[str]:
    codes, scales = _SUFFIXES[kind]
    names = [name.removesuffix(codes) for name in weights.specs if name.endswith(codes)]
    return [name for name in names if name + scales in weights.specs]


def _matrix_shape(kind: str, name: str, weights: Weights) -> tuple[int, ...]:
    """Return the shape [..., N, K] of the codes ``name``, after checking that they and their scales are MXFP4."""
    codes, scales = _SUFFIXES[kind]
    spec, scale = weights.specs[name], weights.specs[name.removesuffix(codes) + scales]
    shape = (*spec.shape[:-2], spec.shape[-2] * spec.shape[-1]) if kind == "gpt-oss" else spec.shape
    *lead, half = shape
    if spec.dtype != torch.uint8 or half % 16 or scale != Spec(torch.uint8, (*lead, half // 16)):
        raise ModelError(
            f"tensor {name} of {weights.file_of(name)} is not MXFP4: {spec.dtype} {list(spec.shape)} with scales "
            f"{scale.dtype} {list(scale.shape)}; start from a bf16 checkpoint"
        )
    return (*lead, 2 * half)


def _check_schemes(src: Path) -> None:
    """Check that all weights in ModelSlim's description are either MXFP4 or not quantised.

    Raises:
        ModelError: a weight has another scheme.
    """
    for name, scheme in read_json(src / DESCRIPTION).items():
        if name.endswith(".weight") and scheme not in (*SCHEMES.values(), "FLOAT"):
            raise ModelError(
                f"{src / DESCRIPTION} has {name} in {scheme}, but only {' and '.join(SCHEMES.values())} can be "
                "converted: start from bf16"
            )


def _check_kept(src: Path, weights: Weights, kept: list[str]) -> None:
    """Check that each tensor that is not packed belongs to the model; scales of a KV cache or of activations do not.

    Raises:
        ModelError: a tensor does not belong to the model.
    """
    built = build(src)
    model, naming = built.model, Naming(built, weights.specs)
    expected = model.state_dict()
    ignored = ignored_names(model)
    for name in kept:
        target = naming.in_model(name)
        spec = weights.specs[name]
        remade = naming.expert(name) or target in naming.converters or name in naming.passed
        fits = remade or (target in expected and tuple(expected[target].shape) == spec.shape)
        if not fits and not any(re.search(pattern, target) for pattern in ignored):
            raise ModelError(
                f"tensor {name} ({spec.dtype} {list(spec.shape)}) of {weights.file_of(name)} is not a weight of "
                f"{type(model).__name__}, and its effect (for example scales of activations or of a KV cache) would "
                "be lost: start from a checkpoint without it"
            )


def _unpacked(src: Path, packed: set[str]) -> list[str]:
    """Return the names of the model's linear layers and routers that are not in ``packed``."""
    built, weights = build(src), Weights(src)
    model, naming = built.model, Naming(built, weights.specs)
    gates = routers(model)
    names = [
        naming.in_checkpoint(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or name in gates
    ]
    return [name for name in [*names, *of_other_parts(naming, weights)] if name not in packed]
