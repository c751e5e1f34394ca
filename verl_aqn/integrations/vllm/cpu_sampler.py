"""Sampling on vLLM's CPU platform for requests that carry a seed.

vLLM 0.28 gives each such request a `torch.Generator`, which on a CPU has three faults: it fills a vocabulary of random
numbers one by one (1.7 ms a token of SmolLM2's 49,152 entries, more than the embedded model needs for its layers), it
cannot be set back, so that the engine dies where a seeded prompt is read in chunks, and in a batch in which a single
request has no seed those of all others are ignored. Here the random numbers of a token are a function of the request's
seed, of how many tokens it has sampled and of the entry of the vocabulary.
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
    """Where a request is in its random numbers: a `torch.Generator` as vLLM uses one, of seed and counter."""

    def __init__(self, seed: int):
        self.seed, self.draws = seed, 0

    def get_offset(self) -> int:
        """Return four times the tokens drawn, as vLLM counts for a CUDA generator."""
        return 4 * self.draws

    def set_offset(self, offset: int) -> None:
        """Go back to an earlier offset: vLLM does so where it throws a token away."""
        self.draws = offset // 4

    def key(self) -> bytes:
        """Return 8 bytes that stand for the next token, and count it."""
        self.draws += 1
        return hashlib.blake2b(f"{self.seed}/{self.draws}".encode(), digest_size=8).digest()


def exponentials(keys: Tensor, width: int) -> Tensor:
    """Return float32 [B, width] with Exp(1) variates, each a function of its row's key and its column.

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
    """Shift int32 to the right with zeros coming in, whatever the sign."""
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def sample(logits: Tensor, keys: Tensor) -> Tensor:
    """Return int64 [B] drawn from softmax(`logits` [B, V]) by the exponential race that vLLM's own sampler runs."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    return probs.div(exponentials(keys, logits.shape[-1])).argmax(dim=-1).view(-1)


_compiled_sample = torch.compile(sample, dynamic=True)


def keys_of(generators: dict[int, KeyedGenerator], rows: int) -> Tensor:
    """Return int32 [rows, 2]: a key for the next token of each row, by chance for a row without a generator."""
    if len(generators) == rows:
        data = b"".join(generators[row].key() for row in range(rows))
        return torch.frombuffer(bytearray(data), dtype=torch.int32).view(rows, 2)
    keys = torch.randint(-(1 << 31), 1 << 31, (rows, 2), dtype=torch.int64).to(torch.int32)
    for row, generator in generators.items():
        keys[row] = torch.frombuffer(bytearray(generator.key()), dtype=torch.int32)
    return keys


def patch() -> None:
    """Put `KeyedGenerator` in the place of generators, and this sampler in that of vLLM's where a batch has some."""
    init, forward = CachedRequestState.__post_init__, topk_topp_sampler.TopKTopPSampler.forward_cpu

    def post_init(self: Any) -> None:
        init(self)
        if isinstance(self.generator, torch.Generator):
            self.generator = KeyedGenerator(self.generator.initial_seed())

    def forward_cpu(self: Any, logits: Tensor, generators: dict, k: Tensor | None, p: Tensor | None):
        if not generators:
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
