"""How many devices of which size a recipe's model needs."""

from dataclasses import dataclass, replace
from typing import Any

from verl_aqn.preflight.memory_plan import DEVICE, Estimate, Sizes, actor, cache_bytes, rollout
from verl_aqn.preflight.shape import Shape

DEVICE_GB = (24, 32, 64, 80, 141)
RANKS = (1, 2, 4, 8, 16, 32, 64)
TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Fit:
    """What one device of `size` bytes holds when `sizes` says how the work is shared out.

    Actor and rollout take turns on a device: while the rollout generates, the actor's resident parts stay, and vLLM has
    `gpu_memory_utilization` of the device; while the actor computes, vLLM sleeps and keeps its process's part.
    """

    size: int
    sizes: Sizes
    actor: Estimate
    rollout: Estimate
    cache: int
    """Bytes that are left for the KV cache."""
    sequences: int
    """Of full length, that the cache holds at once; vLLM refuses to start below one."""

    @property
    def fault(self) -> str:
        """Why it does not fit; an empty string where it does."""
        asleep, stays = self.rollout.resident["process"], sum(self.actor.resident.values())
        share = int(self.sizes.utilization * self.size)
        if self.actor.total + asleep > self.size:
            return f"the actor's {self.actor.phase} takes {(self.actor.total + asleep) / 1e9:.1f} GB"
        if stays + share > self.size:
            return f"the actor keeps {stays / 1e9:.1f} GB beside the rollout's {self.sizes.utilization:.0%}"
        if self.sequences < 1:
            return "no room is left for the KV cache of one sequence"
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
    """One device of `size` bytes with the recipe as `sizes` has it."""
    sizes = replace(sizes, cpu=False)
    empty = rollout(shape, sizes, DEVICE, 0)
    cache = max(0, int(sizes.utilization * size) - empty.total)
    sequences = cache // (cache_bytes(shape, sizes) * sizes.model_length)
    return Fit(size, sizes, actor(shape, sizes, DEVICE), rollout(shape, sizes, DEVICE, cache), cache, sequences)


def fewest(shape: Shape, sizes: Sizes, size: int) -> Fit:
    """The fewest devices of `size` bytes that hold the recipe, with the smallest tensor-parallel size.

    Where not even the most do, micro-batches are halved until they do (`update_tokens`, and with it the log-probs'
    limit, which follows it in recipes); where one sequence is too long too, the answer has a `fault`.
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
    """`fewest` for each of `DEVICE_GB`, in GB of 1e9 bytes (an 80 GB device has 80 GiB and a little less for use)."""
    return [fewest(shape, sizes, int(size * 1e9)) for size in DEVICE_GB]
