"""Names of a model's tensors: in checkpoints every MoE expert has its own, in transformers 5 the experts are fused.

========================================  =====================================================
in a checkpoint, and in stock vLLM        in the model that transformers builds
========================================  =====================================================
``P.mlp.experts.3.gate_proj.weight``      rows 0..I of ``P.mlp.experts.gate_up_proj[3]`` [2I, H]
``P.mlp.experts.3.up_proj.weight``        rows I..2I of it
``P.mlp.experts.3.down_proj.weight``      ``P.mlp.experts.down_proj[3]`` [H, I]
``P.block_sparse_moe.experts.3.w1.weight``  as gate_proj, ``w3`` as up_proj, ``w2`` as down_proj (Mixtral and its kin)
``P.block_sparse_moe.gate.weight``        ``P.mlp.gate.weight``
========================================  =====================================================

Packed ones have ``.weight_packed`` and ``.weight_scale`` for ``.weight`` on the left, and ``_packed`` and ``_scale``
after the fused name on the right (`verl_aqn.mxfp4.experts.Mxfp4Experts`). All other names are the same on both sides.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Which fused stack an expert's matrix is part of, and which half of its rows.
ROLES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
_MIXTRAL_ROLES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERT_MATRICES = {*ROLES, *_MIXTRAL_ROLES.values()}  # what an expert's matrices are called in checkpoints
_MIXTRAL_MODELS = {"mixtral", "minimax", "minimax_m2"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)(\.weight|\.weight_packed|\.weight_scale)?")
_SUFFIXES = {".weight": "", ".weight_packed": "_packed", ".weight_scale": "_scale"}


class Expert(NamedTuple):
    """One matrix of one expert."""

    module: str
    """The model's experts module."""
    number: int
    role: str
    """A key of ROLES."""


class Naming:
    """The names of one architecture, by ``model_type`` of its config.json."""

    def __init__(self, model_type: str):
        self._mixtral = model_type in _MIXTRAL_MODELS
        self._names = _MIXTRAL_ROLES if self._mixtral else {role: role for role in ROLES}
        self._roles = {name: role for role, name in self._names.items()}

    def expert(self, name: str) -> Expert | None:
        """Which expert's matrix a checkpoint's tensor or module name means; None for every other name."""
        match = _EXPERT.fullmatch(name)
        if not match or match[3] not in self._roles:
            return None
        return Expert(self._to_model(match[1]), int(match[2]), self._roles[match[3]])

    def in_model(self, name: str) -> str:
        """The tensor of the model that a checkpoint's tensor is, or is a part of."""
        match, expert = _EXPERT.fullmatch(name), self.expert(name)
        if match and expert and match[4]:
            return f"{expert.module}.{ROLES[expert.role][0]}{_SUFFIXES[match[4]]}"
        return self._to_model(name)

    def in_checkpoint(self, name: str) -> str:
        """The checkpoint's name for a tensor or module of the model that is no fused expert."""
        return name.replace(".mlp.", ".block_sparse_moe.") if self._mixtral else name

    def of_expert(self, expert: Expert) -> str:
        """The checkpoint's module name of an expert's matrix."""
        return f"{self.in_checkpoint(expert.module)}.{expert.number}.{self._names[expert.role]}"

    def sources(self, names: Iterable[str]) -> dict[str, list[str]]:
        """For every tensor of the model, the checkpoint's tensors that it is made of."""
        made_of: dict[str, list[str]] = {}
        for name in names:
            made_of.setdefault(self.in_model(name), []).append(name)
        return made_of

    def _to_model(self, name: str) -> str:
        return name.replace(".block_sparse_moe.", ".mlp.") if self._mixtral else name


def parts_in(fused: str) -> int:
    """How many matrices of an expert stand above each other in ``gate_up_proj`` or ``down_proj``."""
    return sum(name == fused for name, _ in ROLES.values())


def parts_of(stack: str, count: int) -> list[tuple[Expert, str]]:
    """What a fused tensor ``stack`` of ``count`` experts is made of: (expert, suffix of the checkpoint's tensor)."""
    module, _, leaf = stack.rpartition(".")
    for suffix, ending in sorted(_SUFFIXES.items(), key=lambda item: -len(item[1])):
        if leaf.endswith(ending):
            fused = leaf.removesuffix(ending)
            roles = [role for role, (name, _) in ROLES.items() if name == fused]
            return [(Expert(module, number, role), suffix) for number in range(count) for role in roles]
    raise AssertionError(stack)
