"""LoRA products on vLLM's CPU platform for an engine that holds one adapter.

vLLM's own CPU operators gather a copy of A and B for every token (`weights[token_indices]`), which costs more than
the model itself. With `max_loras=1` every token of a batch has that adapter or none, so plain matrix products are
enough: two for each layer, also where vLLM fuses several layers into one (q, k and v, for example). Packed layers
compute their own product and the adapter's in one operation.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from verl_aqn.integrations.vllm.cpu_kernel import CpuMxfp4LinearKernel, multiplies_packed


class SingleAdapterPunicaWrapper(PunicaWrapperCPU):
    """Computes `y += (x Aᵀ) Bᵀ` for one adapter, and uses the parent's operators for several adapters."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._joined: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of the first A
        self._with_adapter: Tensor | None = None  # which tokens of the batch have it; None until they are known
        self._none = self._all = False

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Note for a new batch which tokens have the adapter. All layers ask for it."""
        super().update_metadata(*args, **kwargs)
        self._with_adapter = None

    def _look(self, tokens: int) -> None:
        if self._with_adapter is None or len(self._with_adapter) != tokens:
            self._with_adapter = self.token_lora_indices[:tokens] >= 0
            self._none, self._all = not bool(self._with_adapter.any()), bool(self._with_adapter.all())

    def adapter_of_all(
        self, tokens: int, some_a: tuple[Tensor, ...], some_b: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the A and B of `_join` if there is one adapter and all tokens of the batch have it, else None."""
        if some_a[0].shape[0] != 1:
            return None
        self._look(tokens)
        return self._join(some_a, some_b) if self._all else None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs,
    ) -> None:
        """Add the adapter's product to y [T, N] in place.

        x is [T, K]; A [1, 1, r, K] and B [1, 1, n, r] are given for each of the layer's slices. B already contains the
        adapter's scaling: vLLM multiplies it in when it loads the adapter.
        """
        if lora_a_stacked[0].shape[0] != 1:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs)
            return
        x, rows = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        self._look(len(x))
        if self._none:
            return
        a, b = self._join(lora_a_stacked, lora_b_stacked)
        inner = torch.nn.functional.linear(x, a)
        if not self._all:
            assert self._with_adapter is not None
            inner = inner * self._with_adapter.unsqueeze(-1)
        rows[:, : len(b)].addmm_(inner, b.t(), alpha=scale)

    def _join(self, some_a: tuple[Tensor, ...], some_b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return A [s · r, K] and B [N, s · r] of all s slices; B is zero outside its blocks.

        The given tensors become views of these, so that whatever vLLM writes into them later is here too.
        """
        if len(some_a) == 1:
            return some_a[0][0, 0], some_b[0][0, 0]
        key = some_a[0].data_ptr()
        if key not in self._joined:
            with torch.inference_mode(False):  # vLLM writes adapters outside of inference mode
                a = torch.cat([one[0, 0] for one in some_a])
                b = torch.block_diag(*(one[0, 0] for one in some_b))
                row = column = 0
                for one, other in zip(some_a, some_b, strict=True):
                    (rank, _), (width, _) = one.shape[2:], other.shape[2:]
                    one.data = a[None, None, column : column + rank]
                    other.data = b[None, None, row : row + width, column : column + rank]
                    row, column = row + width, column + rank
            key = a.data_ptr()
            self._joined[key] = a, b
        return self._joined[key]

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add the embedding's adapter to y as the parent does, but do nothing if the embedding has none (B is zero)."""
        if bool(lora_b_stacked.any()):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale,
        *,
        buffer: Tensor | None = None,
        **kwargs,
    ) -> None:
        """Add the head's adapter to the logits as the parent does, but do nothing if the head has none (A is zero).

        The product over the whole vocabulary took a quarter of the generation time.
        """
        if bool(lora_a_stacked.any()):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs)


_apply_parts = BaseLinearLayerWithLoRA._apply_sync


def apply_packed(self: BaseLinearLayerWithLoRA, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a LoRA layer of vLLM in one operation if its weight is packed and all tokens have the adapter.

    This replaces `BaseLinearLayerWithLoRA._apply_sync`, which adds the adapter's products to the base layer's.
    """
    base: Any = self.base_layer
    kernel = getattr(getattr(base, "scheme", None), "kernel", None)
    if isinstance(kernel, CpuMxfp4LinearKernel) and kernel.activation is None and x.dim() == 2:
        adapter = None
        if multiplies_packed(base):
            adapter = self.punica_wrapper.adapter_of_all(len(x), self.lora_a_stacked, self.lora_b_stacked)
        if adapter is not None and len(adapter[1]) == len(base.weight):
            return kernel.multiply(base, x, bias, *adapter)
    return _apply_parts(self, x, bias)
