"""Compute how many devices of which size a recipe's model needs."""

from dataclasses import dataclass, replace
from typing import Any

from verl_aqn.preflight.memory_plan import DEVICE, Estimate, Sizes, actor, cache_bytes, rollout
from verl_aqn.preflight.shape import Shape

DEVICE_GB = (24, 32, 64, 80, 141)
RANKS = (1, 2, 4, 8, 16, 32, 64)
TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Fit:
    """What one device of `size` bytes holds if the work is divided according to `sizes`.

    Actor and rollout take turns on a device. While the rollout generates, the actor's resident parts stay, and vLLM has
    `gpu_memory_utilization` of the device. While the actor computes, vLLM sleeps and keeps only the memory of its
    process.
    """

    size: int
    sizes: Sizes
    actor: Estimate
    rollout: Estimate
    cache: int
    """Bytes that are left for the KV cache."""
    sequences: int
    """The number of full-length sequences that fit into the cache at once; vLLM does not start if it is below one."""

    @property
    def fault(self) -> str:
        """Return why the recipe does not fit, or an empty string if it does."""
        asleep, stays = self.rollout.resident["process"], sum(self.actor.resident.values())
        share = int(self.sizes.utilization * self.size)
        if self.actor.total + asleep > self.size:
            return f'the actor needs {(self.actor.total + asleep) / 1e9:.1f} GB in its phase "{self.actor.phase}"'
        if stays + share > self.size:
            return f"the actor keeps {stays / 1e9:.1f} GB, in addition to the rollout's {self.sizes.utilization:.0%}"
        if self.sequences < 1:
            return "there is no room for the KV cache of one sequence"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "device_bytes": self.size,
            "devices": self.sizes.ranks,
            "tensor_parallel": self.sizes.tensor_parallel,
            "update_tokens": self.sizes.update_tokens,
            "actor": self.actor.to_dict(),
            "rollout": self.rollout.to_dict(),
            "kv_cache_bytes": self.cache,
            "sequences": self.sequences,
            "fault": self.fault,
        }


def fit(shape: Shape, sizes: Sizes, size: int) -> Fit:
    """Estimate one device of `size` bytes for the recipe described by `sizes`."""
    sizes = replace(sizes, cpu=False)
    empty = rollout(shape, sizes, DEVICE, 0)
    cache = max(0, int(sizes.utilization * size) - empty.total)
    sequences = cache // (cache_bytes(shape, sizes) * sizes.model_length)
    return Fit(size, sizes, actor(shape, sizes, DEVICE), rollout(shape, sizes, DEVICE, cache), cache, sequences)


def fewest(shape: Shape, sizes: Sizes, size: int) -> Fit:
    """Find the fewest devices of `size` bytes that hold the recipe, with the smallest tensor-parallel size.

    If the maximum number of devices is not enough, micro-batches are halved until the recipe fits (`update_tokens`, and
    with it the limit for log-probs, which follows it in recipes). If one sequence is already too long, the result has a
    `fault`.
    """
    length = sizes.prompt + sizes.response
    tokens = sizes.update_tokens
    while True:
        limited = replace(sizes, update_tokens=tokens, score_tokens=min(tokens, sizes.score_tokens))
        for ranks in RANKS:
            if sizes.mini_batch * sizes.samples % ranks:
                continue
            for parts in TENSOR_PARALLEL:
                if ranks % parts or not shape.divides_heads(parts):
                    continue
                found = fit(shape, replace(limited, ranks=ranks, tensor_parallel=parts), size)
                if not found.fault:
                    return found
        if tokens // 2 < length:
            return found
        tokens //= 2


def plan(shape: Shape, sizes: Sizes) -> list[Fit]:
    """Return `fewest` for each of `DEVICE_GB`, in GB of 1e9 bytes.

    An 80 GB device has 80 GiB, of which slightly less can be used.
    """
    return [fewest(shape, sizes, int(size * 1e9)) for size in DEVICE_GB]
