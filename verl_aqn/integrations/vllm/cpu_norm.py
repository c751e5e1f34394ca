"""RMSNorm with a float32 weight on vLLM's CPU platform: one compiled operation instead of six of torch's.

A run's norms have float32 weights, so that they can carry small noise. vLLM's own kernel for CPUs takes weights of the
activations' dtype only. This is registered as a provider of vLLM's operators, which falls back to vLLM's plain code for
what it does not support.
"""

import torch
from torch import Tensor
from vllm.ir import ops

from verl_aqn.mxfp4.kernels import native

PROVIDER = "verl_aqn"


def register() -> None:
    """Add the provider to vLLM's operators, and put it first on the CPU platform."""
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms import current_platform

    if not native.available():
        return
    ops.rms_norm.register_impl(PROVIDER, supports_args=supports)(rms_norm)
    ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=supports_residual)(add_rms_norm)
    type(current_platform).get_default_ir_op_priority = classmethod(
        lambda cls, vllm_config: IrOpPriorityConfig.with_default([PROVIDER, "native"])
    )


def supports(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Return whether the compiled norm computes this: bfloat16 activations, and a float32 weight for each feature."""
    return (
        weight is not None
        and weight.dtype == torch.float32
        and x.dtype == torch.bfloat16
        and variance_size is None
        and weight.numel() == x.shape[-1]
    )


def supports_residual(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """Return `supports`, for a residual like x."""
    return supports(x, weight, epsilon, variance_size) and (x_residual.dtype, x_residual.shape) == (x.dtype, x.shape)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """Return the norm of x [..., H], as vLLM's operator of this name."""
    assert weight is not None
    return native.rms_norm(x.contiguous(), None, weight.contiguous(), epsilon)[0]


def add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return (the norm of x + x_residual, x + x_residual), as vLLM's `fused_add_rms_norm`."""
    assert weight is not None
    y, total = native.rms_norm(x.contiguous(), x_residual.contiguous(), weight.contiguous(), epsilon)
    assert total is not None
    return y, total
