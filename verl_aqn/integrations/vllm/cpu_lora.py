"""LoRA products on vLLM's CPU platform for an engine that holds one adapter.

vLLM's own CPU operators gather a copy of A and B for every token (`weights[token_indices]`), which costs more than
the model itself. With `max_loras=1` every token of a batch has that adapter or none, so plain matrix products are
enough.
"""

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class SingleAdapterPunicaWrapper(PunicaWrapperCPU):
    """Computes `y += (x Aᵀ) Bᵀ` for one adapter, and uses the parent's operators for several adapters."""

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs,
    ) -> None:
        """Add the adapter's product to y [T, N] in place.

        x is [T, K]; A [1, 1, r, K] and B [1, 1, n, r] are given for each of the layer's slices. B already contains the
        adapter's scaling: vLLM multiplies it in when it loads the adapter.
        """
        if lora_a_stacked[0].shape[0] != 1:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        x = x.view(-1, x.shape[-1])
        rows = y.view(-1, y.shape[-1])
        has_adapter = self.token_lora_indices[: x.shape[0]] >= 0
        if not bool(has_adapter.any()):
            return
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            inner = torch.nn.functional.linear(x, a[0, 0])
            if not bool(has_adapter.all()):
                inner = inner * has_adapter.unsqueeze(-1)
            rows[:, start : start + width].addmm_(inner, b[0, 0].t(), alpha=scale)
            start += width

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        """Add the head's adapter to the logits as the parent does, but do nothing if the head has none (A is zero).

        The product over the whole vocabulary took a quarter of the generation time.
        """
        if bool(lora_a_stacked.any()):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)
