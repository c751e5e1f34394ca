"""What each phase of an RL step asks of a device, and how long that takes at the device's limits.

Letters as in `verl_aqn.preflight.memory_plan`. Counted are matrix products of the model, its head, its adapters and
attention; weights and KV cache read by the rollout, weights dequantised and read by the actor; bytes that ranks send
each other. Operations are multiplications and additions, two for each weight and token (Kaplan et al., 2020, 2.1).
"""

from dataclasses import dataclass
from math import ceil

from verl_aqn.preflight.memory_plan import BF16, FP32, PACKED, Sizes, cache_bytes
from verl_aqn.preflight.shape import Shape


@dataclass(frozen=True)
class Load:
    """One step: `prompts` with `samples` answers each; tokens of a prompt and of an answer on average, and at most."""

    prompts: int
    samples: int
    prompt: float
    response: float
    longest: int


@dataclass(frozen=True)
class Work:
    """Of one device in one phase: operations, bytes read of its own memory, bytes received from others, `turns` that
    wait for each other (decoding steps, micro-batches)."""

    operations: float = 0.0
    read: float = 0.0
    received: float = 0.0
    turns: float = 0.0


@dataclass(frozen=True)
class Device:
    """Limits as published: bf16 operations (dense) and bytes a second, bytes of memory; `link` and `network` are bytes
    a second that one device receives from its own node and from others, of which `per_node` share a node."""

    name: str
    operations: float
    memory: float
    size: float
    link: float
    network: float
    per_node: int


# SXM boards with 400 Gbit/s a device (NVIDIA's datasheets; 180 GB and 7.7 TB/s: HGX B200). Ascend: a logical device is
# one die: Huawei's CloudMatrix384 paper gives 752 TFLOPS, 3.2 TB/s, 128 GB and 392 GB/s one way for a 910C of two. A2
# is taken as one such die with 200 Gbit/s; 950DT as announced (FP8 1 PFLOPS, from which bf16 0.5; 2 TB/s both ways).
DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, 3.35e12, 80e9, 450e9, 50e9, 8),
        Device("h200", 989e12, 4.8e12, 141e9, 450e9, 50e9, 8),
        Device("b200", 2250e12, 7.7e12, 180e9, 900e9, 50e9, 8),
        Device("a2", 376e12, 1.6e12, 64e9, 196e9, 25e9, 8),
        Device("a3", 376e12, 1.6e12, 64e9, 196e9, 25e9, 16),
        Device("950dt", 500e12, 4.0e12, 144e9, 1000e9, 50e9, 8),
    )
}


def active(shape: Shape) -> int:
    """Elements of linear weights that one token passes: of the experts those that are chosen for it."""
    if not shape.routed:
        return shape.linears
    return (
        shape.linears - shape.layers * 3 * shape.hidden * shape.inner * (shape.routed - shape.experts) // shape.experts
    )


def forward(shape: Shape, rank: int, tokens: float, scored: float, context: float) -> float:
    """Operations of `tokens` that each look at `context` others; `scored` of them get logits."""
    linears = active(shape) + rank * shape.adapted
    attention = 2 * shape.layers * shape.query * context
    return 2 * (linears + attention) * tokens + 2 * shape.vocabulary * shape.hidden * scored


def generation(shape: Shape, sizes: Sizes, load: Load, cache: float) -> Work:
    """One tensor-parallel rank of the rollout, with `cache` bytes of KV cache; prompts of a group are shared."""
    parts = sizes.tensor_parallel
    sequences = load.prompts * load.samples * parts / sizes.ranks
    fitting = cache / (cache_bytes(shape, sizes) * (load.prompt + load.response))
    turns = max(load.longest, sequences * load.response / max(1.0, min(sequences, sizes.sequences, fitting)))
    context = load.prompt + load.response / 2
    answers = forward(shape, sizes.rank, sequences * load.response, sequences * load.response, context)
    prompts = forward(shape, sizes.rank, load.prompt * sequences / load.samples, 0, load.prompt / 2)
    linear = PACKED if sizes.served_packed and not sizes.cpu else BF16  # the CPU's kernel reads a bf16 copy
    weights = (linear * shape.linears + BF16 * shape.vocabulary * shape.hidden) / parts
    cached = cache_bytes(shape, sizes) * context * sequences * load.response
    # Two sums over the ranks in each layer, as rings.
    sums = 2 * shape.layers * BF16 * shape.hidden * sequences * (load.response + load.prompt / load.samples)
    return Work((answers + prompts) / parts, turns * weights + cached, 2 * sums * (parts - 1) / parts, turns)


def training(shape: Shape, sizes: Sizes, load: Load, limit: int, *, update: bool) -> Work:
    """One rank of the actor: log-probs, or the update; micro-batches of at most `limit` tokens."""
    samples = load.prompts * load.samples / sizes.ranks
    if sizes.padded:  # a row is a prompt with all its answers behind it, under a mask
        context = load.prompt + load.samples * load.response
        tokens, scored = samples / load.samples * context, samples * load.response
    else:
        context = (load.prompt + load.response) / 2
        tokens = scored = samples * 2 * context
    micro = ceil(samples * (load.prompt + load.response) / limit)
    once = forward(shape, sizes.rank, tokens, scored, context)
    # Backward: gradients of inputs cost as much again, those of the base's weights are not made, the adapters' are.
    passes = (2 + sizes.checkpointing) if update else 1
    operations = passes * once + (2 * sizes.rank * shape.adapted * tokens if update else 0)
    linear = PACKED if sizes.packed else BF16
    read = (
        passes * micro * ((linear + 2 * BF16 * sizes.packed) * shape.linears + BF16 * shape.vocabulary * shape.hidden)
    )
    gathered = passes * micro * (linear * shape.linears + BF16 * shape.kept)
    gradients = 2 * FP32 * sizes.rank * shape.adapted if update else 0
    return Work(operations, read, (gathered + gradients) * (sizes.ranks - 1) / sizes.ranks, micro)


def sync(shape: Shape, sizes: Sizes) -> Work:
    """The adapter, gathered from all ranks in fp32, rounded, handed to the rollout beside it, and digested there."""
    adapter = sizes.rank * shape.adapted
    return Work(0.0, 3 * BF16 * adapter, FP32 * adapter * (sizes.ranks - 1) / sizes.ranks, 1)


def phases(shape: Shape, sizes: Sizes, load: Load, cache: float) -> dict[str, Work]:
    """Every phase of a step, by the names of `bench step`."""
    return {
        "generation": generation(shape, sizes, load, cache),
        "log-probs": training(shape, sizes, load, sizes.score_tokens, update=False),
        "update": training(shape, sizes, load, sizes.update_tokens, update=True),
        "sync": sync(shape, sizes),
    }


def seconds(work: Work, device: Device, ranks: int) -> dict[str, float]:
    """Of computing, reading and receiving at the device's limits, each alone."""
    return {
        "compute": work.operations / device.operations,
        "memory": work.read / device.memory,
        "network": work.received / (device.link if ranks <= device.per_node else device.network),
    }


def limit_s(work: Work, device: Device, ranks: int) -> float:
    """Seconds at the device's limits: the longer of computing and reading, then receiving. Turns cost nothing."""
    parts = seconds(work, device, ranks)
    return max(parts["compute"], parts["memory"]) + parts["network"]


def bound(work: Work, device: Device, ranks: int) -> str:
    """What bounds a phase at the limits: "compute", "memory" or "network"."""
    parts = seconds(work, device, ranks)
    return max(parts, key=lambda name: parts[name])
