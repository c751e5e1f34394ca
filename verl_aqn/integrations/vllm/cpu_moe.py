"""Unquantised MoE layers on vLLM's CPU platform, where two things keep vLLM 0.28 from using its own kernel for them.

In an engine with LoRA it takes Triton's kernel, which a CPU has not. And under expert parallelism it gives the kernel
experts by the numbers that they have in the whole model: out of the bounds of a rank's own (segmentation fault).
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


class CpuMoEMethod(UnquantizedFusedMoEMethod):
    """In place of vLLM's method. Its experts have no adapter: `lora_target_modules` must leave them out."""

    experts_cls: Any

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(replace(moe, is_lora_enabled=False))
        self.experts_cls = type(f"Local{self.experts_cls.__name__}", (_LocalExperts, self.experts_cls), {})


class _LocalExperts:
    """Before an experts class of vLLM's CPU platform: of the chosen experts, a rank computes those that it holds."""

    _held: Tensor | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        self._held = layer.expert_map

    def _select_experts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Weights [T, k] in float32 and experts [T, k] in int32, by their places on this rank.

        Others get a weight of 0 and the place of the first; the ranks' outputs are summed.
        """
        weights, experts = super()._select_experts(*args, **kwargs)  # type: ignore[misc]
        if self._held is None:
            return weights, experts
        places = self._held[experts.long()]
        return weights.masked_fill(places < 0, 0.0), places.clamp(min=0)
