"""The rungs, from the simplest to a whole run. Imports nothing but the standard library."""

from verl_aqn.selftest.rung import ACCELERATORS, Rung

ENGINE = "engine"
LOG = "the rung's log in logs/"
RUNGS = (
    Rung(
        "environment", "machine_rung.examine",
        "The packages are installed, their plugins load in new processes, and the device answers.",
        "the output of `verl-aqn doctor`, and of `nvidia-smi` or `npu-smi info`",
        needs=(), limit_s=120, kernels=True,
    ),
    Rung(
        "codec-bits", "codec_rungs.bits",
        "The device's MXFP4 kernels give the bits of the format's definition: every scale rule, rounding and dtype.",
        LOG, limit_s=90, kernels=True,
    ),
    Rung(
        "codec-speed", "codec_rungs.speed",
        "The kernels are faster than plain PyTorch; the figure is their speed as a fraction of a copy on the device.",
        LOG, needs=("codec-bits",), limit_s=60, kernels=True,
    ),
    Rung(
        "packed-linear", "linear_rung.check",
        "Forward and backward of the packed layer equal those of a dense layer with the same weights.",
        LOG, needs=("codec-bits",), limit_s=60, kernels=True,
    ),
    Rung(
        "fsdp-shards", "shard_rung.check",
        "FSDP2 shards the packed bytes over the ranks and gathers them unchanged; the ranks compute and train as one.",
        LOG + ", and the versions of torch and of the collective library", needs=("packed-linear",), limit_s=90,
    ),
    Rung(
        "engine-base", "engine_rungs.base",
        "vLLM loads the packed base, holds every tensor of the folder, and names the kernel that it multiplies with.",
        LOG, limit_s=120, session=ENGINE,
    ),
    Rung(
        "engine-lora", "engine_rungs.lora",
        "The engine's log-probs with an adapter are PEFT's, in prefill and in decoding.",
        LOG, needs=("engine-base",), limit_s=90, session=ENGINE,
    ),
    Rung(
        "engine-noise", "engine_rungs.noise",
        "Noise on each norm is written, measured, used by the next forward, and taken away bit for bit.",
        LOG, needs=("engine-base",), limit_s=90, session=ENGINE,
    ),
    Rung(
        "adapter-sync", "engine_rungs.sync",
        "An adapter that replaces another is read back bit for bit; the figure is bytes and time of a sync.",
        LOG, needs=("engine-base",), limit_s=60, session=ENGINE,
    ),
    Rung(
        "sleep-wake", "engine_rungs.sleep",
        "After sleep and wake the engine has the same base, adapter and norms, and gives the same log-probs.",
        LOG, needs=("engine-base",), limit_s=60, devices=ACCELERATORS, elsewhere="vLLM has no sleep mode on a CPU",
        session=ENGINE,
    ),
    Rung(
        "graph-noise", "graph_rungs.noise",
        "An engine with graphs (CUDA or ACL) uses the noise and the adapter of the moment in each replay.",
        LOG, needs=("engine-noise",), limit_s=150, devices=ACCELERATORS, elsewhere="there are no graphs on a CPU",
    ),
    Rung(
        "grpo", "run_rungs.grpo",
        "Two steps of GRPO with noise run to the end, and every record of evidence that a run must have is right.",
        "the run folder below work/run (it contains paths of this machine)", needs=("engine-base",), limit_s=300,
        session="run",
    ),
    Rung(
        "memory-peak", "run_rungs.memory",
        "The peak memory of actor and rollout in that run is at most a quarter above the estimate of `doctor`.",
        "events.jsonl of the run below work/run (the records of kind memory)", needs=("grpo",), limit_s=60,
        session="run",
    ),
    Rung(
        "tensor-parallel", "engine_rungs.two_ranks",
        "Two ranks hold the whole base between them, with the same noise, and give the log-probs of one.",
        LOG + ", and the topology (`nvidia-smi topo -m` or `npu-smi info -t topo`)", needs=("engine-noise",),
        limit_s=150, devices=ACCELERATORS, elsewhere="this rung needs two devices", least=2,
    ),
    Rung(
        "speed-packed", "speed_rungs.packed",
        "The packed base generates; the figure is tokens per second for each batch.",
        LOG, needs=("engine-base",), limit_s=150,
    ),
    Rung(
        "speed-bf16", "speed_rungs.bf16",
        "The same base in bf16 generates; the figure is its tokens per second, and those of packed as a fraction.",
        LOG, needs=("speed-packed",), limit_s=150,
    ),
    Rung(
        "fusion-noise", "graph_rungs.fusions",
        "Each fusion pass that is on in a run leaves every norm's noise in effect.",
        LOG, needs=("graph-noise",), limit_s=240, devices=ACCELERATORS, elsewhere="there are no fusion passes on a CPU",
    ),
)  # fmt: skip


def chosen(kernels: bool) -> tuple[Rung, ...]:
    """Return the rungs to climb: all, or those that need only torch."""
    return tuple(rung for rung in RUNGS if rung.kernels or not kernels)
