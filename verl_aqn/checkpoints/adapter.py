"""LoRA adapters as this project moves them: 16-bit tensors under module names, and one digest wherever they are.

PEFT gives every module its own rank and scaling (`rank_pattern`, `alpha_pattern`, `use_rslora`). vLLM knows one rank
and one α an adapter. So what the rollout is given has each module's scaling in its B and zeros up to one common rank:
`served_adapter`. The product is the same, and the rollout multiplies by 1.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from verl_aqn.digest import tensor_digest

ADAPTER_DTYPE = torch.bfloat16  # what the rollout multiplies with
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """(A [r, K], B [N, r]) by the module that they are added to, W + scaling·B·A, in the dtype that the rollout gets.

    `rank`, `alpha`, `rslora` and the patterns are those of adapter_config.json, where `rank` is called `r`.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """α/r of a module, or α/√r (rsLoRA)."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def widest(self) -> int:
        """The largest rank of its modules."""
        return max(len(a) for a, _ in self.matrices.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Under the names that PEFT gives them in ``adapter_model.safetensors``."""
        for module, (a, b) in self.matrices.items():
            yield f"{PEFT_PREFIX}{module}.lora_A.weight", a
            yield f"{PEFT_PREFIX}{module}.lora_B.weight", b

    def served(self) -> Iterator[tuple[str, Tensor]]:
        """As the rollout is given it: see `served_adapter`."""
        return served_adapter(self.tensors(), lambda name: self.scaling_of(split_name(name)[0]), self.widest)

    def digest(self) -> str:
        """As a run records it (`sent` in evidence.jsonl): of the form in which the rollout holds it."""
        return tensor_digest((held_name(name), tensor) for name, tensor in self.served())

    def uniform(self) -> "Adapter":
        """The same adapter with one rank and one α for all modules: vLLM does not read patterns."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        tensors = dict(self.served())
        matrices = {
            module: (tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"])
            for module in self.matrices
        }
        return replace(
            self, matrices=matrices, rank=self.widest, alpha=float(self.widest), rslora=False, rank_pattern={},
            alpha_pattern={},
        )  # fmt: skip

    def delta(self, module: str) -> Tensor:
        """scaling·B·A [N, K] of `module` in float32."""
        a, b = self.matrices[module]
        return (b.float() @ a.float()).mul_(self.scaling_of(module))


def served_adapter(
    tensors: Iterable[tuple[str, Tensor]], scaling_of: Callable[[str], float], rank: int
) -> Iterator[tuple[str, Tensor]]:
    """A [rank, K] and B·scaling [N, rank] under PEFT's names, from A [r, K] and B [N, r] with r ≤ `rank`.

    `scaling_of`: takes the name of B. The product is rounded to the tensor's dtype, as vLLM would round it.
    """
    for name, tensor in tensors:
        if split_name(name)[1] == "B":
            yield name, nn.functional.pad(tensor * scaling_of(name), (0, rank - tensor.shape[1]))
        else:
            yield name, nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))


def unwrapped(name: str) -> str:
    """A name inside a model without what FSDP, checkpointing of activations and torch.compile add to it."""
    return re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def split_name(name: str) -> tuple[str, str]:
    """(module, "A" or "B") of a LoRA tensor's name in PEFT."""
    module, _, kind = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    return module.removeprefix(PEFT_PREFIX), kind


def held_name(name: str) -> str:
    """The name of a LoRA tensor in digests."""
    return ".".join(split_name(name))


def _key(pattern: Mapping[str, object], module: str) -> str:
    """The pattern's key that means a module, by PEFT's own rule."""
    if not pattern:
        return module
    from peft.utils.other import get_pattern_key

    return get_pattern_key(list(pattern), module)
