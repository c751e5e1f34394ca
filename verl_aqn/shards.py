"""Which part of the trainer's weights a layer of vLLM holds: fused layers taken apart, tensor-parallel slices placed.

Nothing here imports vLLM: the layers say it in their own attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

Slice = Sequence[int]
"""(row, rows, column, columns): the part of a matrix from (row, column) on."""

Slices = dict[str, list[int]]
"""By name the `Slice` of every matrix that a rank holds in part; {}: it holds all of all."""


class Part(NamedTuple):
    """Of weight `name` [N, K] a layer holds `shape` elements from `origin` on; they are its own rows `rows`.

    `whole`: nothing is missing. N itself is not known, since vLLM forgets it for the parts of a fused layer.
    """

    name: str
    rows: slice
    origin: tuple[int, int]
    shape: tuple[int, int]
    columns: int
    whole: bool

    @property
    def slice(self) -> list[int]:
        """As a `Slice`."""
        (row, column), (rows, columns) = self.origin, self.shape
        return [row, rows, column, columns]


def parts_of(model: nn.Module, name: str, layer: nn.Module) -> list[Part]:
    """The parts of linear `layer`, which `model` calls `name`, under the trainer's names."""
    widths: list[int] = list(getattr(layer, "logical_widths", None) or layer.output_partition_sizes)  # type: ignore[arg-type]
    local: int = getattr(layer, "input_size_per_partition", None) or layer.weight.shape[1]  # type: ignore
    columns: int = getattr(layer, "input_size", local)
    rank: int = getattr(layer, "tp_rank", 0)
    all_rows = sum(widths) == getattr(layer, "output_size", sum(widths))
    column = rank * local if columns != local else 0
    replicas: int = getattr(layer, "num_kv_head_replicas", 1)
    parts, begin = [], 0
    for number, (part, rows) in enumerate(zip(hf_names(model, name, len(widths)), widths, strict=True)):
        # Ranks beyond the number of k/v heads hold copies of them.
        row = 0 if all_rows else (rank // (replicas if number else 1)) * rows
        whole = all_rows and columns == local
        parts.append(Part(part, slice(begin, begin + rows), (row, column), (rows, local), columns, whole))
        begin += rows
    return parts


def cut(matrix: Tensor, part: Slice | None) -> Tensor:
    """The `Slice` of a matrix, or all of it."""
    if part is None:
        return matrix
    row, rows, column, columns = part
    return matrix[row : row + rows, column : column + columns]


def distinct(held: Sequence[Slices]) -> tuple[list[Slices], list[int]]:
    """Every way in which ranks hold a model, {} (the whole) first; and which of them each of `held` is."""
    ways: list[Slices] = [{}]
    ways += [slices for number, slices in enumerate(held) if slices and slices not in held[:number]]
    return ways, [ways.index(slices) for slices in held]


def hf_names(model: nn.Module, name: str, parts: int) -> list[str]:
    """Trainer's names of the `parts` that vLLM fused into module `name`."""
    parent, _, leaf = name.rpartition(".")
    mapping: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    leaves = mapping.get(leaf, [leaf])
    if len(leaves) != parts:
        raise ValueError(f"{name} has {parts} parts, but the model names {leaves}")
    return [f"{parent}.{leaf}" if parent else leaf for leaf in leaves]
