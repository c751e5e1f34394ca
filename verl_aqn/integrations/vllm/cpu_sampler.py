"""Sampling on vLLM's CPU platform for requests that carry a seed.

vLLM 0.28 gives each such request a `torch.Generator`. On a CPU this has three problems. The generator draws the random
numbers of the vocabulary one by one (1.7 ms per token for SmolLM2's 49,152 entries, more than the embedded model needs
for its layers). It cannot be set back, so the engine dies when a seeded prompt is processed in chunks. And if one
request of a batch has no seed, the seeds of all other requests are ignored. Here the random numbers of a token are a
function of the request's seed, the number of tokens that it has sampled and the index in the vocabulary.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState

_GOLDEN = 0x9E3779B9 - (1 << 32)
_MIX = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))  # MurmurHash3's finaliser


class KeyedGenerator:
    """The random state of one request: a seed and a counter, with the methods of `torch.Generator` that vLLM uses."""

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0

    def get_offset(self) -> int:
        """Return four times the number of tokens drawn: vLLM assumes the counting of a CUDA generator."""
        return 4 * self.draws

    def set_offset(self, offset: int) -> None:
        """Go back to an earlier offset; vLLM does this when it discards a token."""
        self.draws = offset // 4

    def key(self) -> bytes:
        """Return the 8-byte key of the next token, and count the token."""
        self.draws += 1
        return hashlib.blake2b(f"{self.seed}/{self.draws}".encode(), digest_size=8).digest()


def exponentials(keys: Tensor, width: int) -> Tensor:
    """Return Exp(1) variates, float32 [B, width], each a function of its row's key and its column.

    Two rounds of MurmurHash3's 32-bit finaliser over column and key give a uniform number of 31 bits.

    Args:
        keys: int32 [B, 2].
    """
    column = torch.arange(width, dtype=torch.int32, device=keys.device)
    bits = _mix(_mix(column * _GOLDEN + keys[:, :1]) ^ keys[:, 1:])
    uniform = ((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    return -torch.log1p(-uniform)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((16, _MIX[0]), (13, _MIX[1])):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 16)


def _right(x: Tensor, shift: int) -> Tensor:
    """Shift int32 to the right and fill with zeros, also for negative numbers (logical shift)."""
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def sample(logits: Tensor, keys: Tensor) -> Tensor:
    """Return int64 [B] drawn from softmax(`logits` [B, V]) by the exponential race, as vLLM's own sampler does."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    return probs.div(exponentials(keys, logits.shape[-1])).argmax(dim=-1).view(-1)


_compiled_sample = torch.compile(sample, dynamic=True)


def keys_of(generators: dict[int, KeyedGenerator], rows: int) -> Tensor:
    """Return int32 [rows, 2]: a key for the next token of each row; the key is random for a row without a generator."""
    if len(generators) == rows:
        data = b"".join(generators[row].key() for row in range(rows))
        return torch.frombuffer(bytearray(data), dtype=torch.int32).view(rows, 2)
    keys = torch.randint(-(1 << 31), 1 << 31, (rows, 2), dtype=torch.int64).to(torch.int32)
    for row, generator in generators.items():
        keys[row] = torch.frombuffer(bytearray(generator.key()), dtype=torch.int32)
    return keys


def patch() -> None:
    """Replace the generators of requests by `KeyedGenerator`, and vLLM's sampler by this one for batches with some."""
    init, forward = CachedRequestState.__post_init__, topk_topp_sampler.TopKTopPSampler.forward_cpu

    def post_init(self: Any) -> None:
        init(self)
        if isinstance(self.generator, torch.Generator):
            self.generator = KeyedGenerator(self.generator.initial_seed())

    def forward_cpu(self: Any, logits: Tensor, generators: dict, k: Tensor | None, p: Tensor | None):
        # vLLM's warm-up of a compiled model has plain generators, which no request has.
        if not any(isinstance(one, KeyedGenerator) for one in generators.values()):
            return forward(self, logits, generators, k, p)
        logits = topk_topp_sampler.apply_top_k_top_p(logits, k, p)
        told = None
        if self.logprobs_mode == "processed_logits":
            told = logits
        elif self.logprobs_mode == "processed_logprobs":
            told = logits.log_softmax(dim=-1, dtype=torch.float32)
        return _compiled_sample(logits, keys_of(generators, logits.shape[0])), told

    CachedRequestState.__post_init__ = post_init
    topk_topp_sampler.TopKTopPSampler.forward_cpu = forward_cpu
