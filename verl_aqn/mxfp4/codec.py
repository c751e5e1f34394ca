"""The MXFP4 codec: quantise, dequantise, and fake-quantise (both in one step).

The format (OCP Microscaling Formats v1.0): 32 consecutive values along K share one scale byte.

* Element E2M1, 4 bits: codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign. No Inf, no NaN. Two codes
  share a byte, the even index in the low nibble.
* Scale E8M0, 8 bits: byte b means 2^(b - 127); 255 is NaN; there is no zero.

With amax = m * 2^e, 1 <= m < 2, a scale rule chooses the scale's exponent:

========  =============================  ==================================================
``floor``  e - 2                         the OCP specification; clips where m > 1.5
``even``   e - 2, plus 1 where m >= 1.75  rounds amax to the grid of E2M1 first; compressed-tensors
``rceil``  e - 2, plus 1 where m > 1.5    never clips; NVIDIA
``mse``    e - 2 or e - 1                 the exponent with the smaller squared error; e - 2 for a tie
========  =============================  ==================================================

Elements saturate at 6. ``rounding`` decides which of the two neighbouring codes an element gets:

* ``nearest``: the nearer code, the even code for a tie (the OCP specification, and every kernel here but Ascend's);
* ``half_away``: the nearer code, the one away from zero for a tie (Ascend's W4A4);
* ``stochastic``: the upper code with a probability equal to the distance from the lower code, in steps. The result is
  unbiased except where it saturates. The random numbers depend only on ``seed`` and on the element's index in the
  tensor: they are the same on every device, in every chunk and on every thread.

``mse`` always compares the errors of ``nearest``, also with another rounding. Special cases:

* -0 and negative values that round to zero keep their sign.
* A block that contains NaN or Inf gets scale byte 255 and codes 0, so that all its 32 values are dequantised to NaN.
  An infinite value never becomes a plausible weight.
* A block of zeros gets scale byte 0 (2^-127) and is dequantised to zeros.
* A block with amax < 2^-124 would need a scale below 2^-127. It gets the smallest scale, 2^-127, and is rounded on that
  grid (values of at most 2^-129 become zero).
* If the rule rounds amax up to 2^128 (``even`` from 1.75 * 2^127, ``rceil`` and ``mse`` likewise), the value is
  dequantised to Inf, because neither float32 nor bfloat16 can hold 2^128.

One of the `kernels` does the work: compiled C++ on a CPU, Triton on a GPU, the operators of torch_npu where they
compute the same result, and plain PyTorch otherwise. All of them give the same bits.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.kernels import native, reference

BLOCK = reference.BLOCK
SCALE_RULES = ("mse", "even", "floor", "rceil")
ROUNDINGS = ("nearest", "half_away", "stochastic")


class Mxfp4Tensor(NamedTuple):
    """A quantised tensor of shape [..., N, K]."""

    packed: Tensor
    """uint8 [..., N, K/2]: two E2M1 codes per byte, the even index in the low nibble."""
    scale: Tensor
    """uint8 [..., N, K/32]: one E8M0 byte for each block along K."""


def quantize(
    x: Tensor,
    scale_rule: str = "even",
    rounding: str = "nearest",
    seed: int = 0,
    out: Mxfp4Tensor | None = None,
) -> Mxfp4Tensor:
    """Quantise ``x`` [..., K] (float32, bfloat16 or float16) in blocks of 32 along its last dimension.

    The docstring of this module explains the scale rules, the roundings and the handling of -0, NaN, Inf, zero and tiny
    blocks. ``seed`` is used only by stochastic rounding. If ``out`` (contiguous) is given, the bytes are written into
    it and no memory is allocated for the result.

    Raises:
        ModelError: K is not a multiple of 32, the dtype is not supported, the rule or the rounding is unknown, or
            ``out`` has another shape or dtype or is not contiguous.
    """
    _check(x, scale_rule, rounding)
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ModelError(
            f"cannot quantise shape {list(x.shape)} to MXFP4: the last dimension must be a multiple of {BLOCK}; "
            "exclude this weight or pad it"
        )
    *lead, k = x.shape
    if torch.compiler.is_compiling() and out is None:
        return Mxfp4Tensor(*torch.ops.verl_aqn.mxfp4_quantize(x.detach(), scale_rule, rounding, seed))
    if out is None:
        out = Mxfp4Tensor(*(torch.empty(*lead, k // n, dtype=torch.uint8, device=x.device) for n in (2, BLOCK)))
    else:
        _check_out(out.packed, torch.uint8, (*lead, k // 2))
        _check_out(out.scale, torch.uint8, (*lead, k // BLOCK))
    blocks = x.detach().reshape(-1, BLOCK).contiguous().resolve_neg()  # reshape may return a strided view
    packed, scale = out.packed.view(-1, BLOCK // 2), out.scale.view(-1)
    _kernel(blocks).quantize(blocks, scale_rule, rounding, seed, packed, scale)
    return out


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """Dequantise ``packed`` uint8 [..., K/2] with ``scale`` uint8 [..., K/32] to ``dtype`` [..., K].

    Every value is exact in bfloat16 and float32, except 2^128, which becomes Inf. float16 rounds values that it cannot
    hold. If ``out`` (contiguous, with the shape and dtype of the result) is given, the values are written into it and
    no memory is allocated for the result.

    Raises:
        ModelError: the inputs are not uint8, their shapes do not match, or ``out`` has another shape or dtype or is not
            contiguous.
    """
    *lead, half = packed.shape
    _check_codes(packed, scale)
    shape = (*lead, 2 * half)
    if torch.compiler.is_compiling() and out is None:
        return torch.ops.verl_aqn.mxfp4_dequantize(packed, scale, dtype)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    else:
        _check_out(out, dtype, shape)
    codes = packed.detach().reshape(-1, BLOCK // 2).contiguous()
    _kernel(codes, dtype).dequantize(codes, scale.detach().reshape(-1).contiguous(), out.view(-1, BLOCK))
    return out


def dequantize_transposed(packed: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Dequantise ``packed`` uint8 [N, K/2] with ``scale`` uint8 [N, K/32] to the bfloat16 ``out`` [K, N]: to W^T.

    Raises:
        ModelError: as `dequantize`.
    """
    n, half = packed.shape
    _check_out(out, torch.bfloat16, (2 * half, n))
    if out.device.type != "cpu" or _kernel(packed) is not native:
        return out.copy_(dequantize(packed, scale, torch.bfloat16).t())
    _check_codes(packed, scale)
    native.dequantize_transposed(packed.detach().contiguous(), scale.detach().contiguous(), out)
    return out


def fake_quantize(
    x: Tensor, scale_rule: str = "even", rounding: str = "nearest", seed: int = 0, out: Tensor | None = None
) -> Tensor:
    """Round ``x`` [..., K] to MXFP4 values in the dtype of ``x``.

    The gradient is passed straight through, also where values saturate. K may be any number: a row whose length is not
    a multiple of 32 is rounded as if it were padded with zeros. ``out`` is as in `quantize`; no gradient flows through
    it.

    Raises:
        ModelError: the dtype is not supported, the rule or the rounding is unknown, or ``out`` has another shape or
            dtype or is not contiguous.
    """
    _check(x, scale_rule, rounding)
    if out is not None:
        _check_out(out, x.dtype, x.shape)
    return _FakeQuantize.apply(x, scale_rule, rounding, seed, out)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling() and out is None:
            return torch.ops.verl_aqn.mxfp4_fake_quantize(x, scale_rule, rounding, seed)
        return _fake_quantize(x, scale_rule, rounding, seed, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None, None


def _fake_quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor | None = None) -> Tensor:
    k = x.shape[-1] if x.dim() else 1
    padding = -k % BLOCK
    padded = torch.nn.functional.pad(x.detach().reshape(-1, k), (0, padding)) if padding else x.detach()
    blocks = padded.reshape(-1, BLOCK).contiguous().resolve_neg()
    values = torch.empty_like(blocks) if out is None or padding else out.view(-1, BLOCK)
    _kernel(blocks).fake_quantize(blocks, scale_rule, rounding, seed, values)
    result = values.view(padded.shape)[..., :k].reshape(x.shape)
    return result if out is None else out.copy_(result) if padding else out


def _kernel(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> ModuleType:
    """Return the module of `kernels` for ``x`` and results of ``dtype``. Subclasses of Tensor have no raw pointers."""
    if type(x) not in (Tensor, torch.nn.Parameter) or dtype not in native.DTYPES:
        return reference
    if x.device.type == "cpu" and native.available():
        return native
    if x.device.type == "cuda" and find_spec("triton"):
        from verl_aqn.mxfp4.kernels import gpu

        return gpu
    if x.device.type == "npu":
        from verl_aqn.mxfp4.kernels import npu

        return npu  # calls the reference itself for what its operators do not support
    return reference


def kernel_name(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the name of the module of `kernels` that works on tensors of ``dtype`` on ``device``."""
    return _kernel(torch.empty(0, device=device, dtype=dtype), dtype).__name__.rpartition(".")[2]


def _check(x: Tensor, scale_rule: str, rounding: str) -> None:
    for name, value, valid in (("scale rule", scale_rule, SCALE_RULES), ("rounding", rounding, ROUNDINGS)):
        if value not in valid:
            raise ModelError(f"unknown {name} {value!r}: use one of {', '.join(valid)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"cannot quantise {x.dtype} to MXFP4: convert it to float32, bfloat16 or float16")


def _check_codes(packed: Tensor, scale: Tensor) -> None:
    *lead, half = packed.shape
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ModelError(f"packed codes and scales must be uint8, not {packed.dtype} and {scale.dtype}")
    if list(scale.shape) != [*lead, half // 16] or half % 16:
        raise ModelError(
            f"packed codes {list(packed.shape)} and scales {list(scale.shape)} do not match: "
            "for a weight [N, K] they must be [N, K/2] and [N, K/32]"
        )


def _check_out(out: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if out.shape != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ModelError(f"out must be contiguous {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}")


# torch.compile cannot trace compiled kernels. In a graph they are custom operators with a declared result.
@torch.library.custom_op("verl_aqn::mxfp4_quantize", mutates_args=())
def _quantize_op(x: Tensor, scale_rule: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    return tuple(quantize(x, scale_rule, rounding, seed))  # type: ignore[return-value]


@_quantize_op.register_fake
def _(x: Tensor, scale_rule: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    *lead, k = x.shape
    return x.new_empty(*lead, k // 2, dtype=torch.uint8), x.new_empty(*lead, k // BLOCK, dtype=torch.uint8)


@torch.library.custom_op("verl_aqn::mxfp4_dequantize", mutates_args=())
def _dequantize_op(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(packed, scale, dtype)


@_dequantize_op.register_fake
def _(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=dtype)


@torch.library.custom_op("verl_aqn::mxfp4_fake_quantize", mutates_args=())
def _fake_quantize_op(x: Tensor, scale_rule: str, rounding: str, seed: int) -> Tensor:
    return _fake_quantize(x, scale_rule, rounding, seed)


@_fake_quantize_op.register_fake
def _(x: Tensor, scale_rule: str, rounding: str, seed: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
