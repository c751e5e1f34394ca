"""Writing of the noise that a specification describes, its removal, and its measurement in the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from verl_aqn.digest import tensor_digest
from verl_aqn.errors import ConfigError, EvidenceError, ModelError
from verl_aqn.noise.checks import sigma_interval
from verl_aqn.noise.norms import canonical_names, survey
from verl_aqn.noise.rng import draw_spans
from verl_aqn.noise.routers import router_norms
from verl_aqn.noise.spec import NoiseSpec, count_layers
from verl_aqn.noise.targets import Norm, NormBeside, PackedLinear, Target, find_linears

Selection = list[tuple[Target, float]]  # targets with their multipliers of σ


class NoiseInjector:
    """An injector that writes noise to the weights of `model`: always clean + noise, independent of earlier noise.

    `dtype`: the dtype that the norm weights are changed to, in place. bfloat16 cannot hold the noise of later stages:
    its spacing near 1 is 2^-8 to 2^-7, so σ = 1e-5 would vanish. vLLM's RMSNorm supports float32 weights with 16-bit
    activations; other norms then compute in float32. None keeps the dtype of the weights. Linear layers always keep
    theirs.

    Create the injector after the weights are loaded and before the model is compiled or its graphs are captured. The
    change of dtype replaces the storage of the weights; later, `apply` and `restore` write into the same storage. Clean
    norms are copied to the CPU (a few hundred kB). Linear layers have no copy; they are dequantised again.

    Norms that feed a router get no noise unless the specification sets `router_norms`.

    `beside`: for a model whose parameters are sharded, cast and saved (an FSDP actor, before it is wrapped). The noisy
    weight of a norm is then a separate float32 tensor, and the parameter is not changed. `dtype` has no effect, linear
    layers get no noise, and `uses` returns the smallest number of forwards in which a norm used its noise.

    The constructor never fails because of the model: norms that cannot carry noise are in `lacking`, with the reason.
    `describe` and `apply` raise an error if the specification needs one of them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = torch.float32, beside: bool = False) -> None:
        self._model = model
        surveyed, names = survey(model), canonical_names(model)
        self.lacking = {names(name): why for name, why in surveyed.lacking.items()}
        self._norms: dict[str, Norm] = {}
        # Find these norms now, because the layers may be compiled or wrapped later.
        self._router: set[str] | ModelError
        try:
            fed = router_norms(model, {name: model.get_submodule(name) for name in surveyed.found})
            self._router = {names(name) for name in fed}
        except ModelError as error:
            self._router = error  # raised only for a specification that excludes these norms
        for own, form in sorted(surveyed.found.items()):
            name, module = names(own), model.get_submodule(own)
            try:
                norm = NormBeside(name, module, form) if beside else Norm(name, module, form, dtype)
            except ModelError as error:
                self.lacking[name] = str(error)
            else:
                self._norms[name] = norm
        self._norms = dict(sorted(self._norms.items()))
        #: Module names of the RMSNorms; an engine's own kernel must be told about their float32 weights.
        self.rms_norms = [own for own, form in surveyed.found.items() if not form.centred and names(own) in self._norms]
        self._layers = count_layers(self._norms)
        self._touched: dict[str, Target] = {}  # linear weights that may not be clean
        self.clean_digest = self._digest({name: norm.clean() for name, norm in self._norms.items()})

    @property
    def names(self) -> list[str]:
        """The sorted names of the norms that were found."""
        return list(self._norms)

    def describe(self, order: NoiseSpec) -> dict[str, Any]:
        """Return the effect of a specification: numbers of modules by kind, multipliers, and norms without noise.

        Raises:
            ConfigError, EvidenceError, ModelError: as `apply`.
        """
        chosen = self._select(order)
        return {
            # Without noise no modules are selected; count all norms.
            "norms": sum(target.kind == "norm" for target, _ in chosen) if order.targets else len(self._norms),
            "names": self.names,
            "linears": sum(target.kind == "linear" for target, _ in chosen),
            "router_norms": [] if order.router_norms else sorted(self._routers()),
            "multipliers": sorted({multiplier for _, multiplier in chosen}),
            "clean_digest": self.clean_digest,
        }

    def apply(self, order: NoiseSpec) -> dict[str, Any]:
        """Write clean + noise to the selected modules and clean weights to all others, and return evidence.

        Raises:
            ConfigError: a pattern of the specification matches no module.
            EvidenceError: no module is left, or there is no linear layer for noise on linear layers.
            ModelError: a selected norm cannot carry noise, or the model does not support this noise; the message says
                what to change.
        """
        chosen = self._select(order)
        self._write(order, chosen)
        return self._evidence(order, chosen)

    def restore(self) -> dict[str, Any]:
        """Write the clean weights, bit for bit, and return evidence with σ 0 and without a step."""
        self._clean_all(())
        evidence = self._evidence(None, [])
        self._touched.clear()
        return evidence

    def uses(self) -> int:
        """Return the smallest number of forwards that a noisy norm had since noise was written; only with `beside`."""
        return min(
            (norm.uses for norm in self._norms.values() if isinstance(norm, NormBeside) and norm.noisy), default=0
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run forwards within the block without noise; only with `beside`."""
        norms = [norm for norm in self._norms.values() if isinstance(norm, NormBeside)]
        for norm in norms:
            norm.paused = True
        try:
            yield
        finally:
            for norm in norms:
                norm.paused = False

    # ---- which modules ----

    @cached_property
    def _linears(self) -> dict[str, PackedLinear]:
        return {target.name: target for target in find_linears(self._model)}

    def _routers(self) -> set[str]:
        if isinstance(self._router, ModelError):
            raise self._router
        return self._router

    def _select(self, order: NoiseSpec) -> Selection:
        candidates: dict[str, Target] = {}
        if "norm" in order.targets:
            self._check_lacking(order)
            candidates |= self._norms
        if "linear" in order.targets:
            candidates |= self._linears
        order.check_patterns([*candidates, *self.lacking])
        left_alone: set[str] = set() if order.router_norms or "norm" not in order.targets else self._routers()
        for pattern in order.include:
            matches = [name for name in candidates if fnmatchcase(name, pattern)]
            if set(matches) <= left_alone:
                raise ConfigError(
                    f"noise.include: {pattern!r} matches only norms that feed a router, such as {matches[0]}: set "
                    "aqn.noise.router_norms=true to add noise to them"
                )
        names = [name for name in candidates if order.selects(name) and name not in left_alone]
        order.layers.check(names, self._layers)
        chosen = [(candidates[n], order.layers.multiplier_of(n, self._layers, order.share)) for n in names]
        chosen = [(target, multiplier) for target, multiplier in chosen if multiplier > 0]
        if not chosen and order.targets:
            raise EvidenceError(
                "every module is excluded or has multiplier 0: noise would have no effect; exclude fewer modules"
            )
        return chosen

    def _check_lacking(self, order: NoiseSpec) -> None:
        """Check that the model has norms, and that the selected norms can carry noise.

        Raises:
            ModelError: a selected norm cannot carry noise.
            EvidenceError: the model has no norm.
        """
        needed = {name: why for name, why in self.lacking.items() if order.selects(name)}
        if needed:
            first, reasons = min(needed), sorted(set(needed.values()))
            others = f" and {len(needed) - 1} more norms" if len(needed) > 1 else ""
            raise ModelError(
                f"{first}{others} of {type(self._model).__name__}: {'; '.join(reasons)[:600]}: exclude them in "
                "aqn.noise.exclude, or set aqn.noise.enabled=false"
            )
        if not self._norms:
            raise EvidenceError(
                f"no norm found in {type(self._model).__name__}: noise would have no effect; remove `norm` from "
                "aqn.noise.targets, or set aqn.noise.enabled=false"
            )

    # ---- writing ----

    def _write(self, order: NoiseSpec, chosen: Selection) -> None:
        if order.sigma == 0:
            self._clean_all(())
            return
        self._clean_all({target.name for target, _ in chosen})
        # All norms in one draw, which is many times faster; linear layers one by one, which needs less memory.
        norms = [pair for pair in chosen if pair[0].kind == "norm"]
        for batch in (norms, *([pair] for pair in chosen if pair[0].kind != "norm")):
            spans = [span for target, _ in batch for span in target.spans]
            z = draw_spans(order.seed, order.step, spans)
            sizes = [sum(span.numel for span in target.spans) for target, _ in batch]
            for (target, multiplier), part in zip(batch, z.split(sizes), strict=True):
                self._put(target, order.sigma * multiplier, order.unit, part)

    def _put(self, target: Target, sigma: float, unit: str, z: torch.Tensor) -> None:
        if target.kind != "norm":
            self._touched[target.name] = target
        clean = target.clean().float()
        target.write(clean + sigma * target.unit(unit) * z.view(clean.shape))

    def _clean_all(self, but: Iterable[str]) -> None:
        kept = set(but)
        for target in (*self._norms.values(), *self._touched.values()):
            if target.name not in kept:
                target.write_clean()

    # ---- measuring ----

    def _evidence(self, order: NoiseSpec | None, chosen: Selection) -> dict[str, Any]:
        """Return the evidence for a specification, or for clean weights (None).

        Every norm is read, and every linear weight that may contain noise.
        """
        sigma, unit = (order.sigma, order.unit) if order else (0.0, "absolute")
        multipliers = {target.name: multiplier for target, multiplier in chosen} if sigma else {}
        everything: dict[str, Target] = {**self._norms, **self._touched}
        groups: dict[tuple[str, float], _Group] = {}
        changed_outside = outside = 0
        norms = {}
        for name, target in everything.items():
            now = target.data().to("cpu", copy=True)
            if target.kind == "norm":
                norms[name] = now
            if name in multipliers:
                key = (target.kind, multipliers[name])
                groups.setdefault(key, _Group(*key)).add(target, now, unit)
            else:
                changed_outside += int(torch.count_nonzero(now != target.clean()))
                outside += now.numel()
        measured = sum(group.elements for group in groups.values())
        elements = measured or outside
        unchanged = sum(group.unchanged for group in groups.values()) if measured else outside - changed_outside
        return {
            "step": order.step if order else None,
            "sigma_target": sigma,
            "unit": unit,
            "order": order.to_dict() if order else None,
            "modules": len(chosen) or len(everything),
            "elements": elements,
            # Over all groups, divided by the multipliers; console and metrics show it beside the requested σ.
            "sigma_measured": math.sqrt(sum(g.squares / g.multiplier**2 for g in groups.values()) / (elements or 1)),
            "sigma_interval": list(sigma_interval(sigma, elements or 1)),
            "sigma_rounding": math.sqrt(sum(g.rounding / g.multiplier**2 for g in groups.values()) / (elements or 1)),
            "unchanged_share": unchanged / elements if elements else 1.0,
            "changed_outside": changed_outside,
            "layers": self._layers,
            "router_norms": [] if isinstance(self._router, ModelError) else sorted(self._router),
            "groups": [group.to_dict() for group in groups.values()],
            "clean_digest": self._digest({name: norm.clean() for name, norm in self._norms.items()}),
            "weights_digest": self._digest(norms),
        }

    def _digest(self, weights: dict[str, torch.Tensor]) -> str:
        """Return the digest of the norms that every rank holds in full, so that ranks can be compared."""
        return tensor_digest((name, weight) for name, weight in weights.items() if not self._norms[name].part)


class _Group:
    """Measurements over modules of one kind with one multiplier, σ in the unit of the specification."""

    def __init__(self, kind: str, multiplier: float):
        self.kind, self.multiplier = kind, multiplier
        self.names: list[str] = []
        self.silent: list[str] = []
        self.squares = self.rounding = 0.0
        self.elements = self.unchanged = 0

    def add(self, target: Target, now: torch.Tensor, unit: str) -> None:
        # numpy and not torch: for such short vectors the threads of torch cost more than the sums.
        weight, size = _flat(now), target.unit(unit)
        delta = (weight - _flat(target.clean())).astype(np.float64)
        # Rounding errors are uniform within one spacing of the weights' dtype; their variance is spacing² / 12.
        spacing = np.spacing(np.abs(weight)) * (torch.finfo(now.dtype).eps / np.finfo(np.float32).eps)
        if isinstance(size, torch.Tensor):
            sizes = np.abs(_flat(size))
            kept = sizes > 0  # a weight of 0 has no multiplicative noise, so it is not measured
            delta, spacing = delta[kept] / sizes[kept], spacing[kept] / sizes[kept]
        else:
            delta, spacing = delta / size, spacing / size
        still = int(np.count_nonzero(delta == 0))
        self.names.append(target.name)
        if still == delta.size:
            self.silent.append(target.name)
        self.squares += float(delta @ delta)
        self.rounding += float(spacing @ spacing) / 12
        self.unchanged += still
        self.elements += delta.size

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "multiplier": self.multiplier,
            "modules": self.names,
            "silent": self.silent,
            "elements": self.elements,
            "sigma_measured": math.sqrt(self.squares / self.elements),
            "sigma_rounding": math.sqrt(self.rounding / self.elements),
            "unchanged_share": self.unchanged / self.elements,
        }


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().reshape(-1).numpy()
