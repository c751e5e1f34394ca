"""Dequantisation of packed layers for inference: once per model, instead of at every token."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl_aqn.mxfp4.linear import Mxfp4Linear, prepare_input


class DequantizedLinear(nn.Linear):
    """An `Mxfp4Linear` whose dequantised weight [N, K] is a frozen parameter, so that noise can be written to it.

    The layer keeps the codes under the names that the packed layers of vLLM use, where `verl_aqn.noise` reads them.
    """

    weight_scale: nn.Parameter

    def __init__(self, layer: Mxfp4Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight, requires_grad=False)
        self.bias = layer.bias
        self.activation = layer.activation
        self.register_buffer("mxfp4_packed", layer.weight_packed.data)
        self.weight_scale = layer.weight_scale
        self.mxfp4_digests: list[str] = []  # this attribute marks a packed layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(prepare_input(x, self.activation), self.weight, self.bias)


def dequantize_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace each `Mxfp4Linear` of ``model`` by a `DequantizedLinear` in place and return ``model``.

    Experts stay packed.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Mxfp4Linear):
            model.set_submodule(name, DequantizedLinear(module))
    return model
