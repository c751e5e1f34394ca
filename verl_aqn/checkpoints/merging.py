"""Merging of a base, packed or not, and a LoRA adapter to a bf16 model: W + scaling·B·A in float32, rounded once.

PEFT's own merge cannot be used. It writes to `Mxfp4Linear.weight`, which is a new copy at every read, so that the write
has no effect. Here the base is dequantised first.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.building import build, stays_float32
from verl_aqn.checkpoints.error_report import FILE
from verl_aqn.checkpoints.loading import DenseView, dense_config
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.storage import Spec, Weights, read_config
from verl_aqn.checkpoints.writing import MAX_SHARD_BYTES, write_model
from verl_aqn.errors import EvidenceError, ModelError


@dataclass
class MergeReport:
    """The changes that a merge made to the adapted weights. Δ is scaling·B·A, and D is the difference that was written.

    `changed`: how many of the `tensors` differ from the base. `elements_changed`: the share of their elements that
    differ. `expected_db`: ‖Δ‖/‖W‖, and `actual_db`: ‖D‖/‖W‖, both as 20·log10 over all tensors. `kept`: ⟨D, Δ⟩/‖Δ‖²,
    the share of the adapter that bf16 could hold. `loss`: ‖D − Δ‖/‖Δ‖. bf16 has 8 significant bits, so that an update
    smaller than 2^-9 of a weight is lost in rounding. `modules`: {module: {"elements_changed", "kept"}} for each module
    separately (`kept` is None if Δ is zero).
    """

    tensors: int
    changed: int
    elements_changed: float
    expected_db: float
    actual_db: float
    kept: float
    loss: float
    modules: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def unchanged(self) -> list[str]:
        """The adapted modules whose weights are bit for bit equal to the base."""
        return [module for module, one in self.modules.items() if not one["elements_changed"]]


class Sums:
    """Sums of squares over the adapted weights: in float32 within a tensor, in float64 over tensors."""

    def __init__(self) -> None:
        self.changed = self.elements = self.differing = 0
        self.base = self.expected = self.actual = self.both = self.off = 0.0
        self.modules: dict[str, dict[str, float | None]] = {}

    def add(self, module: str, base: Tensor, delta: Tensor, merged: Tensor) -> None:
        base = base.float()
        actual = merged.float() - base
        differing = int(torch.count_nonzero(actual))
        self.changed += differing > 0
        self.differing += differing
        self.elements += actual.numel()
        self.base += _dot(base, base)
        expected, both = _dot(delta, delta), _dot(actual, delta)
        self.expected += expected
        self.actual += _dot(actual, actual)
        self.both += both
        kept = both / expected if expected else None
        self.modules[module] = {"elements_changed": differing / actual.numel(), "kept": kept}
        off = actual - delta
        self.off += _dot(off, off)

    def report(self, tensors: int) -> MergeReport:
        return MergeReport(
            tensors=tensors,
            changed=self.changed,
            elements_changed=self.differing / self.elements,
            expected_db=_db(self.expected, self.base),
            actual_db=_db(self.actual, self.base),
            kept=self.both / self.expected if self.expected else 0.0,
            loss=math.sqrt(self.off / self.expected) if self.expected else 0.0,
            modules=dict(sorted(self.modules.items())),
        )


def open_base(src: Path, packed: bool) -> DenseView | Weights:
    """Open the tensors of the base as unquantised tensors."""
    return DenseView(src) if packed else Weights(src)


def covered(src: Path, weights: DenseView | Weights, adapter: Adapter) -> dict[str, str]:
    """Return the weight of the base for every module of the adapter: {tensor: module}.

    Raises:
        ModelError: a module has no separate weight [N, K] in ``src`` (as in fused experts), or one of another shape.
    """
    naming = Naming.of_folder(src)
    found = {}
    for module, (a, b) in adapter.matrices.items():
        name = naming.in_checkpoint(module) + ".weight"
        shape = (b.shape[0], a.shape[1])
        spec = weights.specs.get(name)
        if spec is None or spec.shape != shape:
            what = f"is {list(spec.shape)}" if spec else "does not exist (fused experts and tied heads have none)"
            raise ModelError(
                f"the adapter changes {module} {list(shape)}, but {name} of {src} {what}: export without --merge"
            )
        found[name] = module
    return found


def write_merged(
    folder: Path,
    src: Path,
    packed: bool,
    adapter: Adapter,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapted_dtype: torch.dtype = torch.bfloat16,
) -> MergeReport:
    """Fill ``folder`` with the bf16 model of base ``src`` and ``adapter``, with tokenizer and generation config.

    Tensors are processed one at a time, so that memory is bounded by a few times the largest tensor. The weights that
    the adapter changes are in ``adapted_dtype``.

    Raises:
        ModelError: as `covered`.
    """
    weights = open_base(src, packed)
    module_of = covered(src, weights, adapter)
    sums = Sums()

    def read(name: str, spec: Spec) -> Tensor:
        base = weights.read(name)
        if name not in module_of:
            return base.to(spec.dtype)
        delta = adapter.delta(module_of[name])
        merged = (base.float() + delta).to(spec.dtype)
        sums.add(module_of[name], base.to(spec.dtype), delta, merged)
        return merged

    adapted = {name: weights.specs[name]._replace(dtype=adapted_dtype) for name in module_of}
    layout = merged_specs(src, weights) | adapted
    tensors = ((name, read(name, spec)) for name, spec in layout.items())
    write_model(folder, dense_config(src), layout, tensors, src, {}, max_shard_bytes)
    (folder / FILE).unlink(missing_ok=True)  # the quantisation report of the base does not describe this model
    return sums.report(len(module_of))


def check_merged(folder: Path, src: Path, packed: bool, adapter: Adapter) -> int:
    """Read the merged ``folder`` back, compare it with base and adapter bit for bit, and return the number of tensors.

    Every tensor is computed again from ``src`` and ``adapter``, one at a time.

    Raises:
        EvidenceError: a tensor is missing, unexpected or different, or config.json is that of another model.
    """
    weights, written = open_base(src, packed), Weights(folder)
    module_of, layout = covered(src, weights, adapter), merged_specs(src, weights)
    check_specs(written, layout)
    for name, spec in layout.items():
        expected = weights.read(name)
        if name in module_of:
            expected = expected.float() + adapter.delta(module_of[name])
        check_tensor(name, written, expected.to(spec.dtype), module_of.get(name))
    if read_config(folder) != json.loads(json.dumps(dense_config(src))):
        raise EvidenceError("config.json in the merged folder is not that of the base without quantisation")
    return len(layout)


def check_specs(written: Weights, expected: dict[str, Spec]) -> None:
    """Check that a merged folder has exactly the ``expected`` tensors.

    Raises:
        EvidenceError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    if written.specs != expected:
        names = sorted(name for name in written.specs | expected if written.specs.get(name) != expected.get(name))
        raise EvidenceError(
            f"{names[0]} in the merged folder is {written.specs.get(names[0])}, not {expected.get(names[0])}"
        )


def check_tensor(name: str, written: Weights, expected: Tensor, module: str | None = None) -> None:
    """Check that a tensor of a merged folder is ``expected``, which is made of the base and the adapter of ``module``.

    Raises:
        EvidenceError: a bit differs.
    """
    if not torch.equal(_bits(written.read(name)), _bits(expected)):
        what = f"base + scaling·B·A of {module}" if module else "the tensor of the base"
        raise EvidenceError(f"{name} in the merged folder is not, bit for bit, {what}")


def merged_specs(src: Path, weights: DenseView | Weights) -> dict[str, Spec]:
    """Return the tensors of the merged folder: floats become bfloat16 where the model does not need float32."""
    built = build(src)
    naming = Naming(built, Weights(src).specs)

    def rounds(name: str, spec: Spec) -> bool:
        return spec.dtype.is_floating_point and not stays_float32(built.model, naming.in_model(name))

    return {
        name: spec._replace(dtype=torch.bfloat16) if rounds(name, spec) else spec
        for name, spec in sorted(weights.specs.items())
    }


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, so that `torch.equal` also compares NaN and the sign of zero."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.view(-1), b.view(-1)))


def _db(power: float, reference: float) -> float:
    return 10 * math.log10(power / reference) if power and reference else -math.inf
