"""A linear layer whose frozen weight stays packed in MXFP4; modules around it (LoRA, norms) can be trained."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import mxfp8
from verl_aqn.mxfp4.codec import (
    BLOCK,
    ROUNDINGS,
    SCALE_RULES,
    dequantize,
    dequantize_transposed,
    fake_quantize,
    quantize,
)

_MEMORY = threading.local()  # one weight for each dtype
# A larger weight is multiplied in slices that stay in a CPU's cache. The sizes are of bytes.
_LARGE, _SLICE = 1 << 25, 1 << 22


class Activation(NamedTuple):
    """The rounding of a layer's input.

    With the format ``mxfp4`` (W4A4) it has the scale rules and roundings of `quantize`. ``mxfp8`` (W4A8) has one
    arithmetic, that of `verl_aqn.mxfp4.mxfp8`.
    """

    scale_rule: str = "even"
    rounding: str = "nearest"
    format: str = "mxfp4"

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """Parse the form that is sent between processes and recorded.

        It is ``SCALE_RULE/ROUNDING`` for MXFP4 and `mxfp8.ARITHMETIC` for MXFP8; None and ``none`` mean W4A16.

        Raises:
            ModelError: the text is none of these.
        """
        if text in (None, "none"):
            return None
        if text == mxfp8.ARITHMETIC:
            return cls("floor", "nearest", "mxfp8")
        rule, _, rounding = str(text).partition("/")
        if rule not in SCALE_RULES or rounding not in ROUNDINGS:
            raise ModelError(
                f"unknown rounding of activations {text!r}: use none, {mxfp8.ARITHMETIC}, or RULE/ROUNDING with a rule "
                f"of {', '.join(SCALE_RULES)} and a rounding of {', '.join(ROUNDINGS)}"
            )
        return cls(rule, rounding)

    def __str__(self) -> str:
        return "/".join((self.format, *self[:2]) if self.format == "mxfp8" else self[:2])


class Mxfp4Linear(nn.Linear):
    """A linear layer ``y = x W^T + b`` with a frozen W [N, K] in MXFP4. PEFT wraps it like any other ``nn.Linear``.

    Parameters: ``weight_packed`` uint8 [N, K/2] and ``weight_scale`` uint8 [N, K/32], which are never trained, and
    ``bias`` [N] of a float dtype or None. They are uninitialised until `from_linear` or a state dict fills them.
    ``weight`` is not a parameter: every read returns a new dequantised copy, so that writing to it (PEFT's ``merge``)
    has no effect.

    The multiplication uses the dtype of ``x``, or the autocast dtype, as ``F.linear`` does. W is exact in bfloat16 and
    float32. Autograd saves only the packed bytes, and backward dequantises them again: a 16-bit weight exists for one
    layer at a time.

    ``name_in_checkpoint`` is the module's name in the folder that it was loaded from, if known.

    ``activation`` rounds x first, as an engine with MXFP4 or MXFP8 activations does; the gradient is passed straight
    through. With None (the default) x is not rounded. With ``cache_dequantized`` the layer keeps W in ``compute_dtype``
    beside the bytes from its first forward on. This needs four times the memory of the bytes in addition, for the whole
    weight on every rank, and saves the dequantisation in forward and backward. The copy is neither a parameter nor part
    of a state dict.

    FSDP2 shards the packed parameters; torch before 2.13 needs `verl_aqn.mxfp4.sharding.allow_packed_shards` for this.

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
        self.cache_dequantized = False
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
        """Quantise ``linear`` with scale rule ``mse``. The bias is shared, the weight is not kept.

        Raises:
            ModelError: as `quantize`.
        """
        weight = linear.weight
        packed, scale = quantize(weight, "mse")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", compute_dtype=weight.dtype)
        layer.weight_packed, layer.weight_scale = _frozen(packed), _frozen(scale)
        layer.bias = linear.bias
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W as a new ``compute_dtype`` tensor [N, K], dequantised at every read."""
        return dequantize(self.weight_packed, self.weight_scale, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = prepare_input(x, self.activation)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.cache_dequantized:
            return F.linear(x, self._kept_weight().to(x.dtype), bias)
        return PackedProduct.apply(x, self.weight_packed, self.weight_scale, bias)

    def keeps_its_codes(self, whole: Callable[[Tensor], Tensor]) -> bool:
        """Return whether the dequantised copy, if there is one, has the values of the codes.

        ``whole`` gathers a sharded parameter.
        """
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
        if not torch.is_inference_mode_enabled():  # a tensor made in inference mode could not be used in training
            self._dense = weight
        return weight


def prepare_input(x: Tensor, activation: Activation | None) -> Tensor:
    """Return ``x`` as a packed layer multiplies it: cast to the autocast dtype if that is on, and rounded."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return rounded(x, activation)


def rounded(x: Tensor, activation: Activation | None) -> Tensor:
    """Return ``x`` rounded as ``activation`` says; with None (W4A16) ``x`` itself."""
    if activation is None:
        return x
    if activation.format == "mxfp8":
        return mxfp8.fake_quantize(x)
    return fake_quantize(x, activation.scale_rule, activation.rounding)


class PackedProduct(torch.autograd.Function):
    """The product x W^T + b; it saves the codes of W for backward, and not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, scale)
        n, k = len(packed), 2 * packed.shape[1]
        rows = n
        if _on_cpu(packed) and n * k * x.itemsize > _LARGE:
            rows = max(1, _SLICE // (k * x.itemsize))
        if rows >= n:
            return F.linear(x, _short_lived(packed, scale, x.dtype), bias)
        y = x.new_empty(*x.shape[:-1], n)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            weight = _short_lived(packed[part], scale[part], x.dtype)
            y[..., part] = F.linear(x, weight, None if bias is None else bias[part])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed, scale = ctx.saved_tensors
            if _on_cpu(packed) and grad.dtype == torch.bfloat16:
                # A bfloat16 product on CPUs is faster with W^T in the layout of a linear layer's weight, by more than
                # what the transposed dequantisation costs.
                weight = _kept_memory(packed, grad.dtype).view(-1, len(packed))
                grad_x = F.linear(grad, dequantize_transposed(packed, scale, out=weight))
            else:
                grad_x = grad @ _short_lived(packed, scale, grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias


def _short_lived(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W [N, K] in memory that the next call on this thread overwrites, on CPUs.

    glibc returns blocks above 32 MB to the system at once: the pages of every new weight would be mapped again. The
    allocators of accelerators keep their memory.
    """
    if not _on_cpu(packed):
        return dequantize(packed, scale, dtype)
    return dequantize(packed, scale, dtype, out=_kept_memory(packed, dtype).view(len(packed), -1))


def _on_cpu(packed: Tensor) -> bool:
    return packed.device.type == "cpu" and not torch.compiler.is_compiling()


def _kept_memory(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the memory of `_short_lived` for as many elements as ``packed`` has codes."""
    kept: dict[Any, Tensor] = vars(_MEMORY)
    if dtype not in kept or kept[dtype].numel() < 2 * packed.numel():
        with torch.inference_mode(False):  # a tensor of inference mode could not be written in training
            kept[dtype] = torch.empty(2 * packed.numel(), dtype=dtype)
    return kept[dtype][: 2 * packed.numel()]


def _frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)
