"""RMSNorms with float32 weights on Ascend, where vllm-ascend's own forward cannot take them.

The rollout keeps norm weights in float32, because bfloat16 would round the noise away, over bfloat16 activations.
vLLM's forward takes that: its kernels for CUDA stand back where the dtypes differ. vllm-ascend 0.23.0 calls an operator
whatever they are (ops/layernorm.py), and these want weights in the activations' dtype: ``npu_rms_norm`` by torch_npu's
documentation, ``AddRmsNormBias`` by the operator's own table in the wheel. So everything is given in float32 here, and
rounded once at the end, which is what vLLM's plain PyTorch computes.

Only eager mode: with graphs vllm-ascend replaces patterns around its own norms. Not run on hardware; what is said of
the packages is checked in tests/contract/test_ascend_packages.py.
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
        ModelError: a norm with a bias, which ModelSlim's outlier suppression adds and this forward leaves out.
    """
    for name in norms:
        norm: Any = model.get_submodule(name)
        if getattr(norm, "bias", None) is not None:
            raise ModelError(f"{name} has a bias, which no noise is made for: use a base without outlier suppression")
        norm._forward_method = partial(_forward, norm)  # what CustomOp.forward calls


def _forward(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """x [T, H] and residual [T, H] of a 16-bit dtype → the norm of their sum, and that sum if there is a residual."""
    import torch_npu

    weight: Tensor = norm.weight  # type: ignore[assignment]
    weight = weight.float() + 1.0 if isinstance(norm, GemmaRMSNorm) else weight.float()
    total = x.float() if residual is None else x.float() + residual.float()
    out = torch_npu.npu_rms_norm(total, weight, norm.variance_epsilon)[0].to(x.dtype)
    return out if residual is None else (out, total.to(x.dtype))
