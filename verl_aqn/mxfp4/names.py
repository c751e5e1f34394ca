"""Names of the parts of experts: which matrix of which expert a tensor holds."""

from __future__ import annotations

import re
from typing import NamedTuple

# For each matrix of an expert: the fused stack that contains it, and the half of the rows.
ROLES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}


EXPERT_MATRICES = {*ROLES, "w1", "w2", "w3"}  # names of an expert's matrices in checkpoints


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


_SUFFIXES = {".weight": "", ".weight_packed": "_packed", ".weight_scale": "_scale"}


class Expert(NamedTuple):
    """One matrix of one expert."""

    module: str
    """The name of the experts module in the model."""
    number: int
    role: str
    """A key of ROLES."""


def is_expert(module: str) -> bool:
    """Return whether a module name in a checkpoint is that of one matrix of an expert."""
    return _EXPERT.fullmatch(module) is not None


def experts_of(module: str) -> str | None:
    """Return the experts module that a packed module is part of, one matrix or a stack of all; None if in none."""
    match = re.fullmatch(r"(.+\.experts)\.(?:\d+\.)?\w+", module)
    return match and match[1]


def parts_in(fused: str) -> int:
    """Return how many matrices of an expert are concatenated in ``gate_up_proj`` or ``down_proj``."""
    return sum(name == fused for name, _ in ROLES.values())


def parts_of(stack: str, count: int) -> list[tuple[Expert, str]]:
    """Return the parts of a fused tensor ``stack`` of ``count`` experts: (expert, suffix of the checkpoint tensor)."""
    module, _, leaf = stack.rpartition(".")
    for suffix, ending in sorted(_SUFFIXES.items(), key=lambda item: -len(item[1])):
        if leaf.endswith(ending):
            fused = leaf.removesuffix(ending)
            roles = [role for role, (name, _) in ROLES.items() if name == fused]
            return [(Expert(module, number, role), suffix) for number in range(count) for role in roles]
    raise AssertionError(stack)


def pooled_name(name: str) -> str:
    """Return the common name of a layer's experts; a module that is in no expert keeps its name."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
