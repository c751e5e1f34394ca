"""LoRA adapters as 16-bit tensors by module name, with one digest that the trainer and the rollout both compute.

PEFT gives every module its own rank and scaling (`rank_pattern`, `alpha_pattern`, `use_rslora`). vLLM knows one rank
and one α per adapter. `served_adapter` therefore multiplies the scaling of each module into its B and pads A and B
with zeros to one common rank. The product B·A is the same, and the rollout uses a scaling of 1.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from verl_aqn.digest import tensor_digest

ADAPTER_DTYPE = torch.bfloat16  # the dtype of adapters in the rollout
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: (A [r, K], B [N, r]) by module name, in the dtype that the rollout receives.

    The adapted weight of a module is W + scaling·B·A. `rank`, `alpha`, `rslora` and the patterns come from
    adapter_config.json, where `rank` is called `r`.
    """

    matrices: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives a module."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the scaling of a module: α/r, or α/√r for rsLoRA."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def widest(self) -> int:
        """The largest rank among the modules."""
        return max(len(a) for a, _ in self.matrices.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors under the names that PEFT uses in ``adapter_model.safetensors``."""
        for module, (a, b) in self.matrices.items():
            yield f"{PEFT_PREFIX}{module}.lora_A.weight", a
            yield f"{PEFT_PREFIX}{module}.lora_B.weight", b

    def served(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors in the form that the rollout receives: see `served_adapter`."""
        return served_adapter(self.tensors(), lambda name: self.scaling_of(split_name(name)[0]), self.widest)

    def digest(self) -> str:
        """Return the digest of the tensors in the form that the rollout holds (`sent` in evidence.jsonl)."""
        return tensor_digest((digest_name(name), tensor) for name, tensor in self.served())

    def uniform(self) -> "Adapter":
        """Return the same adapter with one rank and one α for all modules, because vLLM does not read patterns."""
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
        """Return scaling·B·A [N, K] of `module` in float32."""
        a, b = self.matrices[module]
        return (b.float() @ a.float()).mul_(self.scaling_of(module))


def served_adapter(
    tensors: Iterable[tuple[str, Tensor]], scaling_of: Callable[[str], float], rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield A [rank, K] and B·scaling [N, rank] under PEFT's names, from A [r, K] and B [N, r] with r ≤ `rank`.

    `scaling_of` takes the name of B. B·scaling is rounded to the dtype of the tensor, as vLLM would round it.
    """
    for name, tensor in tensors:
        if split_name(name)[1] == "B":
            yield name, nn.functional.pad(tensor * scaling_of(name), (0, rank - tensor.shape[1]))
        else:
            yield name, nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))


def unwrapped(name: str) -> str:
    """Return a name without the prefixes that FSDP, activation checkpointing and torch.compile add to it."""
    return re.sub(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def split_name(name: str) -> tuple[str, str]:
    """Split the PEFT name of a LoRA tensor into (module, "A" or "B")."""
    module, _, kind = name.removesuffix(".weight").removesuffix(".default").rpartition(".lora_")
    return module.removeprefix(PEFT_PREFIX), kind


def digest_name(name: str) -> str:
    """Return the name of a LoRA tensor that digests use."""
    return ".".join(split_name(name))


def _key(pattern: Mapping[str, object], module: str) -> str:
    """Return the key of `pattern` that applies to a module, by PEFT's own rule."""
    if not pattern:
        return module
    from peft.utils.other import get_pattern_key

    return get_pattern_key(list(pattern), module)
