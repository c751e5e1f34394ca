"""Which part of the trainer's weights a layer of vLLM holds: fused layers taken apart, tensor-parallel slices placed.

Nothing here imports vLLM: the layers say it in their own attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Slice = Sequence[int]
"""(row, rows, column, columns): the part of a matrix from (row, column) on."""

Slices = dict[str, list[int]]
"""By name the `Slice` of every matrix that a rank does not hold the whole of; {}: it holds all of all."""

NOTHING = [0, 0, 0, 0]
"""The `Slice` of a matrix that a rank has no part in: another rank's expert."""


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


class ExpertPart(NamedTuple):
    """Of an expert's matrix `name` a layer holds rows `rows` of place `place` in its parameters `stack`.

    `place`: None where another rank holds the expert. `slice`: as a `Slice`. `whole`: nothing is missing.
    """

    name: str
    stack: str
    place: int | None
    rows: slice
    slice: list[int]
    whole: bool


def is_experts(layer: Any) -> bool:
    """Whether `layer` holds routed experts as vLLM 0.28 keeps them: w13 [E, 2I, H] and w2 [E, H, I] of E experts."""
    return hasattr(layer, "ckpt_down_proj_name")


def experts_of(name: str, layer: Any) -> list[ExpertPart]:
    """Every expert's matrices, under the names they have in a checkpoint; `model` calls `layer` of experts `name`."""
    config, prefix = layer.moe_config, name.removesuffix(".routed_experts")
    ranks, rank = config.moe_parallel_config.tp_size, config.moe_parallel_config.tp_rank
    hidden, inner = config.hidden_dim, config.intermediate_size // ranks
    shared_out, shared_in = [rank * inner, inner, 0, hidden], [0, hidden, rank * inner, inner]
    matrices = (
        (layer.ckpt_gate_proj_name, "w13", slice(0, inner), shared_out),
        (layer.ckpt_up_proj_name, "w13", slice(inner, 2 * inner), shared_out),
        (layer.ckpt_down_proj_name, "w2", slice(0, hidden), shared_in),
    )
    places = range(config.num_experts) if layer.expert_map is None else layer.expert_map.tolist()
    return [
        ExpertPart(f"{prefix}.{expert}.{leaf}", stack, place, rows, part, ranks == 1)
        if place >= 0
        else ExpertPart(f"{prefix}.{expert}.{leaf}", stack, None, rows, NOTHING, False)
        for expert, place in enumerate(places)
        for leaf, stack, rows, part in matrices
    ]


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
