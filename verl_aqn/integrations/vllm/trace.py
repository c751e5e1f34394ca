"""Trace a model loader: which region of which named tensor ends up in which region of which parameter.

Inside `with Trace()`, torch passes every operation to the trace. The trace follows copies from the named tensors
through views, casts, clones and concatenations to the storages that they are written into. It knows storages by weak
references, so it keeps no weight alive and never mistakes a reused address for an old storage. Nothing in this file
imports vLLM, and nothing depends on how a model's loader is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from verl_aqn.checkpoints.boxes import Box, compose, contiguous_strides
from verl_aqn.checkpoints.slices import Loaded, Piece, Source

aten = torch.ops.aten
_JOINS = {aten.cat.default, aten.stack.default}
_COPIES = {"_to_copy", "clone", "contiguous", "_reshape_copy", "detach", "alias", "lift_fresh", "view", "empty_like"}
_ERASERS = {"fill_", "zero_", "normal_", "uniform_", "random_", "copy_"}  # these overwrite all earlier values


class _Storage:
    """The known content of one storage: boxes that map its regions (here) to regions of named tensors (there)."""

    def __init__(self, storage: torch.UntypedStorage, itemsize: int):
        self.alive = StorageWeakRef(storage)  # keeps the storage's address from being reused, but not its memory
        self.itemsize = itemsize
        self.boxes: dict[tuple, tuple[str, Box]] = {}
        self._ends: dict[tuple, tuple[int, int]] = {}  # first and last element: faster, as experts have hundreds

    def add(self, source: str, box: Box) -> None:
        """Add a box; it replaces an earlier box of the same region."""
        key = (box.here, tuple(sorted(dim[:2] for dim in box.dims)))
        self.boxes[key], self._ends[key] = (source, box), (box.here, box.end)

    def erase(self, region: Box) -> None:
        """Forget the boxes that lie completely within `region`."""
        first, last = region.here, region.end
        within = [key for key, (begin, end) in self._ends.items() if first <= begin and end <= last]
        for key in within:
            box = self.boxes[key][1]
            found = compose(region, box)
            if found and sum(part.numel for part in found) == box.numel:
                del self.boxes[key], self._ends[key]


class Trace(TorchDispatchMode):
    """A trace of one loading: `with Trace() as trace: load(trace.watch(weights))`, then `trace.loaded(parameters)`."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, Source] = {}
        self._storages: dict[int, _Storage] = {}
        self._lost: dict[str, str] = {}  # source -> the operation after which it could not be followed
        self._computed_by: dict[str, dict[str, None]] = {}  # source -> the operations that changed its values

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same weights, and follow each tensor under its name."""
        for name, tensor in weights:
            self.name(name, tensor)
            yield name, tensor

    def name(self, name: str, tensor: Tensor) -> None:
        """Follow `tensor` under `name`; the loader may later reuse its memory for another tensor."""
        self.sources[name] = Source(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        storage, box = self._storage(tensor, create=True), _box(tensor)
        if storage.itemsize != tensor.element_size():
            self._lost[name] = "one buffer for several dtypes"
            return
        storage.erase(box)
        storage.add(name, box)

    def loaded(self, parameters: Iterable[tuple[str, Tensor]]) -> Loaded:
        """Return which parts of the named tensors `parameters`, given by name, hold."""
        pieces: dict[str, list[Piece]] = {}
        for place, parameter in parameters:
            known = self._storage(parameter)
            if known is None or not known.boxes:
                continue
            if known.itemsize != parameter.element_size():
                self._lose(parameter, "a view of another width")
                continue
            for source, box in known.boxes.values():
                found = compose(_box(parameter), box)
                if found is None:
                    self._lost[source] = "strides that do not divide"
                for part in found or []:
                    pieces.setdefault(source, []).append(Piece(place, *part))
        lost = {name: how for name, how in self._lost.items() if name not in pieces}
        return Loaded(self.sources, pieces, lost, {name: ", ".join(how) for name, how in self._computed_by.items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [one for one in _tensors(args) if self._known(one)] if self._storages else []
        if func is aten.copy_.default:
            out = func(*args, **kwargs)
            if self._known(args[1]):
                self._copy(args[0], args[1], "copy_")
            elif known:
                self._erase(args[0])
            return out
        out = func(*args, **kwargs)
        if not known:
            return out
        if func._schema.is_mutable:
            self._mutated(func, args, known)
        elif func in _JOINS:
            self._join(func, args, out)
        else:
            for one in _tensors([out]):
                if not self._known(one):  # a view shares a known storage
                    self._computed(func, one, known)
        return out

    def _computed(self, func: Any, out: Tensor, known: list[Tensor]) -> None:
        """Follow a new tensor if it corresponds element by element to its only input; otherwise its inputs are lost.

        Only positions matter here, and an operation that is not a copy is noted. The digests show later whether the
        values are still those of the source.
        """
        self._note(func, known)
        names = {self._one_of(tensor) for tensor in known}
        if len(names) == 1 and out.shape == known[0].shape:
            self._copy(out, known[0], func.__name__)
        elif out.numel() > 1:
            for tensor in known:
                self._lose(tensor, str(func))

    def _mutated(self, func: Any, args: Any, known: list[Tensor]) -> None:
        target = args[0]
        others = [tensor for tensor in known if tensor is not target]
        name = func._schema.name.removeprefix("aten::")
        if name not in _ERASERS:
            self._note(func, known)
        if others:
            for tensor in others:
                self._lose(tensor, str(func))
            if isinstance(target, Tensor):
                self._erase(target)
        elif name in _ERASERS and isinstance(target, Tensor):
            self._erase(target)

    def _note(self, func: Any, known: list[Tensor]) -> None:
        """Note an operation that may have changed the values of its inputs."""
        name = func._schema.name.removeprefix("aten::")
        if name in _COPIES:
            return
        for tensor in known:
            for source, _ in self._storage(tensor).boxes.values():
                self._computed_by.setdefault(source, {})[name] = None

    def _join(self, func: Any, args: Any, out: Tensor) -> None:
        dim = args[1] if len(args) > 1 else 0
        begin = 0
        for number, tensor in enumerate(args[0]):
            if func is aten.stack.default:
                target = out.select(dim, number)
            elif tensor.dim() != out.dim():
                continue  # cat skips empty 1-D tensors
            else:
                target = out.narrow(dim, begin, tensor.shape[dim])
                begin += tensor.shape[dim]
            if self._known(tensor):
                self._copy(target, tensor, str(func))

    def _copy(self, target: Tensor, tensor: Tensor, how: str) -> None:
        """Record that the values of `tensor` were copied to `target`, element by element."""
        known = self._storage(tensor)
        assert known is not None
        if known.itemsize != tensor.element_size() or tensor.dim() > target.dim():
            return self._lose(tensor, how)
        tensor = tensor.expand(target.shape)
        view = _box(tensor, target)
        storage = self._storage(target, create=True)
        if storage.itemsize != target.element_size():
            return self._lose(tensor, how)
        if storage.boxes:
            self._erase(target)
        for source, box in list(known.boxes.values()):
            found = compose(view, box)
            if found is None:
                self._lost[source] = f"{how} of {tuple(tensor.shape)}"
            for part in found or []:
                storage.add(source, part)
        return None

    def _erase(self, target: Tensor) -> None:
        """Forget the earlier content of the region of `target`."""
        storage = self._storage(target)
        if storage is not None:
            storage.erase(_box(target))

    def _storage(self, tensor: Tensor, create: bool = False) -> Any:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None and create:
            known = self._storages[storage._cdata] = _Storage(storage, tensor.element_size())
        return known

    def _known(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._storage(tensor) is not None

    def _one_of(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _lose(self, tensor: Tensor, how: str) -> None:
        for source, _ in self._storage(tensor).boxes.values():
            self._lost[source] = how


def _box(tensor: Tensor, target: Tensor | None = None) -> Box:
    """Return the box from `tensor`'s storage (here) to its elements in row-major order, or to `target`'s storage."""
    there = contiguous_strides(tensor.shape) if target is None else target.stride()
    dims = tuple(zip(tensor.shape, tensor.stride(), there, strict=True))
    return Box(int(tensor.storage_offset()), 0 if target is None else int(target.storage_offset()), dims)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
