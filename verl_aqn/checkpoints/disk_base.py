"""The base on disk: the group of every tensor, and digests of the parts that processes hold.

A packed module counts as one tensor with the module's name. Every other tensor has its own name.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.checkpoints.int8_base import int8_part_digest
from verl_aqn.checkpoints.loading import PACKED, SCALE, packed_modules
from verl_aqn.checkpoints.packing import is_packed, part_digest
from verl_aqn.checkpoints.packing_plan import ROUTERS
from verl_aqn.checkpoints.slices import cut
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.checkpoints.values import as_matrix, plain_digest
from verl_aqn.mxfp4.int8_change import Change
from verl_aqn.mxfp4.int8_rows import to_int8

_NORM = re.compile(r"norm|(^|_)ln(_|$)|^ln\d*$|layernorm", re.IGNORECASE)
_EMBEDDING = re.compile(r"^(embed_tokens|embeddings?|wte|wpe|embed_in|word_embeddings|tok_embeddings|.*_embeddings?)$")
_HEAD = re.compile(r"^(lm_head|embed_out|output_layer)$")
_REPORT_S = 30


class Part(NamedTuple):
    """The part of a tensor that a process holds.

    `form`: for a packed module "packed", "bf16" or "int8"; for another tensor the dtype, without ``torch.``, in which
    it was loaded. `slice`: a `Slice` of the matrix [rows, columns], or None for all of it.
    """

    form: str
    slice: tuple[int, ...] | None = None


def group_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the group of a checkpoint tensor that is not part of a packed module, from its name and shape."""
    module, _, leaf = name.rpartition(".")
    own = module.rpartition(".")[2]
    if len(shape) <= 1 and leaf in ("weight", "bias") and _NORM.search(own):
        return "norms"
    if leaf == "weight" and _EMBEDDING.fullmatch(own):
        return "embeddings"
    if _HEAD.fullmatch(own):
        return "head"
    if own == "gate" or any(fnmatchcase(module, pattern) for pattern in ROUTERS):
        return "routers"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "biases"
    return "matrices" if len(shape) in (2, 3) and "conv" not in own else "other"


class DiskBase:
    """The tensors of the Hugging Face folder ``path``, packed or not; values are read one tensor at a time.

    `quantised`: whether the folder is packed. `groups`: the group of every tensor. `dtypes`: the dtype of every tensor
    that is not a packed module. `elements`: the number of values of every tensor. `changes`: how much int8 changes each
    packed module whose digest in int8 was computed.

    Raises:
        ModelError: the weights of the folder are damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.weights = Weights(self.path)
        self.quantised = is_packed(self.path)
        specs = self.weights.specs
        self.groups: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.elements: dict[str, int] = {}
        for module in packed_modules(self.weights) if self.quantised else []:
            self.groups[module] = "packed"
            self.elements[module] = 2 * math.prod(specs[module + PACKED].shape)
        for name, spec in specs.items():
            if name.removesuffix(PACKED).removesuffix(SCALE) not in self.elements:
                self.groups[name] = group_of(name, spec.shape)
                self.dtypes[name] = str(spec.dtype).removeprefix("torch.")
                self.elements[name] = math.prod(spec.shape)
        self.changes: dict[str, Change] = {}
        self._known: dict[tuple[str, Part], str] = {}
        self._state = self._files()

    def digests(
        self, wanted: Mapping[str, Iterable[Part]], progress: Callable[[float], None] = lambda done: None
    ) -> tuple[dict[tuple[str, Part], str], int]:
        """Return the digest of each wanted part by (tensor, part), and the number of tensors that were read.

        Every tensor is read once for all of its parts. Digests from earlier calls are reused as long as the size, time
        and inode of every file are unchanged. ``progress`` is called with the finished share every half minute.
        """
        state = self._files()
        if state != self._state:
            self._known, self.changes, self._state = {}, {}, state
        same = {(name, part): self._as_read(name, part) for name, parts in wanted.items() for part in parts}
        missing: dict[str, list[Part]] = {}
        for name, part in dict.fromkeys((name, part) for (name, _), part in same.items()):
            if (name, part) not in self._known:
                missing.setdefault(name, []).append(part)
        last = time.monotonic()
        for done, name in enumerate(missing):
            if time.monotonic() - last > _REPORT_S:
                last = time.monotonic()
                progress(done / len(missing))
            read = self._reader(name)
            for part in missing[name]:
                self._known[(name, part)] = read(part)
        return {(name, part): self._known[(name, kept)] for (name, part), kept in same.items()}, len(missing)

    def _as_read(self, name: str, part: Part) -> Part:
        """Return an equivalent part that needs the least work: without a conversion if no value would be rounded."""
        disk = self.dtypes.get(name)
        return part if disk is None or rounds(disk, part.form) else part._replace(form=disk)

    def _reader(self, name: str) -> Callable[[Part], str]:
        """Read the values of ``name`` and return a function that computes the digest of a part."""
        if self.groups[name] == "packed":
            packed, scale = self.weights.read(name + PACKED), self.weights.read(name + SCALE)
            return partial(self._packed_digest, name, packed, scale)
        values = self.weights.read(name)
        return lambda part: plain_digest(_as_loaded(values, part))

    def _packed_digest(self, name: str, packed: Tensor, scale: Tensor, part: Part) -> str:
        if part.form != "int8":
            return part_digest(packed, scale, part.slice, part.form)
        rows, self.changes[name] = to_int8(packed, scale, name)
        return int8_part_digest(rows, part.slice)

    def _files(self) -> list[tuple[str, int, int, int]]:
        stats = [(file.name, file.stat()) for file in self.weights.files]
        return [(name, now.st_size, now.st_mtime_ns, now.st_ino) for name, now in stats]

    @property
    def size(self) -> tuple[int, int]:
        """(number of files, number of bytes) of the weights."""
        return len(self._state), sum(size for _, size, _, _ in self._state)


def _as_loaded(values: Tensor, part: Part) -> Tensor:
    """Return the part as a loader copies it into a parameter of that dtype."""
    matrix = cut(as_matrix(values), part.slice)
    return matrix.to(getattr(torch, part.form)) if values.is_floating_point() else matrix


def rounds(disk: str, loaded: str) -> bool:
    """Return whether a tensor of dtype ``disk`` may be rounded in dtype ``loaded`` (both without ``torch.``)."""
    if disk == loaded:
        return False
    one, other = getattr(torch, disk), getattr(torch, loaded)
    if not (one.is_floating_point and other.is_floating_point):
        return True
    fits = torch.finfo(one).eps >= torch.finfo(other).eps and torch.finfo(one).max <= torch.finfo(other).max
    return not fits
