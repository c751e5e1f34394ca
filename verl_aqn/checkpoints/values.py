"""Digests of a tensor's values, the same in every process and dtype that holds these values exactly."""

import hashlib
import json

import torch
from torch import Tensor

from verl_aqn.checkpoints.writing import tensor_bytes

_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values_digest(weight: Tensor) -> str:
    """SHA-256 (hex) of one unpacked weight [N, K]: its shape, dtype and bytes."""
    digest = hashlib.sha256(json.dumps([list(weight.shape), str(weight.dtype)]).encode())
    digest.update(tensor_bytes(weight))
    return digest.hexdigest()


def plain_digest(tensor: Tensor) -> str:
    """`values_digest` of ``tensor`` as a matrix [rows, columns], in the narrowest dtype that holds its values exactly.

    A norm that the rollout keeps in float32 and the bfloat16 tensor on disk that it came from have the same digest.
    """
    return values_digest(narrowest(as_matrix(tensor.detach().cpu())))  # not every device views bits


def as_matrix(tensor: Tensor) -> Tensor:
    """[rows, columns] of a tensor of any shape: all dimensions before the last are rows; a vector is one column."""
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1)


def narrowest(tensor: Tensor) -> Tensor:
    """The same values in the first of bfloat16, float16 and float32 that holds each of them bit for bit."""
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
