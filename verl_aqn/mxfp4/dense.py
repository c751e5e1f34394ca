"""Packed layers of a model that only answers: dequantised once, not at every token."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_aqn.mxfp4.linear import Mxfp4Linear, prepare_input


class DequantizedLinear(nn.Linear):
    """An `Mxfp4Linear` with its weight [N, K] as a frozen parameter, so that noise can be written on it.

    The codes stay at hand under the names that vLLM's layers have them by, where `verl_aqn.noise` looks for them.
    """

    weight_scale: nn.Parameter

    def __init__(self, layer: Mxfp4Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight, requires_grad=False)
        self.bias = layer.bias
        self.activation = layer.activation
        self.register_buffer("mxfp4_packed", layer.weight_packed.data)
        self.weight_scale = layer.weight_scale
        self.mxfp4_digests: list[str] = []  # what a packed layer is known by

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(prepare_input(x, self.activation), self.weight, self.bias)


def dequantize_linears(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` itself, with a `DequantizedLinear` in place of each `Mxfp4Linear`; experts stay packed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Mxfp4Linear):
            model.set_submodule(name, DequantizedLinear(module))
    return model
