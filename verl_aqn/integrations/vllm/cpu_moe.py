"""Unquantised MoE layers on vLLM's CPU platform, where two problems stop vLLM 0.28 from using its own kernel for them.

First, in an engine with LoRA it selects the Triton kernel, which does not run on a CPU. Second, under expert
parallelism it passes the experts' indices in the whole model to the kernel. These are out of bounds for the experts of
one rank (segmentation fault).
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


class CpuMoEMethod(UnquantizedFusedMoEMethod):
    """Replaces vLLM's method. The experts must not have an adapter: `lora_target_modules` must leave them out."""

    experts_cls: Any

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(replace(moe, is_lora_enabled=False))
        self.experts_cls = type(f"Local{self.experts_cls.__name__}", (_LocalExperts, self.experts_cls), {})


class _LocalExperts:
    """A mixin before an experts class of vLLM's CPU platform: a rank computes only the experts that it holds."""

    _expert_map: Tensor | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        self._expert_map = layer.expert_map

    def _select_experts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return weights [T, k] in float32 and the experts' indices on this rank [T, k] in int32.

        Experts of other ranks get weight 0 and index 0. The outputs of all ranks are summed afterwards.
        """
        weights, experts = super()._select_experts(*args, **kwargs)  # type: ignore[misc]
        if self._expert_map is None:
            return weights, experts
        places = self._expert_map[experts.long()]
        return weights.masked_fill(places < 0, 0.0), places.clamp(min=0)
