"""`python -m tests.integration.shards MODEL OUT`: each of two ranks of an engine writes noise and saves its weights.

OUT/rank<n>.pt: {name: {"spans": [(offset, numel), …], "clean": [numel], "noisy": [numel]}}, elements in order of spans.
This runs in its own process, because an engine sets up its process only once.
"""

import sys

ORDER = {"step": 2, "seed": 1, "sigma": 0.2, "unit": "absolute", "targets": ["norm", "linear"]}


def save_shard(worker, out: str) -> None:
    import torch

    from verl_aqn.noise.spec import NoiseSpec

    worker.aqn_prepare(ORDER)
    targets = [target for target, _ in worker.aqn_injector._select(NoiseSpec.from_dict(ORDER))]
    shards = {}
    for when, write in (("clean", worker.aqn_restore), ("noisy", lambda: worker.aqn_apply_noise(ORDER))):
        write()
        for target in targets:
            entry = shards.setdefault(target.name, {"spans": [(span.offset, span.numel) for span in target.spans]})
            entry[when] = target.data().flatten().clone()
    torch.save(shards, f"{out}/rank{worker.rank}.pt")


def main(model: str, out: str) -> None:
    from vllm import LLM

    from tests.integration.shards import save_shard  # not __main__'s: the workers import it by its name

    llm = LLM(
        model,
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        tensor_parallel_size=2,
        worker_extension_cls="verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension",
    )
    llm.collective_rpc(save_shard, args=(out,))


if __name__ == "__main__":
    main(*sys.argv[1:])
