"""Dense MXFP4 on vLLM's CPU platform, which has no kernel for it: W4A16, dequantised once at load."""

from typing import Any

import torch
from torch.nn.parameter import Parameter
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.platforms import current_platform

from verl_aqn.mxfp4 import dequantize


class CpuMxfp4LinearKernel(MxFp4LinearKernel):
    """Weights [N, K] from packed codes [N, K/2] and scales [N, K/32]; activations stay 16-bit.

    vLLM's compressed-tensors scheme always asks for dynamic MXFP4 activations; like its Marlin kernel this one
    computes weight-only. Every MXFP4 value is exact in bf16, so the result is that of the packed weight.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On CPUs only."""
        return current_platform.is_cpu(), "only for CPUs"

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Any MXFP4 linear layer."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the packed bytes beside the dequantised weight: they are what a run reads back as its base."""
        layer.mxfp4_packed = layer.weight.data
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        weight = dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.params_dtype)
        layer.weight = Parameter(weight, requires_grad=False)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] → [T, N]."""
        return torch.nn.functional.linear(x, layer.weight, bias)
