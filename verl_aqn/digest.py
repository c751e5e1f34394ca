"""The digest that is used for all tensors that are read back: base, norms and adapters."""

import hashlib
from collections.abc import Iterable

import torch


def tensor_digest(items: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 (hex) of named tensors, hashed in order of name.

    Args:
        items: pairs of a name and a tensor of any shape and dtype, on any device. The order of the pairs has no effect.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(items, key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(data.shape)}|{data.dtype}|".encode())
        digest.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
