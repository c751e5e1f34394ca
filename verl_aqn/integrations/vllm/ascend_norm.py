"""RMSNorms with float32 weights on Ascend, which vllm-ascend's own forward does not support.

The rollout keeps norm weights in float32, because bfloat16 would round the noise away, while activations are bfloat16.
vLLM's own forward supports this: it does not use its CUDA kernels if the dtypes differ. vllm-ascend 0.23.0 always calls
an operator (ops/layernorm.py), and these operators need weights in the dtype of the activations: ``npu_rms_norm``
according to torch_npu's documentation, ``AddRmsNormBias`` according to the operator's own table in the wheel. Therefore
this module passes everything in float32 and rounds once at the end, as vLLM's plain PyTorch forward does.

Only eager mode is supported: with graphs, vllm-ascend replaces patterns around its own norms. Not yet tested on
hardware. The statements about the packages are checked in tests/contract/test_ascend_packages.py.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from verl_aqn.errors import ModelError


def compute_in_float32(model: nn.Module, norms: Iterable[str]) -> None:
    """Give the modules `norms` of `model` a forward for weights in float32.

    Raises:
        ModelError: a norm has a bias. ModelSlim's outlier suppression adds one, and this forward does not support it.
    """
    for name in norms:
        norm: Any = model.get_submodule(name)
        if getattr(norm, "bias", None) is not None:
            raise ModelError(f"{name} has a bias, which noise does not support: use a base without outlier suppression")
        norm._forward_method = partial(_forward, norm)  # CustomOp.forward calls this


def _forward(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the norm of x [T, H] plus residual [T, H], in a 16-bit dtype; with a residual, also return the sum."""
    import torch_npu

    weight: Tensor = norm.weight  # type: ignore[assignment]
    weight = weight.float() + 1.0 if isinstance(norm, GemmaRMSNorm) else weight.float()
    total = x.float() if residual is None else x.float() + residual.float()
    out = torch_npu.npu_rms_norm(total, weight, norm.variance_epsilon)[0].to(x.dtype)
    return out if residual is None else (out, total.to(x.dtype))
