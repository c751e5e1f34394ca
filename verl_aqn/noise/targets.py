"""Targets of noise: norms, and packed MXFP4 linear layers that also keep their weight dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from verl_aqn.checkpoints.slices import Part, parts_of
from verl_aqn.errors import EvidenceError, ModelError, first_line
from verl_aqn.mxfp4 import dequantize
from verl_aqn.noise.norms import Form
from verl_aqn.noise.rng import Span


class Target:
    """One parameter that can carry noise, under the trainer's name.

    `spans`: the elements of this target within the noise of the whole parameter. There can be several spans if a
    tensor-parallel rank holds a part of the parameter. `part`: whether the rank holds only a part.
    """

    kind = ""

    def __init__(self, name: str, spans: list[Span], part: bool):
        self.name, self.spans, self.part = name, spans, part
        self._rms: float | None = None

    def data(self) -> torch.Tensor:
        """Return the current weight in its own storage. Do not keep it: another tensor may replace it later."""
        raise NotImplementedError

    def clean(self) -> torch.Tensor:
        """Return the weight without noise, on the CPU, in the dtype of `data`."""
        raise NotImplementedError

    def effective(self) -> torch.Tensor:
        """Return the factor that the clean model multiplies with, float32 on the CPU."""
        return self.clean().float()

    def unit(self, unit: str) -> float | torch.Tensor:
        """Return the unit of σ: 1, the rms of the effective weight, or the effective weight itself."""
        if unit == "absolute":
            return 1.0
        if unit == "multiplicative":
            return self.effective()
        if self.part:
            raise ModelError(
                f"{self.name}: a tensor-parallel rank cannot compute the rms of the whole weight: "
                "set aqn.noise.unit to absolute or multiplicative"
            )
        if self._rms is None:
            self._rms = self.effective().square().mean().sqrt().item()
        return self._rms

    def write(self, values: torch.Tensor) -> None:
        """Write `values` [numel] into the weight's own storage, rounded to its dtype."""
        with torch.no_grad():
            self.data().copy_(values.view(self.data().shape))

    def write_clean(self) -> None:
        """Take the noise away."""
        self.write(self.clean())


class Norm(Target):
    """The weight [H] of a norm; a clean copy is kept on the CPU, where the engine's sleep mode cannot free it.

    `name`: the trainer's name. `dtype`: the new dtype of the weight, which is changed in place; None keeps the dtype. A
    norm that does not support such a weight with 16-bit activations computes in `dtype` and returns its output in the
    dtype of the activations.

    Raises:
        ModelError: the norm supports neither; it is then unchanged.
    """

    kind = "norm"

    def __init__(self, name: str, module: nn.Module, form: Form, dtype: torch.dtype | None):
        self._offset = form.offset
        self._module = module
        if dtype is not None:
            _promote(name, module, dtype)
        self._clean = self._weight().to("cpu", copy=True)
        numel = self._clean.numel()
        # In some models vLLM shards the norm over the whole width of q or k; these attributes describe the shard.
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
    """A norm whose noisy weight is a separate float32 tensor, which replaces the parameter during the forward.

    The parameter is never written, because FSDP shards it, saves it, and casts it to bfloat16, which cannot hold small
    noise. `uses` counts the forwards with noise since the last `write`. While `paused` is set, forwards have no noise.
    The output keeps the dtype of the activations. A norm with a bias (torch's LayerNorm) needs one dtype for all
    tensors and computes in float32.
    """

    paused = False

    def __init__(self, name: str, module: nn.Module, form: Form):
        super().__init__(name, module, form, None)
        self._clean = self._clean.float()
        self._noisy: torch.Tensor | None = None
        self._parameters: dict[str, Any] = {}
        self._dtype = torch.float32
        # torch's LayerNorm needs its input in the dtype of its weight; other norms need no cast.
        self._casts = isinstance(module, nn.LayerNorm) or getattr(module, "bias", None) is not None
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

    def _swap_in(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._noisy is None or self.paused:
            return None
        self._noisy = self._noisy.to(args[0].device)  # a copy only at the first forward
        self._dtype, self._parameters = args[0].dtype, dict(module._parameters)
        module._parameters["weight"] = self._noisy  # type: ignore[assignment]
        self.uses += 1
        if not self._casts:
            return None
        if (bias := self._parameters.get("bias")) is not None:
            module._parameters["bias"] = bias.float()
        return (args[0].float(), *args[1:])

    def _swap_out(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        if not self._parameters:
            return None
        module._parameters.update(self._parameters)
        self._parameters = {}
        return None if out is None else out.to(self._dtype)  # there is no output if the forward raised an error


class PackedLinear(Target):
    """Rows of a layer that keeps `weight` [N, K] dequantised beside its codes; clean values are dequantised again.

    If the layer multiplies with its codes, its `weight` is dequantised for as long as one of its parts has noise.
    """

    kind = "linear"

    def __init__(self, part: Part, layer: nn.Module):
        self._layer, self._rows = layer, part.rows
        weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self._from_codes = weight.dtype == torch.uint8
        self._dtype: torch.dtype = layer.params_dtype if self._from_codes else weight.dtype  # type: ignore[assignment]
        (row, column), (rows, local) = part.origin, part.shape
        if local == part.columns:
            spans = [Span(part.name, row * local, rows * local)]
        else:
            spans = [Span(part.name, (row + i) * part.columns + column, local) for i in range(rows)]
        super().__init__(part.name, spans, not part.whole)

    def data(self) -> torch.Tensor:
        weight: nn.Parameter = self._layer.weight  # type: ignore[assignment]
        return self.clean() if weight.dtype == torch.uint8 else weight.data[self._rows]

    def clean(self) -> torch.Tensor:
        return self._dequantized(self._rows).cpu()

    def write(self, values: torch.Tensor) -> None:
        weight: nn.Parameter = self._layer.weight  # type: ignore[assignment]
        if weight.dtype == torch.uint8:
            self._layer.weight = nn.Parameter(self._dequantized(), requires_grad=False)
        super().write(values)

    def write_clean(self) -> None:
        weight: nn.Parameter = self._layer.weight  # type: ignore[assignment]
        if weight.dtype == torch.uint8:
            return
        super().write_clean()
        if self._from_codes and torch.equal(self._layer.weight, self._dequantized()):  # type: ignore[arg-type]
            codes: torch.Tensor = self._layer.mxfp4_packed  # type: ignore[assignment]
            self._layer.weight = nn.Parameter(codes, requires_grad=False)

    def _dequantized(self, rows: slice = slice(None)) -> torch.Tensor:
        packed: torch.Tensor = self._layer.mxfp4_packed  # type: ignore[assignment]
        scale: nn.Parameter = self._layer.weight_scale  # type: ignore[assignment]
        return dequantize(packed[rows], scale.data[rows], self._dtype)


def find_linears(model: nn.Module) -> Iterator[PackedLinear]:
    """Yield the packed MXFP4 layers of `model`; layers that the engine fused (q, k, v) are split again.

    Raises:
        ModelError: a kernel stores weights in its own order (Marlin), so that noise can be neither written nor removed.
        EvidenceError: there is no packed layer.
    """
    layers = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if hasattr(m, "mxfp4_digests")}
    if not layers:
        raise EvidenceError(
            f"no packed MXFP4 layer found in {type(model).__name__}: noise on linear layers would have no effect; set "
            "aqn.mxfp4.enabled=true, or remove `linear` from aqn.noise.targets"
        )
    for name, layer in layers.items():
        if not hasattr(layer, "mxfp4_packed"):
            kernel = type(getattr(getattr(layer, "scheme", None), "kernel", None)).__name__
            raise ModelError(
                f"{name}: its kernel ({kernel}) stores weights in its own order, so that noise can be neither "
                "written nor removed: remove `linear` from aqn.noise.targets"
            )
        for part in parts_of(model, name, layer):
            yield PackedLinear(part, layer)


def _promote(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Change the module's weight to `dtype` so that its output keeps the dtype of the activations.

    Raises:
        ModelError: the module does not support this; it is then unchanged.
    """
    before = {key: parameter.data for key, parameter in module.named_parameters()}
    activations, hooks = before["weight"].dtype, []
    x = torch.ones(1, before["weight"].numel(), dtype=activations, device=before["weight"].device)
    forward = getattr(module, "forward_native", module.forward)
    try:
        module.weight.data = before["weight"].to(dtype)
        with suppress(Exception), torch.no_grad():
            if _first(forward(x.clone())).dtype == activations:
                return
        # torch's LayerNorm needs one dtype for all tensors; norms of transformers return the dtype of their weight.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        cast = _Cast(dtype)
        hooks = [module.register_forward_pre_hook(cast.inputs), module.register_forward_hook(cast.outputs)]
        with torch.no_grad():
            out = _first(module(x.clone())).dtype
        if out == activations:
            return
        why = f"turns {activations} activations into {out}"
    except Exception as error:
        why = f"raises {type(error).__name__}: {first_line(error)}"
    for hook in hooks:
        hook.remove()
    for key, parameter in module.named_parameters():
        parameter.data = before[key]
    raise ModelError(f"{name} ({type(module).__name__}) with {dtype} weights {why}: load the model in float32")


class _Cast:
    """Hooks that run a module in `dtype` and return its outputs in the dtype of its first input."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = self.outside = dtype

    def inputs(self, module: nn.Module, args: tuple) -> tuple:
        self.outside = args[0].dtype
        return tuple(_to(value, self.dtype) for value in args)

    def outputs(self, module: nn.Module, args: tuple, out: Any) -> Any:
        if isinstance(out, tuple):
            return tuple(_to(value, self.outside) for value in out)
        return _to(out, self.outside)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
