"""Packed MXFP4 checkpoints that stock vLLM and compressed-tensors load, and their digests."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl_aqn.checkpoints.adapter import PEFT_PREFIX, unwrapped
from verl_aqn.checkpoints.error_report import FILE, ModuleReport, QuantReport
from verl_aqn.checkpoints.foreign import foreign_layout
from verl_aqn.checkpoints.formats import FORMATS, finish, packed_specs
from verl_aqn.checkpoints.int8_base import int8_part_digest
from verl_aqn.checkpoints.loading import PACKED, PACKED_FORMAT, SCALE, open_packed, packed_modules
from verl_aqn.checkpoints.packing_plan import EXCLUDE, make_plan
from verl_aqn.checkpoints.promises import as_kept, check_opens
from verl_aqn.checkpoints.slices import NOTHING, Slice, Slices, cut, scaled
from verl_aqn.checkpoints.storage import Spec, Weights, read_config
from verl_aqn.checkpoints.values import values_digest as values_digest  # imported from here, too
from verl_aqn.checkpoints.writing import MAX_SHARD_BYTES, new_folder, tensor_bytes, write_model
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4.codec import BLOCK, SCALE_RULES, Mxfp4Tensor, dequantize, quantize
from verl_aqn.mxfp4.error_split import split_error
from verl_aqn.mxfp4.experts import Mxfp4Experts
from verl_aqn.mxfp4.int8_rows import to_int8
from verl_aqn.mxfp4.linear import Mxfp4Linear


def check_choices(scale_rule: str, format: str) -> None:
    """Raise ConfigError if the scale rule or the format is unknown."""
    for value, known, what in ((scale_rule, SCALE_RULES, "scale rule"), (format, FORMATS, "format")):
        if value not in known:
            raise ConfigError(f"unknown {what} {value!r}: use one of {', '.join(known)}")


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    progress: Callable[[int, int, str], None] | None = None,
    quantizer: Callable[[str, Tensor], Mxfp4Tensor] | None = None,
    format: str = "compressed-tensors",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantReport:
    """Quantise the Hugging Face folder ``src`` (bf16, fp16 or fp32 safetensors) into the new folder ``dst``.

    Every ``nn.Linear`` and every MoE expert of the model that transformers builds from ``config.json`` is packed,
    except its output head, MoE routers, and those that ``exclude`` names: a module's full name, the last parts of it,
    or a pattern with ``*``. All other float tensors become bfloat16, except those that models compute with in float32,
    such as the biases that choose experts (`verl_aqn.checkpoints.building.stays_float32`). Experts get names of their
    own also where the source has them fused (`verl_aqn.checkpoints.naming`).

    Tensors are read, quantised and written one by one, and a fused stack expert by expert, so that memory is bounded by
    the largest tensor and not by the model. ``dst`` appears complete or not at all, in shards of at most
    ``max_shard_bytes``. ``format`` is one of ``verl_aqn.checkpoints.formats.FORMATS``. The report lies in it too
    (``quantization.json``), so that what rounding did can be read after the source is gone.

    ``progress(done, total, module)`` is called after each module. ``quantizer(module, weight)`` replaces plain rounding
    with ``scale_rule``: it gets the module's name and its stored weight [N, K], and returns the codes.

    Raises:
        ModelError: ``src`` cannot be read or is already quantised, a layer does not fit MXFP4 or contains NaN or Inf,
            or ``dst`` exists.
        ConfigError: an entry of ``exclude`` matches no module or only some experts of a layer, or the rule or the
            format is unknown.
    """
    src, dst, exclude = Path(src), Path(dst), tuple(exclude)
    check_choices(scale_rule, format)
    config = read_config(src)
    weights = Weights(src)
    if kind := foreign_layout(config, src):
        raise ModelError(f"{src} is already MXFP4 ({kind}): convert it with `verl-aqn quantize {src} DST`")
    if config.get("quantization_config") or any(name.endswith(PACKED) for name in weights.specs):
        raise ModelError(f"{src} is already quantised: start from the bf16 checkpoint that it was made from")
    plan = make_plan(src, weights, exclude)
    packed_name, scale_name = FORMATS[format]

    layout: dict[str, Spec] = {}
    for name, out in plan.kept.items():
        spec = weights.specs[name]
        rounds = spec.dtype.is_floating_point and name not in plan.exact
        layout[out] = spec._replace(dtype=torch.bfloat16) if rounds else spec
    for piece in plan.pieces:
        layout |= packed_specs(piece.module, piece.shape, format)
    # Sorted by name, so that the tensors of a layer are in the same shard.
    layout = dict(sorted(layout.items()))
    modules: list[ModuleReport] = []
    digests: list[tuple[str, str]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, out in plan.kept.items():
            yield out, as_kept(name, weights, layout[out].dtype)
        for done, piece in enumerate(plan.pieces, start=1):
            weight = piece.read(weights)
            packed, scale = quantizer(piece.module, weight) if quantizer else quantize(weight, scale_rule)
            if scale.max() == 255:
                file = weights.file_of(piece.tensor)
                raise ModelError(f"tensor {piece.tensor} of {file} contains NaN or Inf: use another checkpoint")
            yield piece.module + packed_name, packed
            yield piece.module + scale_name, scale
            error = split_error(weight, packed, scale)
            bytes_after = packed.nbytes + scale.nbytes
            digests.append((piece.module, module_digest(packed, scale)))
            modules.append(ModuleReport(piece.module, piece.shape, error, weight.nbytes, bytes_after))
            if progress is not None:
                progress(done, len(plan.pieces), piece.module)

    config, extra = finish(format, config, layout, {piece.module for piece in plan.pieces}, plan.ignored, src)
    with new_folder(dst) as folder:
        write_model(folder, config, layout, tensors(), src, extra, max_shard_bytes)
        before, after = (sum(spec.nbytes for spec in specs.values()) for specs in (weights.specs, layout))
        left = sorted(plan.ignored)
        report = QuantReport(scale_rule, tuple(modules), before, after, combined_digest(digests), tuple(left))
        (folder / FILE).write_text(json.dumps(report.to_dict()) + "\n")
        if format == "compressed-tensors":  # the other format can be read only on an NPU
            check_opens(folder, dst)
            if checkpoint_digest(folder) != report.base_digest:  # other bytes were read than written
                raise ModelError(
                    f"{dst} was not created: its files differ from what was written: check disk and memory"
                )
    return report


def module_digest(packed: Tensor, scale: Tensor) -> str:
    """Return the SHA-256 (hex) of one module's shapes, packed bytes and scale bytes."""
    digest = hashlib.sha256(json.dumps([list(packed.shape), list(scale.shape)]).encode())
    digest.update(tensor_bytes(packed))
    digest.update(tensor_bytes(scale))
    return digest.hexdigest()


def combined_digest(modules: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 (hex) of a packed base: over pairs of module name and `module_digest`, in order of name.

    Names are those of the Hugging Face model, without ``.weight_packed``.
    """
    return hashlib.sha256(json.dumps(sorted(modules)).encode()).hexdigest()


def checkpoint_digest(path: str | Path, slices: Slices | None = None, form: str = "packed") -> str:
    """`combined_digest` of a packed folder, or of what a rank that holds `slices` of its weights [N, K] should hold.

    Modules of which a rank holds `NOTHING` (an expert of another rank) are left out. With ``form="bf16"`` the digest is
    over `values_digest` of the same weights dequantised to bfloat16, in which they are exact. With ``form="int8"`` it
    is over `int8_digest` of the weights in int8, of which some may be rounded.

    Raises:
        ModelError: the folder is not a packed checkpoint or is damaged.
    """
    weights = open_packed(Path(path))

    def digests() -> Iterator[tuple[str, str]]:
        for module in packed_modules(weights):
            part = slices.get(module) if slices else None
            if part != NOTHING:
                yield module, part_digest(weights.read(module + PACKED), weights.read(module + SCALE), part, form)

    return combined_digest(digests())


def part_digest(packed: Tensor, scale: Tensor, part: Slice | None, form: str) -> str:
    """Return the digest of the ``part`` of one packed module [..., N, K], in the ``form`` of `checkpoint_digest`."""
    if form == "int8":
        return int8_part_digest(to_int8(packed, scale)[0], part)
    if form == "bf16":  # the part may start or end within a block
        values = dequantize(packed, scale, torch.bfloat16)
        if values.dim() == 3:  # a stack of experts; bf16 folders store it as [E, K, N]
            values = values.transpose(1, 2).flatten(0, 1)
        return values_digest(cut(values, part).contiguous())
    if part:
        packed, scale = cut(packed, scaled(part, 2)).contiguous(), cut(scale, scaled(part, BLOCK)).contiguous()
    return module_digest(packed, scale)


def packed_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(checkpoint's module name, packed, scale) of every packed matrix in ``model``, gathered one at a time.

    Under FSDP2 all ranks must iterate over it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Mxfp4Linear):
            yield (
                module.name_in_checkpoint or plain_name(name),
                whole(module.weight_packed),
                whole(module.weight_scale),
            )
        elif isinstance(module, Mxfp4Experts):
            yield from module.matrices(plain_name(name), whole)


def plain_name(name: str) -> str:
    """Return a module's name in the Hugging Face model, without the names of wrappers."""
    return unwrapped(name).removeprefix(PEFT_PREFIX).removesuffix(".base_layer")


def whole(parameter: Tensor) -> Tensor:
    """Gather a parameter that FSDP2 may have sharded; all ranks must call this."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def is_packed(path: str | Path) -> bool:
    """Return whether a folder's config.json says that its linear weights are packed MXFP4."""
    config = read_config(Path(path)).get("quantization_config") or {}
    return config.get("format") == PACKED_FORMAT
