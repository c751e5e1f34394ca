"""A kernel for dense MXFP4 layers on vLLM's CPU platform, which has none: W4A16, W4A8 or W4A4.

On CPUs with AVX512-BF16 it multiplies with the packed bytes. On others the weights are dequantised once, when the model
is loaded.
"""

from typing import Any

import torch
from torch.nn.parameter import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.platforms import current_platform

from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.kernels import native
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
        """Keep the packed bytes, which a run reads back as its base; dequantise them if they cannot be multiplied.

        Noise on linear layers needs a dequantised weight, too: `verl_aqn.noise.targets` then replaces `layer.weight`.
        """
        layer.mxfp4_packed = layer.weight.data
        layer.weight_scale = Parameter(layer.weight_scale.data, requires_grad=False)
        if layer.params_dtype != torch.bfloat16 or not native.can_multiply():
            weight = dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.params_dtype)
            layer.weight = Parameter(weight, requires_grad=False)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer to x [..., K] and return [..., N]."""
        x = rounded(x, self.activation)
        if multiplies_packed(layer):
            return self.multiply(layer, x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)
        return torch.nn.functional.linear(x, layer.weight, bias)

    @staticmethod
    def multiply(
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply a layer of `multiplies_packed` and an adapter A [r, K], B [N, r] to x [T, K] in one operation."""
        return native.multiply(layer.weight.data, layer.weight_scale.data, x.contiguous(), bias, a, b)


def multiplies_packed(layer: Any) -> bool:
    """Return whether the layer's products are computed from the packed bytes."""
    return bool(layer.weight.dtype == torch.uint8)
