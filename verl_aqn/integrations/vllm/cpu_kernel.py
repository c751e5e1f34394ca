"""A kernel for dense MXFP4 layers on vLLM's CPU platform, which has none: W4A16, W4A8 or W4A4.

The weights are dequantised once, when the model is loaded.
"""

from typing import Any

import torch
from torch.nn.parameter import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.platforms import current_platform

from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.linear import Activation, rounded


class CpuMxfp4LinearKernel(MxFp4LinearKernel):
    """Linear layer with weights [N, K] from packed codes [N, K/2] and scales [N, K/32].

    vLLM's compressed-tensors scheme requests dynamic MXFP4 activations for every checkpoint. Like vLLM's Marlin kernel,
    this kernel does not round activations, unless the engine's ``additional_config`` has ``mxfp4_activation``. Then it
    rounds them in that way, as the actor does. MXFP4 and MXFP8 values are exact in bf16, so the products are the same
    as with 4-bit weights.
    """

    def __init__(self, config: MxFp4LinearLayerConfig) -> None:
        super().__init__(config)
        self.activation = Activation.parse(get_current_vllm_config().additional_config.get("mxfp4_activation"))

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Return whether the platform is a CPU, and the reason if it is not."""
        return current_platform.is_cpu(), "only for CPUs"

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Accept every MXFP4 linear layer."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Dequantise the weight, and keep the packed bytes too: a run reads these back as its base."""
        layer.mxfp4_packed = layer.weight.data
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        weight = dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.params_dtype)
        layer.weight = Parameter(weight, requires_grad=False)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer to x [T, K] and return [T, N]."""
        return torch.nn.functional.linear(rounded(x, self.activation), layer.weight, bias)
