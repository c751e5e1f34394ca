"""PPO's critic over the packed base: LoRA and one row that turns a hidden state into a value.

verl would load a token-classification model with FlashAttention, which neither reads packed weights nor runs on a CPU.
"""

import torch
from torch import Tensor, nn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from verl_aqn.integrations.verl.packed_base import PackedBase


class ValueHead(nn.Module):
    """hidden [..., H] → value [..., 1]; 0 at the start, where nothing is known."""

    def __init__(self, hidden: int):
        super().__init__()
        # verl's adapter-only checkpoints keep what has `lora_` or `.adapter_` in its name.
        self.adapter_row = nn.Parameter(torch.zeros(1, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.adapter_row.to(hidden.dtype))


class AqnValueEngine(PackedBase, FSDPEngineWithValueHead):
    """The critic: the actor's base, adapters of its own, a value head in the place of the language model's."""

    def _build_module(self):
        module = self._causal_model()
        self._decide_layout(module, share=False)  # while it still gives logits
        module.config.tie_word_embeddings = False
        module.set_output_embeddings(ValueHead(module.config.hidden_size))
        return self._finished(module)

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        module.get_output_embeddings().adapter_row.requires_grad_(True)  # PEFT has frozen it with the base
        return module
