"""Reports of the rounding error of each quantised module, for tables, JSON and plots."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from verl_aqn.mxfp4.error_split import ErrorSplit
from verl_aqn.mxfp4.names import pooled_name

# File with `QuantReport.to_dict()` in the folder that `quantize_checkpoint` writes, and in the folders of its runs.
FILE = "quantization.json"

PARTS = ("deadzone", "clipped", "scale_bias", "grid_noise")


@dataclass(frozen=True)
class ModuleReport:
    """The result for one linear layer, or for one matrix of one expert."""

    name: str
    shape: tuple[int, ...]
    error: ErrorSplit
    bytes_before: int
    bytes_after: int

    @property
    def sqnr_db(self) -> float:
        return self.error.sqnr_db

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            **_numbers(self.error),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class QuantReport:
    """The result of `quantize_checkpoint`. ``bytes_*`` count all weights, including those kept in 16 bits.

    ``base_digest`` (`verl_aqn.checkpoints.packing.combined_digest`) tells which packed base these numbers are of.
    """

    scale_rule: str
    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int
    base_digest: str
    left: tuple[str, ...] = ()
    """Linear layers, routers and experts that are kept in 16 bits."""

    @property
    def error(self) -> ErrorSplit:
        """The error of all quantised weights together."""
        return ErrorSplit.pooled(m.error for m in self.modules)

    @property
    def sqnr_db(self) -> float:
        return self.error.sqnr_db

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON; an infinite SQNR (no noise) becomes None. Energies are sums of squares."""
        return {
            "scale_rule": self.scale_rule,
            "base_digest": self.base_digest,
            **_numbers(self.error),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "left_in_16_bits": list(self.left),
            "modules": [m.to_dict() for m in self.modules],
        }


def pool_experts(modules: Iterable[ModuleReport]) -> list[ModuleReport]:
    """Combine the experts of each layer in ``modules``, under names such as ``...experts.*.gate_proj``."""
    groups: dict[str, list[ModuleReport]] = {}
    for module in modules:
        groups.setdefault(pooled_name(module.name), []).append(module)
    return [
        ModuleReport(
            name,
            members[0].shape,
            ErrorSplit.pooled(m.error for m in members),
            sum(m.bytes_before for m in members),
            sum(m.bytes_after for m in members),
        )
        for name, members in groups.items()
    ]


def _numbers(error: ErrorSplit) -> dict[str, Any]:
    return {
        "sqnr_db": error.sqnr_db if math.isfinite(error.sqnr_db) else None,
        "signal": error.signal,
        "noise": error.noise,
        **{part: getattr(error, part) for part in PARTS},
        "deadzone_share": error.deadzone_share,
        "clipped_share": error.clipped_share,
    }
