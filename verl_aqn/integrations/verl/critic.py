"""PPO's critic on the packed base: LoRA adapters, and a head with one row that turns a hidden state into a value.

verl would load a token-classification model with FlashAttention, which cannot read packed weights or run on a CPU.
"""

import torch
from torch import Tensor, nn
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from verl_aqn.integrations.verl.packed_base import PackedBase


class ValueHead(nn.Module):
    """A head from hidden states [..., H] to values [..., 1], whose weights start at 0, so that all values are 0."""

    def __init__(self, hidden: int):
        super().__init__()
        # verl's adapter-only checkpoints save parameters with `lora_` or `.adapter_` in their names.
        self.adapter_row = nn.Parameter(torch.zeros(1, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.adapter_row.to(hidden.dtype))


class AqnValueEngine(PackedBase, FSDPEngineWithValueHead):
    """The critic: the actor's base, its own adapters, and a value head instead of the language-model head."""

    def _build_module(self):
        module = self._causal_model()
        self._decide_layout(module, share=False)  # before the head is replaced, because this needs logits
        module.config.tie_word_embeddings = False
        module.set_output_embeddings(ValueHead(module.config.hidden_size))
        return self._finished(module)

    def _build_lora_module(self, module):
        module = super()._build_lora_module(module)
        module.get_output_embeddings().adapter_row.requires_grad_(True)  # PEFT has frozen it together with the base
        return module
