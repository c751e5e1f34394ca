"""Strided boxes: which elements of one tensor's storage came from which elements of another tensor.

A box is an offset and dimensions; a dimension is (size, stride here, stride there). Element (i, j, …) of the box lies
at offset + i·stride + j·stride + … on both sides. Strides count elements. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Dim = tuple[int, int, int]
"""(size, stride here, stride there)."""


class Box(NamedTuple):
    """Elements at `here` of one storage and at `there` of a tensor's elements in row-major order."""

    here: int
    there: int
    dims: tuple[Dim, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size, _, _ in self.dims:
            total *= size
        return total

    @property
    def end(self) -> int:
        """Behind the last element here."""
        return self.here + 1 + sum((size - 1) * here for size, here, _ in self.dims)


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a row-major tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def split(dims: Iterable[Dim], strides: Iterable[int]) -> list[Dim] | None:
    """Cut every dimension that runs across one of `strides`; None where one does not divide evenly."""
    steps = sorted(set(strides))
    done: list[Dim] = []
    for size, here, there in dims:
        for step in steps:
            if not here < step < here * size:
                continue
            inner, rest = divmod(step, here)
            if rest or size % inner:
                return None
            done.append((inner, here, there))
            size, here, there = size // inner, here * inner, there * inner
        done.append((size, here, there))
    return done


def compose(view: Box, known: Box) -> list[Box] | None:
    """The parts of `view` that `known` covers.

    `view`: storage S (here) against a tensor T (there). `known`: the same storage S (here) against a source (there).
    Returns boxes of T (here) against the source (there), or None where the strides cannot be compared.
    """
    one, two = [d for d in view.dims if d[0] != 1], [d for d in known.dims if d[0] != 1]
    strides = {here for _, here, _ in one + two}
    if 0 in strides:
        return None  # a broadcast
    first, second = split(one, strides), split(two, strides)
    if first is None or second is None:
        return None
    ours, theirs = ({here: (size, there) for size, here, there in dims} for dims in (first, second))
    if len(ours) != len(first) or len(theirs) != len(second):
        return None  # two dimensions with one stride: elements overlap
    found: list[Box] = []

    def descend(steps: list[int], rest: int, here: int, there: int, dims: list[Dim]) -> None:
        """Choose by how much the two boxes are shifted along each stride, the largest first."""
        if not steps:
            if rest == 0:
                found.append(Box(here, there, tuple(dims)))
            return
        step, *smaller = steps
        (size, to), (width, of) = ours.get(step, (1, 0)), theirs.get(step, (1, 0))
        quotient = rest // step
        for shift in (quotient, quotient + 1) if smaller else (quotient,):
            low, high = max(0, -shift), min(size, width - shift)
            if low < high:
                more = [(high - low, to, of)] if high - low > 1 else []
                descend(smaller, rest - shift * step, here + low * to, there + (low + shift) * of, dims + more)

    descend(sorted(strides, reverse=True), view.here - known.here, view.there, known.there, [])
    return found


def merged(dims: Iterable[Dim]) -> list[Dim]:
    """Dimensions in order of their stride there, the largest first, joined where two are one run on both sides."""
    joined: list[Dim] = []
    for size, here, there in sorted(dims, key=lambda dim: -dim[2]):
        if joined and (joined[-1][1], joined[-1][2]) == (size * here, size * there):
            joined[-1] = (joined[-1][0] * size, here, there)
        else:
            joined.append((size, here, there))
    return joined
