"""Computing MLPs a second time in the backward pass, where what they would save is large.

Of what a decoder layer saves for the backward pass, most is inside its MLP: the gate, its activation, up, and the
product of both, 8F bytes a token in bf16 for F inner features. Here an MLP saves its input only, which the layer saves
anyway, and the backward pass computes the rest again, one layer at a time. Values and gradients are equal to the last
bit. This is torch's activation checkpointing for one part of a layer; gradient checkpointing in verl recomputes whole
layers, attention included.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from verl_aqn.mxfp4.linear import Mxfp4Linear

WORTH = 1 << 30
"""Bytes that the MLPs of all layers would save, from which on they are computed again. Less is not worth the time."""


def saves_much(tokens: int, inner: int, layers: int) -> bool:
    """Return whether the MLPs of all `layers`, with `inner` features each, save much for so many tokens."""
    return 8 * inner * tokens * layers >= WORTH


def find_mlps(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the MLPs of a model: modules of linear layers and activations without state, of one tensor.

    Experts of a mixture are no such modules, nor are MLPs with a norm inside.
    """
    for module in model.modules():
        children = list(module.children())
        linears = [child for child in children if _in_features(child)]
        others = [child for child in children if not _in_features(child)]
        if len(linears) < 2 or any(True for child in others for _ in child.parameters()):
            continue
        takes = [one for one in inspect.signature(module.forward).parameters.values() if one.default is one.empty]
        if len(takes) == 1 and not any(True for _ in module.parameters(recurse=False)):
            yield module


def recompute_mlps(model: nn.Module) -> int:
    """Make the model's MLPs compute again in the backward pass what is large; return how many MLPs there are."""
    found = list(find_mlps(model))
    for module in found:
        inner = max(_in_features(child) for child in module.children())
        module.forward = partial(_forward, module.forward, inner, len(found))
    return len(found)


def _forward(compute: Callable[[Tensor], Tensor], inner: int, layers: int, hidden: Tensor) -> Tensor:
    """Compute an MLP of hidden states [..., H]."""
    if torch.is_grad_enabled() and saves_much(hidden.numel() // hidden.shape[-1], inner, layers):
        return checkpoint(compute, hidden, use_reentrant=False)
    return compute(hidden)


def _in_features(module: nn.Module) -> int:
    """Return the features that a linear layer takes (a plain, a packed or an adapted one), 0 for another module."""
    base: object = getattr(module, "get_base_layer", lambda: module)()
    return int(base.in_features) if isinstance(base, nn.Linear | Mxfp4Linear) else 0
