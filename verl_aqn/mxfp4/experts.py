"""MoE experts whose weights stay packed in MXFP4."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear, PackedProduct, prepare_input
from verl_aqn.mxfp4.names import ROLES, Expert, Naming, parts_in


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds the experts of a MoE layer as transformers 5 fuses them, in whatever layout."""
    stacks = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(stack, nn.Parameter) and stack.dim() == 3 for stack in stacks)


def why_not_packable(experts: nn.Module) -> str:
    """What keeps a fused experts module from being packed, or an empty string.

    `Mxfp4Experts` computes act(gate) * up with gate and up stacked in [E, 2I, H] and without biases: Qwen2-MoE,
    Qwen3-MoE, Mixtral, DeepSeek, GLM and most others. gpt-oss is the exception, transposed, interleaved and biased.
    """
    from transformers.integrations.moe import _default_apply_gate

    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        return "they combine gate and up in their own way"
    wanted = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
    return ", ".join(f"{name} is {not value}" for name, value in wanted.items() if getattr(experts, name) != value)


class Mxfp4Experts(nn.Module):
    """The frozen experts of one MoE layer in MXFP4, in place of transformers' fused module.

    Parameters, uint8 and never trained: ``gate_up_proj_packed`` [E, 2I, H/2] with ``gate_up_proj_scale`` [E, 2I, H/32],
    and ``down_proj_packed`` [E, H, I/2] with ``down_proj_scale`` [E, H, I/32]. They are uninitialised until a state
    dict fills them. One expert is dequantised at a time, in forward and again in backward. ``activation`` is
    `Mxfp4Linear`'s.

    Raises:
        ModelError: ``experts`` has a layout that cannot be packed.
    """

    gate_up_proj_packed: Tensor
    gate_up_proj_scale: Tensor
    down_proj_packed: Tensor
    down_proj_scale: Tensor

    def __init__(self, experts: nn.Module, naming: Naming):
        super().__init__()
        if fault := why_not_packable(experts):
            raise ModelError(f"{type(experts).__name__} cannot stay packed ({fault}): dequantise the checkpoint")
        self.naming = naming
        self.activation: Activation | None = None
        self.act_fn: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
        for name in ("gate_up_proj", "down_proj"):
            e, n, k = getattr(experts, name).shape
            for kind, width in (("packed", k // 2), ("scale", k // BLOCK)):
                codes = torch.empty(e, n, width, dtype=torch.uint8, device="meta")
                self.register_parameter(f"{name}_{kind}", nn.Parameter(codes, requires_grad=False))

    def matrices(self, name: str, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(checkpoint's module name, packed, scale) of every expert's matrices, where this module is called ``name``.

        ``whole`` gathers a parameter that is sharded.
        """
        stacks = {
            fused: (whole(getattr(self, f"{fused}_packed")), whole(getattr(self, f"{fused}_scale")))
            for fused in ("gate_up_proj", "down_proj")
        }
        for index in range(len(self.down_proj_packed)):
            for role, (fused, half) in ROLES.items():
                packed, scale = (stack[index].chunk(parts_in(fused))[half] for stack in stacks[fused])
                yield self.naming.of_expert(Expert(name, index, role)), packed, scale

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] from hidden states [T, H], and for each token its experts [T, k] and their weights [T, k]."""
        out = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, rank = torch.where(top_k_index == e)
            x = self._product(hidden_states[token], self.gate_up_proj_packed[e], self.gate_up_proj_scale[e])
            gate, up = x.chunk(2, dim=-1)
            x = self._product(self.act_fn(gate) * up, self.down_proj_packed[e], self.down_proj_scale[e])
            out = out.index_add(0, token, (x * top_k_weights[token, rank, None]).to(out.dtype))
        return out

    def _product(self, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        return PackedProduct.apply(prepare_input(x, self.activation), packed, scale, None)


def packed_layers(model: nn.Module) -> list[Mxfp4Linear | Mxfp4Experts]:
    """Every packed layer in ``model``, in its order, whatever it is wrapped in."""
    return [module for module in model.modules() if isinstance(module, (Mxfp4Linear, Mxfp4Experts))]
