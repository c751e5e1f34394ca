"""Records of which part of each checkpoint tensor a vLLM model holds, and in which parameter.

`verl_aqn.integrations.vllm.trace.Trace` observes the loading of the model and stores the result as `model.aqn_loaded`.
This module does not import vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.boxes import Dim, merged, split
from verl_aqn.errors import EvidenceError

Slice = Sequence[int]
"""(row, rows, column, columns): the part of a matrix that starts at (row, column).

If a rank holds several blocks of rows, four more numbers follow for each block: for example its parts of gate and up.
"""

Slices = dict[str, list[int]]
"""The `Slice` by name of every matrix that a rank holds only partly; {} if the rank holds all matrices in full."""

SHOWN = 8  # number of parts that a message lists

NOTHING = [0, 0, 0, 0]
"""The `Slice` of a matrix of which a rank holds nothing, for example an expert of another rank."""


class Source(NamedTuple):
    """A tensor that was loaded: its shape, and the name of its dtype without ``torch.``."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        rows, columns = self.matrix
        return rows * columns

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns): all dimensions before the last count as rows; a vector is one column."""
        *lead, columns = self.shape if len(self.shape) > 1 else (*self.shape, 1)
        return math.prod(lead), columns


class Piece(NamedTuple):
    """A strided box (`verl_aqn.checkpoints.boxes`) that maps elements of the parameter `place`.

    (here) to its source (there).
    """

    place: str
    here: int
    there: int
    dims: tuple[Dim, ...]


class Block(NamedTuple):
    """A `Piece` as rows of its source, which may lie apart, and adjacent columns.

    `shape` and `strides` describe these elements in the parameter, rows first.
    """

    piece: Piece
    rows: Tensor  # int64
    column: int
    columns: int
    shape: list[int]
    strides: list[int]


@dataclass
class Loaded:
    """The parts of checkpoint tensors that a model holds.

    `pieces`: pieces by the name in the checkpoint. `lost`: tensors that went through an operation that could not be
    followed, with that operation. `computed`: tensors whose values were changed by a computation during loading, with
    that computation. `verl_aqn.integrations.vllm.readback.remember_base` fills in three more fields. `digests`: digests
    of packed and int8 modules by module name, and of other tensors by tensor name. `parameters`: shape and dtype
    (without ``torch.``) of every parameter at the end of loading. `form`: the form of quantised modules, "packed" or
    "int8", or "bf16" if there are none.
    """

    sources: dict[str, Source]
    pieces: dict[str, list[Piece]]
    lost: dict[str, str]
    computed: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    form: str = "bf16"

    @cached_property
    def sources_in(self) -> dict[str, list[str]]:
        """The names of the source tensors of every parameter."""
        found: dict[str, dict[str, None]] = {}
        for source, pieces in self.pieces.items():
            for piece in pieces:
                found.setdefault(piece.place, {})[source] = None
        return {place: list(sources) for place, sources in found.items()}

    def names(self) -> dict[str, str]:
        """Return the checkpoint name of every parameter that comes from exactly one tensor."""
        return {place: sources[0] for place, sources in self.sources_in.items() if len(sources) == 1}

    def blocks(self, source: str) -> list[Block]:
        """Return the pieces of a source as blocks of its rows and columns.

        Raises:
            EvidenceError: a piece does not consist of whole rows and adjacent columns.
        """
        _, width = self.sources[source].matrix
        found = []
        for piece in self.pieces.get(source, ()):
            cut_at_rows = split(((size, there, here) for size, here, there in piece.dims), [width])
            if cut_at_rows is None:
                raise EvidenceError(f"{piece.place} holds parts of {source} that are not blocks of rows and columns")
            dims = [(size, here, there) for size, there, here in cut_at_rows]
            down = merged(dim for dim in dims if dim[2] >= width)
            across = merged(dim for dim in dims if dim[2] < width)
            if any(there != 1 for _, _, there in across[-1:]) or len(across) > 1:
                raise EvidenceError(f"{piece.place} holds columns of {source} that are not adjacent")
            rows = torch.tensor([piece.there // width])
            for size, _, there in down:
                rows = (rows.unsqueeze(-1) + torch.arange(size) * (there // width)).flatten()
            columns = across[0][0] if across else 1
            shape, strides = [size for size, _, _ in down + across], [here for _, here, _ in down + across]
            found.append(Block(piece, rows, piece.there % width, columns, shape, strides))
        return found

    def region(self, source: str) -> list[int] | None:
        """Return the `Slice` of a source that the model holds; None if the model holds all of it."""
        blocks = self.blocks(source)
        if not blocks:
            return list(NOTHING)
        height, width = self.sources[source].matrix
        columns: dict[tuple[int, int], Tensor] = {}
        for block in blocks:
            rows_here = columns.setdefault((block.column, block.columns), torch.zeros(height, dtype=torch.bool))
            rows_here[block.rows] = True
        (first, end), *others = sorted(columns)
        end += first
        for column, count in others:
            if column != end or not torch.equal(columns[(column, count)], rows_here):
                raise EvidenceError(
                    f"{block.piece.place} holds parts of {source} that are not blocks of rows and columns"
                )
            end += count
        if first == 0 and end == width and bool(rows_here.all()):
            return None
        edges = torch.nn.functional.pad(rows_here.int(), (1, 1)).diff().nonzero().flatten().tolist()
        return [
            number for b, e in zip(edges[::2], edges[1::2], strict=True) for number in (b, e - b, first, end - first)
        ]

    def read(self, source: str, parameter: Callable[[str], Tensor]) -> Tensor:
        """Assemble the part [rows, columns] of a source that this rank holds from the current parameters.

        Raises:
            EvidenceError: the model holds a region twice, and the two copies differ.
        """
        height, width = self.sources[source].matrix
        region = self.region(source) or [0, height, 0, width]
        first, total = region[2], sum(region[1::4])
        place_of = torch.zeros(height, dtype=torch.int64)
        place_of[torch.cat([torch.arange(r, r + n) for r, n in zip(region[::4], region[1::4], strict=True)])] = (
            torch.arange(total)
        )
        out: Tensor | None = None
        filled: dict[int, Tensor] = {}
        blocks = self.blocks(source)
        for block in blocks:
            values = parameter(block.piece.place).contiguous().view(-1)
            values = values.as_strided(block.shape, block.strides, values.storage_offset() + block.piece.here)
            values = values.reshape(len(block.rows), block.columns)
            if len(blocks) == 1 and _is_run(block.rows):
                return values
            if out is None:
                out = torch.empty(total, region[3], dtype=values.dtype, device=values.device)
            rows, column = place_of[block.rows].to(out.device), block.column - first
            target = out[:, column : column + block.columns]
            seen = filled.setdefault(column, torch.zeros(total, dtype=torch.bool, device=out.device))
            twice = seen[rows]
            if twice.any() and not torch.equal(target[rows[twice]], values[twice]):
                raise EvidenceError(f"{source} is held twice, and its copy in {block.piece.place} differs")
            target[rows] = values
            seen[rows] = True
        assert out is not None
        return out


class Part(NamedTuple):
    """The part of weight `name` [N, K] that a layer holds: `shape` elements from `origin` on, in the layer's `rows`.

    `columns` is K. `whole` says whether the layer holds all of the weight.
    """

    name: str
    rows: slice
    origin: tuple[int, int]
    shape: tuple[int, int]
    columns: int
    whole: bool


def parts_of(model: nn.Module, name: str, layer: nn.Module) -> list[Part]:
    """Return the parts of the packed linear `layer`, which `model` calls `name`.

    A layer of a transformers model has exactly one part.

    Raises:
        EvidenceError: rows of the layer are not consecutive rows of the checkpoint.
    """
    loaded: Loaded | None = getattr(model, "aqn_loaded", None)
    if loaded is None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        height, width = weight.shape
        return [Part(name, slice(0, height), (0, 0), (height, width), width, True)]
    parts: list[Part] = []
    codes = next(p for p in (f"{name}.weight_packed", f"{name}.weight") if p in loaded.sources_in)
    for source in loaded.sources_in[codes]:
        columns, whole = loaded.sources[source].matrix[1] * 2, loaded.region(source) is None
        for block in loaded.blocks(source):
            row, rest = divmod(block.piece.here, block.columns)
            if rest or not _is_run(block.rows) or (block.strides and block.strides[-1] != 1):
                raise EvidenceError(f"{name} holds the rows of {source} in another order than the checkpoint")
            rows = slice(row, row + len(block.rows))
            origin, shape = (int(block.rows[0]), block.column * 2), (len(block.rows), block.columns * 2)
            parts.append(Part(module_of(source), rows, origin, shape, columns, whole))
    return _joined(sorted(parts, key=lambda part: part.rows.start))


def _joined(parts: list[Part]) -> list[Part]:
    """Join parts of one weight that are consecutive both in the layer and in the weight."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last
            and last.name == part.name
            and last.rows.stop == part.rows.start
            and (part.origin == (last.origin[0] + last.shape[0], last.origin[1]))
        ):
            shape = (last.shape[0] + part.shape[0], last.shape[1])
            joined[-1] = last._replace(rows=slice(last.rows.start, part.rows.stop), shape=shape)
        else:
            joined.append(part)
    return joined


def module_of(source: str) -> str:
    """Return the module name of a weight's name."""
    for suffix in (".weight_packed", ".weight_scale", ".weight"):
        if source.endswith(suffix):
            return source.removesuffix(suffix)
    return source


def _is_run(rows: Tensor) -> bool:
    return bool((rows.diff() == 1).all())


def blocks_of(part: Slice) -> list[tuple[int, int, int, int]]:
    """Return (row, rows, column, columns) for each block of a `Slice`."""
    return [tuple(part[i : i + 4]) for i in range(0, len(part), 4)]  # type: ignore[misc]


def scaled(part: Slice, columns: int) -> list[int]:
    """Convert a `Slice` to a matrix that stores `columns` columns in one: packed codes or scales."""
    return [n for row, rows, *across in blocks_of(part) for n in (row, rows, *(c // columns for c in across))]


def not_covered(holders: Sequence[Slices], numel: Callable[[str], int]) -> str | None:
    """Return the first matrix that `holders` together do not hold in full, with the parts that they hold."""
    ways, _ = distinct(holders)
    whole: list[Slices] = (
        [{}] if any(not slices for slices in holders) else []
    )  # this holder holds all matrices in full
    return next(_missing([*whole, *ways[1:]], numel), None)


def _missing(holders: Sequence[Slices], numel: Callable[[str], int]) -> Iterator[str]:
    for name in sorted(set().union(*holders)):
        if any(name not in slices for slices in holders):
            continue  # a holder without a slice of the matrix holds all of it
        tiles = sorted({block for slices in holders for block in blocks_of(slices[name])})
        if _area(tiles) != numel(name):
            shown = [list(tile) for tile in tiles[:SHOWN]]
            yield f"{name}: {shown}" + (f" and {len(tiles) - SHOWN} more" if len(tiles) > SHOWN else "")


def _area(tiles: Sequence[tuple[int, int, int, int]]) -> int:
    """Count the elements that `tiles`, sorted by row, cover. The tiles may overlap."""
    begin: dict[int, list[tuple[int, int, int, int]]] = {}
    edges: set[int] = set()
    for tile in tiles:
        _, _, column, columns = tile
        begin.setdefault(column, []).append(tile)
        edges |= {column, column + columns}
    area, active = 0, list[tuple[int, int, int, int]]()
    for left, right in pairwise(sorted(edges)):
        # Only the tiles that cover the columns between these two edges, sorted by row.
        active = sorted([t for t in active if t[2] + t[3] > left] + begin.get(left, []))
        covered = end = 0
        for row, rows, _, _ in active:
            if row + rows > end:
                covered += row + rows - max(row, end)
                end = row + rows
        area += covered * (right - left)
    return area


def cut(matrix: Tensor, part: Slice | None) -> Tensor:
    """Return the part of a matrix that a `Slice` describes, or all of the matrix for None."""
    if part is None:
        return matrix
    found = [matrix[row : row + rows, column : column + columns] for row, rows, column, columns in blocks_of(part)]
    return found[0] if len(found) == 1 else torch.cat(found)


def distinct(of_ranks: Sequence[Slices]) -> tuple[list[Slices], list[int]]:
    """Return the distinct slices, {} (the whole model) first, and the index of each rank's slices among them."""
    ways: list[Slices] = [{}]
    number: dict[str, int] = {_text({}): 0}
    texts = [_text(slices) for slices in of_ranks]
    for slices, text in zip(of_ranks, texts, strict=True):
        if text not in number:
            number[text] = len(ways)
            ways.append(slices)
    return ways, [number[text] for text in texts]


def _text(slices: Slices) -> str:
    return json.dumps({name: list(part) for name, part in sorted(slices.items())})
