"""A linear layer that keeps its weight packed in MXFP4 and trains whatever stands around it (LoRA, norms)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK, dequantize, fake_quantize, quantize


class Activation(NamedTuple):
    """How a layer rounds what it multiplies its weight with (W4A4); terms of `quantize`."""

    scale_rule: str = "even"
    rounding: str = "nearest"

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """From ``SCALE_RULE/ROUNDING``, as one process tells another; None and ``none`` mean W4A16."""
        return cls(*text.split("/")) if text not in (None, "none") else None

    def __str__(self) -> str:
        return f"{self.scale_rule}/{self.rounding}"


class Mxfp4Linear(nn.Linear):
    """``y = x W^T + b`` with a frozen W [N, K] in MXFP4. PEFT wraps it like any other ``nn.Linear``.

    Parameters: ``weight_packed`` uint8 [N, K/2] and ``weight_scale`` uint8 [N, K/32], never trained, and ``bias`` [N]
    of a float dtype or None. They are uninitialised until `from_linear` or a state dict fills them. ``weight`` is no
    parameter but a fresh dequantised copy at every read: writing into it (PEFT's ``merge``) changes nothing.

    The multiplication runs in the dtype of ``x``, or in autocast's, as ``F.linear`` would; W is exact in bfloat16 and
    float32. Backward keeps the packed bytes only and dequantises again: 16-bit weights live for one layer at a time.

    ``name_in_checkpoint`` is the module's name in the folder that it comes from, if that is known.

    ``activation`` rounds x to MXFP4 first, as an engine with 4-bit activations does; its gradient passes straight
    through. None (the default) multiplies with x as it is. With ``keep_dense`` the layer holds W in ``compute_dtype``
    beside the bytes from its first forward on: four times the memory again (and on every rank all of it), and no
    dequantisation in forward and backward. The copy is no parameter and in no state dict.

    FSDP2 shards the packed parameters; a torch before 2.13 needs `verl_aqn.mxfp4.sharding.allow_packed_shards` for it.

    Raises:
        ModelError: ``in_features`` is not a multiple of 32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
    ):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate and register a dense weight
        if in_features % BLOCK:
            raise ModelError(
                f"MXFP4 needs in_features to be a multiple of {BLOCK}, not {in_features}: keep this layer dense"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.activation: Activation | None = None
        self.keep_dense = False
        self.name_in_checkpoint: str | None = None
        self._dense: Tensor | None = None
        self.weight_packed = _frozen(torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(torch.empty(out_features, in_features // BLOCK, dtype=torch.uint8, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=compute_dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantise ``linear`` by ``mse``; its bias is shared, its weight is not kept. Raises what `quantize` raises."""
        weight = linear.weight
        packed, scale = quantize(weight, "mse")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", compute_dtype=weight.dtype)
        layer.weight_packed, layer.weight_scale = _frozen(packed), _frozen(scale)
        layer.bias = linear.bias
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W as ``compute_dtype`` [N, K], dequantised anew."""
        return dequantize(self.weight_packed, self.weight_scale, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = prepare_input(x, self.activation)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.keep_dense:
            return F.linear(x, self._kept_weight().to(x.dtype), bias)
        return PackedProduct.apply(x, self.weight_packed, self.weight_scale, bias)

    def keeps_its_codes(self, whole: Callable[[Tensor], Tensor]) -> bool:
        """Return whether the dequantised copy has the codes' values, where there is one; ``whole`` gathers a shard."""
        if self._dense is None:
            return True
        codes, scale = whole(self.weight_packed), whole(self.weight_scale)
        return torch.equal(self._dense, dequantize(codes, scale, self._dense.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dense = None  # made anew where the parameters go
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def _kept_weight(self) -> Tensor:
        if self._dense is not None:
            return self._dense
        weight = self.weight
        if not torch.is_inference_mode_enabled():  # a tensor made there could not serve training
            self._dense = weight
        return weight


def prepare_input(x: Tensor, activation: Activation | None) -> Tensor:
    """``x`` as a packed layer multiplies it: in autocast's dtype where that is on, and rounded if it is W4A4."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x if activation is None else fake_quantize(x, *activation)


class PackedProduct(torch.autograd.Function):
    """x W^T + b that keeps the codes of W for backward, and not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return F.linear(x, dequantize(packed, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed, scale = ctx.saved_tensors
            grad_x = grad @ dequantize(packed, scale, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)
