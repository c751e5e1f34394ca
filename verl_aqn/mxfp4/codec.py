"""MXFP4: quantise, dequantise, and both at once.

The format (OCP Microscaling Formats v1.0): 32 consecutive values along K share one scale byte.

* Element E2M1, 4 bits: codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign. No Inf, no NaN. Two codes
  share a byte, the even index in the low nibble.
* Scale E8M0, 8 bits: byte b stands for 2^(b - 127); 255 is NaN; there is no zero.

With amax = m * 2^e, 1 <= m < 2, a scale rule chooses the scale's exponent:

========  =============================  ==================================================
``floor``  e - 2                         OCP's text; clips where m > 1.5
``even``   e - 2, plus 1 where m >= 1.75  amax rounded to E2M1's grid first; compressed-tensors
``rceil``  e - 2, plus 1 where m > 1.5    never clips; NVIDIA
``mse``    e - 2 or e - 1                 whichever has the smaller squared error; a tie takes e - 2
========  =============================  ==================================================

Elements are rounded to nearest, and saturate at 6. Between two codes it is ``rounding`` that decides:

* ``nearest``: the nearer one, a tie to the even code (the OCP text, and every kernel here but Ascend's);
* ``half_away``: the nearer one, a tie away from zero (Ascend's W4A4);
* ``stochastic``: up with the probability of how far it is; unbiased but for what saturates. The random numbers are a
  function of ``seed`` and of the element's place in the tensor: the same on every device, in any chunk, on any thread.

``mse`` compares the errors of rounding to nearest, whatever the rounding. At the edges:

* -0 keeps its sign, and so does every negative value that rounds to zero.
* A block that holds NaN or an Inf gets scale byte 255 and codes 0, so that all its 32 values come back as NaN:
  nothing infinite becomes a plausible weight.
* An all-zero block gets scale byte 0 (2^-127) and comes back as zeros.
* A block with amax < 2^-124 would need a scale below 2^-127; it gets 2^-127, the smallest there is, and is rounded
  on that grid (values of at most 2^-129 become zero).
* Where the rule rounds amax up to 2^128 (``even`` from 1.75 * 2^127, ``rceil`` and ``mse`` likewise), the value comes
  back as Inf, since neither float32 nor bfloat16 holds 2^128.

The work is done by one of `kernels`: compiled C++ on a CPU, Triton on a GPU, torch_npu's operators where they compute
the same, and plain PyTorch wherever none of these is to be had. All give the same bits.
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
    """uint8 [..., N, K/2]: two E2M1 codes a byte, the even index in the low nibble."""
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

    The module's docstring gives the rules, the roundings and what becomes of -0, NaN, Inf, zero and tiny blocks.
    ``seed`` matters to stochastic rounding only. ``out``, contiguous, receives the bytes without a new allocation.

    Raises:
        ModelError: K is not a multiple of 32, the dtype is another one, the rule or the rounding is unknown, or ``out``
            does not fit.
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
    blocks = x.detach().reshape(-1, BLOCK).contiguous().resolve_neg()  # reshape may give a strided view
    packed, scale = out.packed.view(-1, BLOCK // 2), out.scale.view(-1)
    _kernel(blocks).quantize(blocks, scale_rule, rounding, seed, packed, scale)
    return out


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The values of ``packed`` uint8 [..., K/2] under ``scale`` uint8 [..., K/32], as ``dtype`` [..., K].

    Every value is exact in bfloat16 and float32 (2^128 aside, which becomes Inf); float16 rounds what it cannot hold.
    ``out``, contiguous and of the result's shape and dtype, receives the values without a new allocation.

    Raises:
        ModelError: the inputs are not uint8, their shapes do not belong together, or ``out`` does not fit.
    """
    *lead, half = packed.shape
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ModelError(f"packed codes and scales must be uint8, not {packed.dtype} and {scale.dtype}")
    if list(scale.shape) != [*lead, half // 16] or half % 16:
        raise ModelError(
            f"packed codes {list(packed.shape)} and scales {list(scale.shape)} do not belong together: "
            "for a weight [N, K] they are [N, K/2] and [N, K/32]"
        )
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


def fake_quantize(
    x: Tensor, scale_rule: str = "even", rounding: str = "nearest", seed: int = 0, out: Tensor | None = None
) -> Tensor:
    """``x`` [..., K] rounded to MXFP4, in its own dtype.

    The gradient passes straight through, also where values saturate. Any K: a row whose length is no multiple of 32 is
    rounded as if zeros followed. ``out`` as in `quantize`; it takes no part in a gradient.

    Raises:
        ModelError: the dtype, the rule or the rounding is unknown, or ``out`` does not fit.
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
    """The module of `kernels` for ``x`` and results of ``dtype``. Raw pointers are for plain tensors only."""
    if type(x) not in (Tensor, torch.nn.Parameter) or dtype not in native.DTYPES:
        return reference
    if x.device.type == "cpu" and native.available():
        return native
    if x.device.type == "cuda" and find_spec("triton"):
        from verl_aqn.mxfp4.kernels import gpu

        return gpu
    if x.device.type == "npu":
        from verl_aqn.mxfp4.kernels import npu

        return npu  # what its operators do not compute, it leaves to the reference by itself
    return reference


def _check(x: Tensor, scale_rule: str, rounding: str) -> None:
    for name, value, valid in (("scale rule", scale_rule, SCALE_RULES), ("rounding", rounding, ROUNDINGS)):
        if value not in valid:
            raise ModelError(f"unknown {name} {value!r}: use one of {', '.join(valid)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"cannot quantise {x.dtype} to MXFP4: convert it to float32, bfloat16 or float16")


def _check_out(out: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if out.shape != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ModelError(f"out must be contiguous {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}")


# torch.compile cannot look into compiled kernels: inside a graph they are operators with a declared result.
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
