"""Digests of tensor values. They are equal in every process and for every dtype that holds the values exactly."""

import hashlib
import json

import torch
from torch import Tensor

from verl_aqn.checkpoints.writing import tensor_bytes

_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values_digest(weight: Tensor) -> str:
    """Return the SHA-256 (hex) of the shape, dtype and bytes of one unpacked weight [N, K]."""
    digest = hashlib.sha256(json.dumps([list(weight.shape), str(weight.dtype)]).encode())
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def plain_digest(tensor: Tensor) -> str:
    """Return `values_digest` of ``tensor`` as a matrix, in the narrowest dtype that holds its values exactly.

    A norm that the rollout keeps in float32 therefore has the same digest as its bfloat16 tensor on disk.
    """
    return values_digest(narrowest(as_matrix(tensor.detach().cpu())))  # not every device supports views as integers


def as_matrix(tensor: Tensor) -> Tensor:
    """Reshape a tensor to [rows, columns]: all dimensions before the last are rows; a vector is one column."""
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def narrowest(tensor: Tensor) -> Tensor:
    """Convert a tensor to the first of bfloat16, float16 and float32 that holds all its values bit for bit."""
    if not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
        return tensor
    if tensor.dtype == torch.float32:  # the usual case, in one pass: the lower halves are all zero
        halves = tensor.contiguous().view(torch.int16)
        if not halves[..., ::2].any():
            return halves[..., 1::2].contiguous().view(torch.bfloat16)
    bits = _BITS[tensor.element_size()]
    for dtype in _NARROW:
        if dtype.itemsize > tensor.element_size() or dtype == tensor.dtype:
            continue
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype).view(bits), tensor.view(bits)):
            return narrow
    return tensor
