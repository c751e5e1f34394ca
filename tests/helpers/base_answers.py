"""Reports of actor and rollout ranks about a folder that they hold unchanged, and the base record of these reports."""

from typing import Any

from torch import nn

from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.disk_base import DiskBase, Part
from verl_aqn.checkpoints.loading import load_dense, load_model
from verl_aqn.checkpoints.packing import combined_digest
from verl_aqn.checkpoints.slices import NOTHING, Slices
from verl_aqn.integrations.verl.base_evidence import BaseRecords

KERNEL = {"layers": 8, "experts": 0, "kernel": "Kernel", "weights_equal_base": None, "weights_digest": "a" * 64}


def records(folder, form: str = "packed") -> BaseRecords:
    return BaseRecords(folder, form, "none", lambda text: None)


def actor_of(model: nn.Module, folder) -> dict[str, Any]:
    return actual_base(model, folder)._asdict() | {"activations": ["none"] if folder.name == "packed" else []}


def loaded(folder) -> nn.Module:
    return (load_model if folder.name == "packed" else load_dense)(folder).requires_grad_(False)


def rollout_of(folder, slices: Slices | None = None, form: str = "packed") -> dict[str, Any]:
    """Return the report of a rank that holds `slices` of some tensors, and all other tensors whole and unchanged.

    `form`: that of packed modules.
    """
    disk, slices = DiskBase(folder), slices or {}
    parts = {
        name: Part(form if group == "packed" else disk.dtypes[name], tuple(slices[name]) if name in slices else None)
        for name, group in disk.groups.items()
        if slices.get(name) != NOTHING
    }
    digests, _ = disk.digests({name: [part] for name, part in parts.items()})
    found = {(n, p): digests[(n, p)] for n, p in parts.items()}
    tensors = {n: [found[(n, p)], p.form, p.form != form, slices.get(n)] for n, p in parts.items()}
    packed = [(n, tensors[n][0]) for n, group in disk.groups.items() if group == "packed" and n in tensors]
    packed_slices = {n: s for n, s in slices.items() if disk.groups[n] == "packed"}
    form = form if disk.quantised else "bf16"
    return {
        **KERNEL, "form": form, "base_digest": combined_digest(packed), "slices": packed_slices, "kernel_digest": None,
        "activations": ["none"] if packed else [], "tensors": tensors, "computed": {}, "lost": {},
    }  # fmt: skip


def record_of(folder, actor, rollout, when="start", made=None) -> dict[str, Any]:
    ranks = {"actor": len(actor), "rollout": len(rollout)}
    return (made or records(folder)).record(when, actor, rollout, ranks)
