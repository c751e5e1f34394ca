"""What can carry noise: RMSNorm modules, and linear layers whose packed MXFP4 weight is kept dequantised beside it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from verl_aqn.errors import EvidenceError, ModelError
from verl_aqn.mxfp4 import dequantize
from verl_aqn.noise.gaussian import Span
from verl_aqn.shards import Part, parts_of


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


class Target:
    """One parameter that can carry noise, under the trainer's name.

    `spans`: which elements of the whole parameter's noise these are; more than all of them in order where a
    tensor-parallel rank holds a part. `part` says that it does.
    """

    kind = ""

    def __init__(self, name: str, spans: list[Span], part: bool):
        self.name, self.spans, self.part = name, spans, part
        self._rms: float | None = None

    def data(self) -> torch.Tensor:
        """The weight as it is at this moment, in its own storage: another object may have taken its place since."""
        raise NotImplementedError

    def clean(self) -> torch.Tensor:
        """The weight without noise, on the CPU, in the dtype of `data`."""
        raise NotImplementedError

    def effective(self) -> torch.Tensor:
        """What the model multiplies with when it is clean, float32 on the CPU."""
        return self.clean().float()

    def unit(self, unit: str) -> float | torch.Tensor:
        """What σ is counted in: 1, the effective weight's rms, or the effective weight itself."""
        if unit == "absolute":
            return 1.0
        if unit == "multiplicative":
            return self.effective()
        if self.part:
            raise ModelError(
                f"{self.name}: a tensor-parallel rank does not see the rms of the whole weight; "
                "set aqn.noise.unit to absolute or multiplicative"
            )
        if self._rms is None:
            self._rms = self.effective().square().mean().sqrt().item()
        return self._rms

    def write(self, values: torch.Tensor) -> None:
        """Put `values` [numel] into the weight's own storage, rounded to its dtype."""
        with torch.no_grad():
            self.data().copy_(values.view(self.data().shape))


class Norm(Target):
    """An RMSNorm's weight [H]; its clean copy is kept on the CPU, safe from the engine's memory tricks (sleep).

    `dtype`: what the weight becomes, in place; None keeps its own. ModelError where the norm's output then no longer
    has the activations' dtype.
    """

    kind = "norm"

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype | None):
        self._offset = _unit_offset(module) or 0.0
        self._module = module
        if dtype is not None:
            _promote(name, module, dtype)
        self._clean = self._weight().to("cpu", copy=True)
        numel = self._clean.numel()
        # vLLM shards the norm over the whole width of q or k in some models, and says so in these attributes.
        rank, world = getattr(module, "weight_shard_rank", 0), getattr(module, "weight_shard_world", 1)
        super().__init__(name, [Span(name, rank * numel, numel)], world > 1)

    def _weight(self) -> torch.Tensor:
        weight: nn.Parameter = self._module.weight  # type: ignore[assignment]
        return weight.data

    def data(self) -> torch.Tensor:
        return self._weight()

    def clean(self) -> torch.Tensor:
        return self._clean

    def effective(self) -> torch.Tensor:
        return self._clean.float() + self._offset


class NormBeside(Norm):
    """An RMSNorm whose noisy weight is a float32 tensor of its own, which stands in for the parameter in its forward.

    The parameter is never written: FSDP shards it, casts it to bfloat16, which could not hold small noise, and saves
    it. `uses` counts the forwards that had noise since the last `write`; `paused` ones have none. The output keeps the
    activations' dtype.
    """

    paused = False

    def __init__(self, name: str, module: nn.Module):
        super().__init__(name, module, None)
        self._clean = self._clean.float()
        self._noisy: torch.Tensor | None = None
        self._parameter: nn.Parameter | None = None
        self.uses = 0
        module.register_forward_pre_hook(self._swap_in)
        module.register_forward_hook(self._swap_out, always_call=True)

    @property
    def noisy(self) -> bool:
        return self._noisy is not None

    def data(self) -> torch.Tensor:
        return self._clean if self._noisy is None else self._noisy

    def write(self, values: torch.Tensor) -> None:
        self._noisy = None if values is self._clean else values.view(self._clean.shape)
        self.uses = 0

    def _swap_in(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._noisy is None or self.paused:
            return
        self._noisy = self._noisy.to(args[0].device)  # moved once
        self._parameter, module._parameters["weight"] = module._parameters["weight"], self._noisy  # type: ignore
        self.uses += 1

    def _swap_out(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        if self._parameter is None:
            return None
        module._parameters["weight"], self._parameter = self._parameter, None
        return None if out is None else out.to(args[0].dtype)  # there is no output where the forward raised


class PackedLinear(Target):
    """Rows of a layer that holds `weight` [N, K] dequantised beside its codes; cleaned by dequantising them again."""

    kind = "linear"

    def __init__(self, part: Part, layer: nn.Module):
        self._layer, self._rows = layer, part.rows
        (row, column), (rows, local) = part.origin, part.shape
        if local == part.columns:
            spans = [Span(part.name, row * local, rows * local)]
        else:
            spans = [Span(part.name, (row + i) * part.columns + column, local) for i in range(rows)]
        super().__init__(part.name, spans, not part.whole)

    def data(self) -> torch.Tensor:
        weight: nn.Parameter = self._layer.weight  # type: ignore[assignment]
        return weight.data[self._rows]

    def clean(self) -> torch.Tensor:
        packed: torch.Tensor = self._layer.mxfp4_packed  # type: ignore[assignment]
        scale: nn.Parameter = self._layer.weight_scale  # type: ignore[assignment]
        return dequantize(packed[self._rows], scale.data[self._rows], self.data().dtype).cpu()


def find_linears(model: nn.Module) -> Iterator[PackedLinear]:
    """Packed MXFP4 layers of `model`; what the engine fused (q, k, v) is taken apart again.

    Raises:
        ModelError: a kernel keeps weights in an order of its own (Marlin), where noise can be neither written nor
            taken away.
        EvidenceError: there is no packed layer.
    """
    layers = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if hasattr(m, "mxfp4_digests")}
    if not layers:
        raise EvidenceError(
            f"no packed MXFP4 layer found in {type(model).__name__}: noise on linear layers would do nothing; set "
            "aqn.mxfp4.enabled=true, or take `linear` out of aqn.noise.targets"
        )
    for name, layer in layers.items():
        if not hasattr(layer, "mxfp4_packed"):
            kernel = type(getattr(getattr(layer, "scheme", None), "kernel", None)).__name__
            raise ModelError(
                f"{name}: its kernel ({kernel}) keeps weights in an order of its own, so that noise can be neither "
                "written nor taken away; take `linear` out of aqn.noise.targets"
            )
        for part in parts_of(model, name, layer):
            yield PackedLinear(part, layer)


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
