"""Merging of a packed base and a LoRA adapter to a packed MXFP4 model: W + scaling·B·A, rounded to 4 bits again.

The base is on the grid of MXFP4, and an adapter's update is far smaller than a step of this grid: rounded plainly,
nearly every weight falls back to the base. Here the codes of an adapted layer are changed only where this brings the
layer's outputs nearer to those of the adapted layer, for given texts (`verl_aqn.checkpoints.code_descent`). Everything
else stays, bit for bit: scales, and the codes of modules without an adapter.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.building import build
from verl_aqn.checkpoints.calibrate import Calibration
from verl_aqn.checkpoints.checksums import FILE as CHECKSUMS
from verl_aqn.checkpoints.code_descent import improve
from verl_aqn.checkpoints.error_report import FILE
from verl_aqn.checkpoints.gptq import damped
from verl_aqn.checkpoints.loading import PACKED, SCALE, DenseView, dense_config, open_packed, packed_modules
from verl_aqn.checkpoints.merging import (
    MergeReport,
    Sums,
    check_specs,
    check_tensor,
    covered,
    merged_specs,
    write_merged,
)
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed, quantize_checkpoint
from verl_aqn.checkpoints.packing_plan import EXCLUDE
from verl_aqn.errors import EvidenceError, ModelError
from verl_aqn.mxfp4.codec import Mxfp4Tensor, dequantize
from verl_aqn.mxfp4.experts import is_fused


@dataclass(frozen=True)
class Rounding:
    """What rounding to 4 bits left of the adapter in the outputs of the adapted layers, on the calibration tokens.

    `tokens`: their number. `output_error`: ‖(W' − Q)X‖ / ‖ΔX‖ over all rounded layers, where W' = W + Δ is the adapted
    weight and Q the rounded one. It is 0 if nothing was lost, and 1 for the bare base. `codes_changed`: the share of
    the layers' codes that are not those of the base. `digest`: of all packed modules that were made
    (`verl_aqn.checkpoints.packing.combined_digest`).
    """

    digest: str
    tokens: int
    output_error: float
    codes_changed: float


def check_packable(src: Path, adapter: Adapter) -> None:
    """Check that the base ``src`` with ``adapter`` can be rounded to 4 bits again, before any work.

    Raises:
        ModelError: ``src`` is not packed, has experts, or the adapter changes something without a weight of its own.
    """
    if not is_packed(src):
        raise ModelError(
            f"{src} is not MXFP4, so there are no 4 bits to return to: export with --merge in bf16, and quantise that "
            "folder (`verl-aqn quantize DST DST2 --calibrate TEXTS`)"
        )
    if any(is_fused(module) for module in build(src).model.modules()):
        raise ModelError(f"{src} has experts, which are not calibrated: export with --merge in bf16")
    covered(src, DenseView(src), adapter)


@contextmanager
def merged_copy(folder: Path, src: Path, adapter: Adapter) -> Iterator[Path]:
    """Yield a copy of base ``src`` merged with ``adapter``, in ``folder``, which can be calibrated.

    Adapted weights are float32; the copy is deleted at the end.

    Raises:
        ModelError: as `check_packable`, or the model's decoder cannot be calibrated.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        dense = Path(temporary) / "dense"
        dense.mkdir()
        write_merged(dense, src, True, adapter, adapted_dtype=torch.float32)
        try:  # any tokens show the decoder's form
            Calibration(dense, torch.arange(1, 9)[None]).check(_adapted(src, adapter))
        except ModelError as error:
            fault, _, _ = str(error).rpartition(": ")  # without the advice to those who quantise
            raise ModelError(f"{fault}: export with --merge in bf16") from error
        yield dense


def write_merged_packed(
    folder: Path,
    src: Path,
    adapter: Adapter,
    dense: Path,
    ids: Tensor,
    progress: Callable[[int, int, str], None] | None = None,
) -> Rounding:
    """Fill ``folder`` with the packed model of base ``src`` and ``adapter``, calibrated on ``ids``.

    ``dense``: their `merged_copy`. ``ids``: int64 [S, L], tokens without padding. Adapted modules that the base has in
    16 bits are merged as by `write_merged`.
    """
    base = open_packed(src)
    packed = set(packed_modules(base))
    adapted = _adapted(src, adapter)
    calibration = Calibration(dense, ids)
    sums = _Outputs()

    def quantizer(module: str, weight: Tensor) -> Mxfp4Tensor:
        old = Mxfp4Tensor(base.read(module + PACKED), base.read(module + SCALE))
        if module not in adapted:
            return old
        moment = calibration.second_moment(module)
        codes = improve(weight, old, damped(moment))
        sums.add(weight, old, codes, moment)
        calibration.replace(module, dequantize(*codes))
        return codes

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "packed"
        exclude = (*EXCLUDE, *_not_packed(src, packed))
        report = quantize_checkpoint(dense, made, exclude=exclude, progress=progress, quantizer=quantizer)
        for file in made.iterdir():
            if file.name not in (CHECKSUMS, FILE):  # the report is about rounding of the temporary copy
                file.rename(folder / file.name)
    return sums.rounding(report.base_digest, ids.numel())


def _adapted(src: Path, adapter: Adapter) -> set[str]:
    """Return the names of the packed modules of ``src`` that ``adapter`` changes."""
    changed = {name.removesuffix(".weight") for name in covered(src, DenseView(src), adapter)}
    return changed & set(packed_modules(open_packed(src)))


def check_merged_packed(folder: Path, src: Path, adapter: Adapter, digest: str) -> tuple[MergeReport, int]:
    """Read the packed ``folder`` back, and return what it holds of the adapter and its number of tensors.

    ``digest``: that of the packed modules as they were made (`Rounding`).

    Raises:
        EvidenceError: a tensor is missing or unexpected; the codes are not those that were made; a scale, or a packed
            module without an adapter, is not, bit for bit, the base's; a tensor in 16 bits is not that of the base,
            merged with the adapter if there is one; or config.json is that of another model.
    """
    base, written = open_packed(src), open_packed(folder)
    dense, result = DenseView(src), DenseView(folder)
    module_of = covered(src, dense, adapter)
    check_specs(written, merged_specs(src, base))
    if (found := checkpoint_digest(folder)) != digest:
        raise EvidenceError(
            f"the packed weights in the merged folder have digest {found[:16]}…, but those that were made have "
            f"{digest[:16]}…: check disk and memory"
        )
    if dense_config(folder) != dense_config(src):
        raise EvidenceError("config.json in the merged folder is not that of the base")
    sums = Sums()
    for name in sorted(dense.specs):
        before, adapted = dense.read(name), module_of.get(name)
        delta = adapter.delta(adapted) if adapted else None
        module = name.removesuffix(".weight")
        if module + PACKED in base.specs:
            check_tensor(module + SCALE, written, base.read(module + SCALE))
            if delta is None:
                check_tensor(module + PACKED, written, base.read(module + PACKED))
            after = result.read(name)
        else:
            after = before if delta is None else before.float() + delta
            after = after.to(written.specs[name].dtype)
            check_tensor(name, written, after, adapted)
        if adapted and delta is not None:
            sums.add(adapted, before.to(after.dtype), delta, after)
    return sums.report(len(module_of)), len(written.specs)


class _Outputs:
    """Sums of squared output errors of the rounded layers, in float64."""

    def __init__(self) -> None:
        self.lost = self.update = 0.0
        self.codes = self.changed = 0

    def add(self, weight: Tensor, old: Mxfp4Tensor, new: Mxfp4Tensor, moment: Tensor) -> None:
        """Add a layer with codes ``new`` instead of ``old`` for the adapted ``weight``."""
        self.update += _squared(weight - dequantize(*old).float(), moment)
        self.lost += _squared(weight - dequantize(*new).float(), moment)
        self.codes += 2 * new.packed.numel()
        differing = old.packed ^ new.packed
        self.changed += int(torch.count_nonzero(differing & 15) + torch.count_nonzero(differing >> 4))

    def rounding(self, digest: str, tokens: int) -> Rounding:
        error = math.sqrt(self.lost / self.update) if self.update else 0.0
        return Rounding(digest, tokens, error, self.changed / self.codes if self.codes else 0.0)


def _squared(error: Tensor, moment: Tensor) -> float:
    """Return the squared output error tr(E·H·E^T) for E [N, K] and H [K, K]."""
    return max(0.0, float(((error @ moment) * error).double().sum()))


def _not_packed(src: Path, packed: set[str]) -> list[str]:
    """Return the linear layers of the model that the base ``src`` has in 16 bits."""
    naming = Naming.of_folder(src)
    model = build(src).model
    names = {naming.in_checkpoint(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - packed)
