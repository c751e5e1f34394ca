"""Digests of packed bases, as the tests compare them."""

from collections.abc import Iterable

from torch import Tensor, nn

from verl_aqn.checkpoints.packing import combined_digest, module_digest, packed_weights


def base_digest(tensors: Iterable[tuple[str, Tensor, Tensor]]) -> str:
    """Return the digest of a packed base from (module name, packed, scale) triples in any order."""
    return combined_digest((name, module_digest(packed, scale)) for name, packed, scale in tensors)


def model_digest(model: nn.Module) -> str:
    """Return `base_digest` of a model with packed layers, bare or inside PEFT and FSDP. All ranks must call it."""
    return base_digest(packed_weights(model))
