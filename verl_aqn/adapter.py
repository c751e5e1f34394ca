"""LoRA adapters as this project moves them: 16-bit tensors under module names, and one digest wherever they are."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_aqn.digest import tensor_digest

ADAPTER_DTYPE = torch.bfloat16  # what the rollout multiplies with
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """(A [r, K], B [N, r]) by the module that they are added to, W + α/r·B·A, in the dtype that the rollout gets."""

    matrices: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Under the names that PEFT gives them in ``adapter_model.safetensors``."""
        for module, (a, b) in self.matrices.items():
            yield f"{PEFT_PREFIX}{module}.lora_A.weight", a
            yield f"{PEFT_PREFIX}{module}.lora_B.weight", b

    def digest(self) -> str:
        """As a run records it (`sent` in evidence.jsonl): of the form in which the rollout holds it."""
        return tensor_digest(served_adapter(self.tensors(), self.scaling))

    def delta(self, module: str) -> Tensor:
        """α/r·B·A [N, K] of `module` in float32."""
        a, b = self.matrices[module]
        return (b.float() @ a.float()).mul_(self.scaling)


def served_adapter(adapter: Iterable[tuple[str, Tensor]], scaling: float) -> Iterator[tuple[str, Tensor]]:
    """A and B·α/r under module names, as vLLM holds them: it folds the scaling into B in the adapter's dtype."""
    for name, tensor in adapter:
        module, kind = split_name(name)
        yield f"{module}.{kind}", tensor * scaling if kind == "B" else tensor


def unwrapped(name: str) -> str:
    """A name inside a model without what FSDP, checkpointing of activations and torch.compile add to it."""
    return re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def split_name(name: str) -> tuple[str, str]:
    """(module, "A" or "B") of a LoRA tensor's name in PEFT."""
    module, _, kind = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    return module.removeprefix(PEFT_PREFIX), kind
