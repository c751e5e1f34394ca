"""MoE experts whose weights stay packed in MXFP4."""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear, PackedProduct, prepare_input
from verl_aqn.mxfp4.names import ROLES, Expert, parts_in

if TYPE_CHECKING:
    from verl_aqn.checkpoints.naming import Naming

STACKS = ("gate_up_proj", "down_proj")


def is_fused(module: nn.Module) -> bool:
    """Return whether ``module`` holds the fused experts of a MoE layer of transformers 5, in any layout."""
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    are_stacks = [isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks]
    return are_stacks[2] and (are_stacks[0] or are_stacks[1])


def why_not_packable(experts: nn.Module) -> str:
    """Return why a fused experts module cannot be packed, or an empty string if it can.

    `Mxfp4Experts` computes one product for gate and up together, then the gating of the module, then one product for
    down, with or without biases. transformers describes these layouts by flags (``use_experts_implementation``).
    """
    if not hasattr(experts, "has_gate") or not hasattr(experts, "_apply_gate"):
        return "transformers does not describe their computation"
    return "" if experts.has_gate else "they have no gate"


def in_one_stack(experts: nn.Module) -> bool:
    """Return whether experts of this layout stay one tensor in a checkpoint (as in gpt-oss), without separate names."""
    return bool(experts.is_transposed or experts.has_bias or not experts.is_concatenated)


class Mxfp4Experts(nn.Module):
    """The frozen experts of one MoE layer in MXFP4; replaces the fused module of transformers.

    The parameters are uint8 and never trained: ``gate_up_proj_packed`` [E, 2I, H/2] with ``gate_up_proj_scale``
    [E, 2I, H/32], and ``down_proj_packed`` [E, H, I/2] with ``down_proj_scale`` [E, H, I/32]. Rows are output features
    for every layout of the replaced module. The order of the rows is that of the replaced module: first gate, then up,
    or alternating in gpt-oss. The biases ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H] exist if the
    replaced module has them. All tensors are uninitialised until a state dict fills them. One expert is dequantised at
    a time, in forward and again in backward. ``activation`` is as in `Mxfp4Linear`.

    Raises:
        ModelError: ``experts`` has a layout that cannot be packed.
    """

    gate_up_proj_packed: Tensor
    gate_up_proj_scale: Tensor
    gate_up_proj_bias: Tensor | None
    down_proj_packed: Tensor
    down_proj_scale: Tensor
    down_proj_bias: Tensor | None

    def __init__(self, experts: nn.Module, naming: "Naming"):
        super().__init__()
        if fault := why_not_packable(experts):
            raise ModelError(f"{type(experts).__name__} cannot stay packed ({fault}): dequantise the checkpoint")
        self.naming = naming
        self.activation: Activation | None = None
        self.in_one_stack = in_one_stack(experts)
        for name in STACKS:
            e, n, k = getattr(experts, name).shape
            if experts.is_transposed:
                n, k = k, n
            for kind, width in (("packed", k // 2), ("scale", k // BLOCK)):
                codes = torch.empty(e, n, width, dtype=torch.uint8, device="meta")
                self.register_parameter(f"{name}_{kind}", nn.Parameter(codes, requires_grad=False))
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias", None))
        # The function of the module that combines gate and up, with its constants and without its weights.
        without = copy.copy(experts)
        without._parameters = {}
        self._gate: Callable[[Tensor], Tensor] = without._apply_gate  # type: ignore[assignment]

    def matrices(self, name: str, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (module name in the checkpoint, packed, scale) for the matrices of every expert, or for the stacks.

        ``name`` is the name of this module in the model. ``whole`` gathers a sharded parameter.
        """
        stacks = {
            fused: (whole(getattr(self, f"{fused}_packed")), whole(getattr(self, f"{fused}_scale"))) for fused in STACKS
        }
        if self.in_one_stack:
            for fused, (packed, scale) in stacks.items():
                yield self.naming.in_checkpoint(f"{name}.{fused}"), packed, scale
            return
        for index in range(len(self.down_proj_packed)):
            for role, (fused, half) in ROLES.items():
                packed, scale = (stack[index].chunk(parts_in(fused))[half] for stack in stacks[fused])
                yield self.naming.of_expert(Expert(name, index, role)), packed, scale

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the output [T, H] from hidden states [T, H] and the experts [T, k] and weights [T, k] of tokens."""
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == e)
            x = self._gate(self._product("gate_up_proj", e, hidden_states[token]))
            x = self._product("down_proj", e, x)
            out = out.index_add(0, token, (x * top_k_weights[token, rank, None]).to(out.dtype))
        return out

    def _product(self, name: str, e: int, x: Tensor) -> Tensor:
        packed, scale, biases = (getattr(self, f"{name}_{kind}") for kind in ("packed", "scale", "bias"))
        x = prepare_input(x, self.activation)
        bias = None if biases is None else biases[e].to(x.dtype)
        return PackedProduct.apply(x, packed[e], scale[e], bias)


def packed_layers(model: nn.Module) -> list[Mxfp4Linear | Mxfp4Experts]:
    """Return every packed layer in ``model``, in the order of the model, also inside wrappers."""
    return [module for module in model.modules() if isinstance(module, (Mxfp4Linear, Mxfp4Experts))]
