"""Schemas of the torch_npu operators that the NPU kernels call, and blocks to call them with."""

import torch
from torch import Tensor

# torch_npu 2.10.0.post4, csrc/aten/npu_native_functions_by_codegen.yaml; test_ascend_packages.py compares.
DYNAMIC = (
    'npu_dynamic_mx_quant(Tensor input, *, int axis=-1, str round_mode="rint", int dst_type=296, int block_size=32, '
    "int? scale_alg=0, float dst_type_max=0.0) -> (Tensor, Tensor)"
)
ANTI = "npu_anti_mx_quant(Tensor x, Tensor mxscale, *, int? axis=-1, int? dst_type=15, int? src_type=292) -> Tensor"


def inputs() -> Tensor:
    """An odd number of bfloat16 blocks, of all magnitudes, with NaN, Inf, zeros and subnormals among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(251, 32, generator=generator) * torch.exp2(torch.linspace(-140, 126, 251)).view(-1, 1)
    x[7, 3], x[8, 4], x[9] = float("nan"), float("-inf"), 0
    x[100] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(4)  # ties
    return x.bfloat16()
