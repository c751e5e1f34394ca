"""A packed base as a folder of int8 weights for vllm-ascend's scheme W8A16, and digests of such weights.

The folder's form is that of ModelSlim (`verl_aqn.checkpoints.modelslim`), the values are those of
`verl_aqn.mxfp4.int8_rows`. Not yet tested on an NPU.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from verl_aqn.checkpoints.loading import PACKED, SCALE, dense_config, open_packed, packed_modules
from verl_aqn.checkpoints.modelslim import DESCRIPTION, INT8_SUFFIXES, describe_int8
from verl_aqn.checkpoints.slices import Slice, blocks_of, cut
from verl_aqn.checkpoints.storage import Spec, read_json
from verl_aqn.checkpoints.values import narrowest, values_digest
from verl_aqn.checkpoints.writing import MAX_SHARD_BYTES, new_folder, write_model
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.int8_change import INSTEAD, Change, base_fault, matrix_fault
from verl_aqn.mxfp4.int8_rows import Int8Rows, to_int8
from verl_aqn.mxfp4.names import is_expert

REPORT = "int8.json"
"""File in the folder: the `Change` of every matrix."""


def write_int8(
    src: str | Path,
    dst: str | Path,
    progress: Callable[[int, int, str], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Change]:
    """Write packed folder ``src`` as the int8 folder ``dst``, and return the change of every packed matrix.

    Tensors are converted and written one by one. ``progress(done, total, module)`` is called after each matrix.

    Raises:
        ModelError: ``src`` is not a packed checkpoint or is damaged, has packed experts or a bias in a packed layer,
            changes more than `int8_change` allows, or ``dst`` exists. Then ``dst`` is not created.
    """
    src = Path(src)
    weights = open_packed(src)
    modules = packed_modules(weights)
    check_int8(src)
    layout = {name: spec for name, spec in weights.specs.items() if not name.endswith((PACKED, SCALE))}
    for module in modules:
        n, half = weights.specs[module + PACKED].shape
        shapes = (Spec(torch.int8, (n, 2 * half)), Spec(torch.bfloat16, (n, 1)), Spec(torch.bfloat16, (n, 1)))
        layout |= {module + suffix: spec for suffix, spec in zip(INT8_SUFFIXES, shapes, strict=True)}
    layout = dict(sorted(layout.items()))
    changes: dict[str, Change] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, spec in weights.specs.items():
            if not name.endswith((PACKED, SCALE)):
                yield name, weights.read(name).to(spec.dtype)
        for done, module in enumerate(modules, start=1):
            made, changes[module] = to_int8(weights.read(module + PACKED), weights.read(module + SCALE), module)
            check_changes({module: changes[module]}, src, whole=False)  # as early as possible
            yield from zip((module + suffix for suffix in INT8_SUFFIXES), with_offset(made), strict=True)
            if progress is not None:
                progress(done, len(modules), module)

    with new_folder(Path(dst)) as folder:
        extra = {DESCRIPTION: describe_int8(layout, set(modules))}
        write_model(folder, dense_config(src), layout, tensors(), src, extra, max_shard_bytes)
        check_changes(changes, src)
        report = {module: asdict(change) for module, change in changes.items()}
        (folder / REPORT).write_text(json.dumps(report) + "\n")
    return changes


def read_changes(folder: Path) -> dict[str, Change]:
    """Return the result of `write_int8` for an int8 folder that it made."""
    return {module: Change(**change) for module, change in read_json(folder / REPORT).items()}


def check_changes(changes: Mapping[str, Change], src: Path, whole: bool = True) -> None:
    """Check that each matrix, and with ``whole`` the base as a whole, changes no more than is allowed.

    Raises:
        ModelError: one changes more; the message names the first such matrix.
    """
    faults = (matrix_fault(module, change.error) for module, change in sorted(changes.items()))
    fault = next(filter(None, faults), "")
    if fault := fault or (base_fault(sum(changes.values(), Change()).error) if whole else ""):
        raise ModelError(f"{src}: {fault}")


def check_int8(src: Path) -> None:
    """Check from the names and shapes of a packed folder that vllm-ascend can hold it in int8.

    Raises:
        ModelError: it has packed experts, or packed layers with a bias; the message names the first one.
    """
    weights = open_packed(src)
    for module in packed_modules(weights):
        if len(weights.specs[module + PACKED].shape) != 2 or is_expert(module):
            raise ModelError(
                f"{module} of {src} is an expert, and vllm-ascend has W8A16 for linear layers only: {INSTEAD}"
            )
        if f"{module}.bias" in weights.specs:
            raise ModelError(
                f"{module} of {src} has a bias, which vllm-ascend's W8A16 hands on in bfloat16, but A2 and A3 take it "
                f"in float32 only: {INSTEAD}, or keep all layers with a bias in 16 bits with aqn.mxfp4.exclude"
            )


def with_offset(rows: Int8Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and the offset of zeros in the order of `INT8_SUFFIXES`."""
    return rows.codes, rows.scale, torch.zeros_like(rows.scale)


def int8_digest(codes: Tensor, scale: Tensor, offset: Tensor) -> str:
    """Return the digest of what ``codes`` int8 [N, K], ``scale`` [N, 1] and ``offset`` [N, 1] stand for.

    It is over the values codes · scale in the narrowest dtype that holds them, and over the offsets. The offset is not
    added to the codes first, because a small one would be lost in rounding.

    Raises:
        ModelError: the shapes or the dtype of the codes do not fit.
    """
    column = (len(codes), 1)
    if codes.dtype != torch.int8 or codes.dim() != 2 or (tuple(scale.shape), tuple(offset.shape)) != (column, column):
        shapes = f"{codes.dtype} {list(codes.shape)}, {list(scale.shape)} and {list(offset.shape)}"
        raise ModelError(f"{shapes} are no int8 weights with a scale and an offset for each row")
    codes, scale, offset = (tensor.detach().cpu() for tensor in (codes, scale, offset))
    values = narrowest(codes.float() * scale.float())
    digest = hashlib.sha256(values_digest(values).encode())
    digest.update(values_digest(narrowest(offset.float())).encode())
    return digest.hexdigest()


def int8_part_digest(rows: Int8Rows, part: Slice | None) -> str:
    """Return `int8_digest` of the ``part`` of a matrix that a rank holds; a scale belongs to a whole row."""
    codes, scale, offset = with_offset(rows)
    if part is None:
        return int8_digest(codes, scale, offset)
    column = [number for row, count, _, _ in blocks_of(part) for number in (row, count, 0, 1)]
    return int8_digest(cut(codes, part), cut(scale, column), cut(offset, column))
