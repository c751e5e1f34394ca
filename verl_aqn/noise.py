"""Adaptive quantization noise: N(0, σ²) on the weights of RMSNorm modules, and the evidence that it is there.

Noise is a function, not a state: `draw(seed, step, name, numel)` gives the same numbers in every process, and
weights are always written as clean + noise. What was written is then read back and measured.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from verl_aqn.digest import tensor_digest
from verl_aqn.errors import ConfigError, EvidenceError, ModelError

UNITS = ("absolute", "rms")


@dataclass(frozen=True)
class NoiseOrder:
    """What one rollout's noise is to be.

    `step`: RL step from 0. `sigma`: standard deviation, 0 for none. `unit`: "absolute" adds N(0, σ²) as QeRL does;
    "rms" adds N(0, (σ · s)²) with s the root mean square of the module's clean effective weight, so that σ means the
    same in every layer and model. Raises ConfigError for values that make no sense.
    """

    step: int
    seed: int
    sigma: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"noise.unit is {self.unit!r}: choose one of {', '.join(UNITS)}")
        if not math.isfinite(self.sigma) or self.sigma < 0 or self.step < 0:
            raise ConfigError(f"noise order has step {self.step} and sigma {self.sigma}: both must be 0 or more")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseOrder:
        return cls(**values)


def draw(seed: int, step: int, name: str, numel: int) -> torch.Tensor:
    """N(0, 1) as float32 [numel] on the CPU, a pure function of (seed, step, name) and the element's index.

    Element i does not depend on `numel`: a shorter draw is the beginning of a longer one, so a shard is a slice.
    The key of numpy's counter-based Philox4x64 is blake2b(seed, step, name). numpy may change how it turns Philox's
    words into normal numbers (NEP 19); a test pins a few of them so that such a change does not pass unseen.
    """
    key = hashlib.blake2b(f"{seed}\0{step}\0{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(numel, dtype=np.float32))


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """RMSNorm modules of `model` by name, q_norm and k_norm included, whatever their class is called.

    Found by what they are, because class names differ between HF and vLLM: the only parameter is a 1-D floating
    point `weight`, there is an epsilon, and a small probe shows w·x/rms(x) or (1+w)·x/rms(x). LayerNorms fail the
    probe since they subtract the mean. Norms with a gate are left out: they are parts of linear attention.
    """
    return {name: module for name, module in model.named_modules() if _unit_offset(module) is not None}


def _unit_offset(module: nn.Module) -> float | None:
    """0.0 where the effective weight is w (Llama, Qwen), 1.0 where it is 1+w (Gemma), None if no RMSNorm."""
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or isinstance(module, nn.LayerNorm):
        return None
    weight = parameters["weight"]
    # torch.nn.RMSNorm has an eps of None when it follows the dtype; -1 stands for "no such attribute".
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", -1.0))
    if eps == -1.0 or weight.dim() != 1 or not weight.is_floating_point():
        return None
    # vLLM's forward may pick a kernel of the device; forward_native is what it must agree with.
    forward = getattr(module, "forward_native", module.forward)
    if {"gate", "z"} & inspect.signature(forward).parameters.keys():
        return None
    x = torch.linspace(-1.0, 3.0, weight.numel(), device=weight.device).expand(1, -1)  # mean 1: betrays a LayerNorm
    with torch.no_grad():
        out = forward(x).float()
        plain = x * torch.rsqrt(x.pow(2).mean() + (eps or torch.finfo(x.dtype).eps))
        errors = {offset: (out - plain * (weight.float() + offset)).norm() for offset in (0.0, 1.0)}
        offset = min(errors, key=lambda o: errors[o])
        # 1 %: above the rounding of a 16-bit weight's product, far below what subtracting the mean does.
        return offset if errors[offset] <= 0.01 * out.norm() else None


class NoiseInjector:
    """Writes noise to the RMSNorm weights of `model`, takes it away again, and measures what is there.

    `dtype`: what the norm weights become, in place. bfloat16 cannot hold the later stages: its spacing near 1 is
    2^-8 to 2^-7, so σ = 1e-5 would vanish. vLLM's RMSNorm takes float32 weights with 16-bit activations; HF's Llama
    and Qwen then return float32, which their 16-bit linear layers refuse, so that is a ModelError here.
    None keeps the weights' own dtype.

    Make it after the weights are loaded and before the model is compiled or its graphs captured: promotion replaces
    the weights' storage, while `apply` and `restore` afterwards write into the same storage.

    `exclude`: shell patterns of module names to leave alone. Noise on the norm in front of a router changes the
    routing, so a mixture of experts is refused (ModelError) until something is excluded.

    Raises EvidenceError if no norm is found, ConfigError if a pattern of `exclude` matches none.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = torch.float32, exclude: Sequence[str] = ()
    ) -> None:
        found = find_norms(model)
        if not found:
            raise EvidenceError(
                f"no RMSNorm found in {type(model).__name__}: noise would do nothing; pass the model itself, "
                "with its weights loaded"
            )
        for pattern in exclude:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ConfigError(f"noise exclude {pattern!r} matches no norm; names look like {next(iter(found))!r}")
        if not exclude and any(name.split(".")[-1] == "experts" for name, _ in model.named_modules()):
            raise ModelError(
                f"{type(model).__name__} has experts, and noise on the norm in front of a router changes the routing: "
                "exclude that norm, for example '*.post_attention_layernorm'"
            )
        self._norms = {n: found[n] for n in sorted(found) if not any(fnmatchcase(n, p) for p in exclude)}
        if not self._norms:
            raise EvidenceError("every RMSNorm is excluded: noise would do nothing; exclude fewer")
        offsets = {name: _unit_offset(module) or 0.0 for name, module in self._norms.items()}
        if dtype is not None:
            for name, module in self._norms.items():
                _promote(name, module, dtype)
        # Copies on the CPU: a few hundred kB, safe from the engine's own memory tricks (sleep, graph pools).
        self._clean = self._read()
        self._scales = {
            name: {"absolute": 1.0, "rms": (clean.float() + offsets[name]).square().mean().sqrt().item()}
            for name, clean in self._clean.items()
        }
        self.clean_digest = tensor_digest(self._clean.items())

    @property
    def names(self) -> list[str]:
        """Names of the modules that get noise, sorted."""
        return list(self._norms)

    def apply(self, order: NoiseOrder) -> dict[str, Any]:
        """Writes clean + σ · scale · draw(seed, step, name), whatever was there before; returns evidence."""
        self._write(order)
        return self._evidence(order.sigma, order.unit, order.step)

    def restore(self) -> dict[str, Any]:
        """Writes the clean weights, bit for bit; returns evidence with σ 0 and no step."""
        for name, clean in self._clean.items():
            self._put(name, clean)
        return self._evidence(0.0, "absolute", None)

    def _write(self, order: NoiseOrder) -> None:
        for name, clean in self._clean.items():
            if order.sigma == 0:
                self._put(name, clean)
                continue
            scale = order.sigma * self._scales[name][order.unit]
            self._put(name, clean.float() + scale * draw(order.seed, order.step, name, clean.numel()))

    def _put(self, name: str, values: torch.Tensor) -> None:
        with torch.no_grad():
            _weight(self._norms[name]).copy_(values)

    def _read(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, copied to the CPU."""
        return {name: _weight(module).to("cpu", copy=True) for name, module in self._norms.items()}

    def _evidence(self, sigma: float, unit: str, step: int | None) -> dict[str, Any]:
        weights = self._read()
        squares = rounding = 0.0
        elements = unchanged = 0
        # numpy rather than torch: on vectors this short, torch's threads cost more than the sums.
        for name, weight in weights.items():
            now, clean = weight.float().numpy(), self._clean[name].float().numpy()
            scale = self._scales[name][unit]
            delta = (now - clean).astype(np.float64) / scale
            squares += float(delta @ delta)
            unchanged += int(np.count_nonzero(delta == 0))
            # Rounding to the weights' dtype is uniform within one spacing, hence the 12.
            spacing = np.spacing(np.abs(now)) * (torch.finfo(weight.dtype).eps / np.finfo(np.float32).eps) / scale
            rounding += float(spacing @ spacing) / 12
            elements += now.size
        return {
            "step": step,
            "sigma_asked": sigma,
            "unit": unit,
            "modules": len(weights),
            "elements": elements,
            "sigma_realised": math.sqrt(squares / elements),
            "sigma_interval": list(sigma_interval(sigma, elements)),
            "sigma_rounding": math.sqrt(rounding / elements),
            "unchanged_share": unchanged / elements,
            "clean_digest": tensor_digest(self._clean.items()),
            "weights_digest": tensor_digest(weights.items()),
        }


def sigma_interval(sigma: float, n: int) -> tuple[float, float]:
    """Where the root mean square of n draws of N(0, σ²) lies with 95 % probability.

    σ · sqrt(χ²_n / n) at 2.5 % and 97.5 %, with Wilson and Hilferty's cube for the quantiles (1931): within 0.5 % of
    the exact ones at n = 10, closer above.
    """
    low, high = ((1 - 2 / (9 * n) + z * math.sqrt(2 / (9 * n))) ** 1.5 for z in (-1.959964, 1.959964))
    return sigma * low, sigma * high


def check_evidence(evidence: Mapping[str, Any], order: NoiseOrder | None, clean_digest: str) -> None:
    """Raises EvidenceError unless `evidence` is what `order` asks for (None: clean weights, as `restore` leaves them).

    `clean_digest` is the digest of the clean weights when the run began. σ may be off by the sampling interval, by
    rounding, and by a fifth: neighbouring stages differ by a factor of 1.5 at least, noise added twice by 1.4.
    """
    sigma = order.sigma if order else 0.0
    asked = evidence["sigma_asked"]
    if evidence["modules"] == 0 or evidence["elements"] == 0:
        raise EvidenceError("noise matched 0 modules: the rollout runs without noise; check the model class")
    if evidence["clean_digest"] != clean_digest:
        raise EvidenceError(
            "the clean norm weights are not those the run began with: something rewrote them or read them while noise "
            "was on; restart the run"
        )
    if asked != sigma:
        raise EvidenceError(f"noise of σ {sigma:g} was ordered, but the worker was asked for {asked:g}: stale order?")
    if order and (evidence["step"], evidence["unit"]) != (order.step, order.unit):
        raise EvidenceError(
            f"noise was ordered for step {order.step} in unit {order.unit}, but the worker reports step "
            f"{evidence['step']} in unit {evidence['unit']}: the step does not reach the rollout"
        )
    if sigma == 0:
        if evidence["weights_digest"] != clean_digest or evidence["unchanged_share"] != 1:
            raise EvidenceError(
                f"σ is 0, but {1 - evidence['unchanged_share']:.1%} of the norm weights differ from clean: "
                "noise of an earlier step stayed on; restart the rollout"
            )
        return
    unchanged, rounding = evidence["unchanged_share"], evidence["sigma_rounding"]
    # A draw is lost when it is below half a spacing: with probability spacing · φ(0) / σ = 1.4 · rounding / σ at most.
    lost = min(1.0, 1.4 * rounding / sigma)
    if unchanged > 0.5 and lost > 0.1:
        raise EvidenceError(
            f"{unchanged:.0%} of the norm weights did not change at σ {sigma:g}: their dtype cannot hold this noise; "
            "keep the norms in float32"
        )
    if unchanged > lost + 4 * math.sqrt(lost / evidence["elements"]) + 0.005:
        raise EvidenceError(
            f"{unchanged:.1%} of the norm weights are still clean at σ {sigma:g}: the noise was not written to all of "
            "them; restart the rollout"
        )
    realised, (low, high) = evidence["sigma_realised"], evidence["sigma_interval"]
    if not low / 1.2 - rounding <= realised <= high * 1.2 + rounding:
        raise EvidenceError(
            f"σ {sigma:g} was ordered, {realised:.3g} is in the weights (expected {low:.3g} to {high:.3g}): "
            "noise is missing or has piled up; restart the rollout"
        )


def _weight(module: nn.Module) -> torch.Tensor:
    """The module's weight as it is at this moment: another object may have taken its place since."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    return weight.data


def _promote(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Gives the module's weight `dtype`; ModelError if its output then no longer has the activations' dtype."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    before = weight.dtype
    forward = getattr(module, "forward_native", module.forward)
    with torch.no_grad():
        weight.data = weight.data.to(dtype)
        out = forward(torch.ones(1, weight.numel(), dtype=before, device=weight.device)).dtype
    if out != before:
        weight.data = weight.data.to(before)
        raise ModelError(
            f"{name} ({type(module).__name__}) with {dtype} weights turns {before} activations into {out}: "
            "load the model in float32, or pass dtype=None"
        )
