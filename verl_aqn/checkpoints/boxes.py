"""Strided boxes: they record which elements of a tensor's storage were copied from which elements of another tensor.

"Here" is the storage, "there" is the other tensor. A box has an offset on each side and a list of dimensions; a
dimension is (size, stride here, stride there). Element (i, j, …) of the box is at offset + i·stride + j·stride + … on
both sides. Strides count elements. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Dim = tuple[int, int, int]
"""(size, stride here, stride there)."""


class Box(NamedTuple):
    """A box that starts at element `here` of a storage and at element `there` of a tensor in row-major order."""

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
        """One past the last element on the side here."""
        return self.here + 1 + sum((size - 1) * here for size, here, _ in self.dims)


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a row-major tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def split(dims: Iterable[Dim], strides: Iterable[int]) -> list[Dim] | None:
    """Cut every dimension that crosses one of `strides`; return None if a dimension does not divide evenly."""
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
    """Return the parts of `view` that `known` covers.

    `view` maps a storage S (here) to a tensor T (there). `known` maps the same storage S (here) to a source (there).
    Returns boxes that map T (here) to the source (there), or None if the strides cannot be compared.
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
        return None  # two dimensions have the same stride: their elements overlap
    found: list[Box] = []

    def descend(steps: list[int], rest: int, here: int, there: int, dims: list[Dim]) -> None:
        """Try the possible shifts between the two boxes along each stride, the largest stride first."""
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
    """Sort dimensions by their stride there, the largest first, and join those that are contiguous on both sides."""
    joined: list[Dim] = []
    for size, here, there in sorted(dims, key=lambda dim: -dim[2]):
        if joined and (joined[-1][1], joined[-1][2]) == (size * here, size * there):
            joined[-1] = (joined[-1][0] * size, here, there)
        else:
            joined.append((size, here, there))
    return joined
