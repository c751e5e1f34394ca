"""`python -m tests.integration.generate MODEL ADAPTER OUT [ACTIVATION]`: vLLM's responses and weights, as a JSON line.

OUT is for the files that tests.integration.shards saves. This runs in its own process, because an engine sets up its
process only once.
"""

import json
import sys
from pathlib import Path


def main(model: str, adapter: str, out: str, activation: str = "none", dtype: str = "auto") -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tests.integration.shards import save_shard
    from verl_aqn.checkpoints.loading import open_packed, packed_modules
    from verl_aqn.checkpoints.packing import is_packed

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        additional_config={"mxfp4_activation": activation},
        worker_extension_cls="verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension",
    )
    prompts = ["Two and two", "The apples of Ann", "Once"]
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    random = SamplingParams(temperature=1, seed=7, max_tokens=12, ignore_eos=True)
    request = LoRARequest("test", 1, adapter)

    def answers(lora=request) -> dict:
        outputs = llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
        return {
            "prompts": [list(o.prompt_token_ids) for o in outputs],
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "logprobs": [o.outputs[0].cumulative_logprob for o in outputs],
        }

    def sampled() -> list[list[int]]:
        return [
            list(o.outputs[0].token_ids) for o in llm.generate(prompts, random, lora_request=request, use_tqdm=False)
        ]

    def call(method, *args):
        llm.reset_prefix_cache()
        return llm.collective_rpc(method, args=args)[0]

    def base() -> dict:
        folder = Path(model) if is_packed(model) else Path(model).with_name("packed")  # what it is the equal of
        return call("aqn_base", packed_modules(open_packed(folder)))

    order = {"step": 4, "seed": 0, "sigma": 0.3, "unit": "rms"}
    result = {"loaded": answers(), "prepared": call("aqn_prepare", order), "base": base(), "clean": answers()}
    result["clean sampled"] = sampled()
    result["adapter"] = call("aqn_adapter")
    result["without"] = answers(lora=None)
    result["silence"] = call("aqn_apply_noise", order | {"sigma": 0.0})
    result["silent"], result["silent sampled"] = answers(), sampled()
    result["noise"] = call("aqn_apply_noise", order)
    result["noisy"] = answers()
    result["restored"] = call("aqn_restore")
    result["after"] = answers()
    if result["base"]["form"] == "packed":
        llm.collective_rpc(save_shard, args=(out,))
        linear = order | {"sigma": 0.3, "targets": ["linear"]}
        result["linear"] = call("aqn_apply_noise", linear)
        result["linear_base"], result["linear_noisy"] = base(), answers()
        result["linear_restored"] = call("aqn_restore")
        result["base_after"], result["linear_after"] = base(), answers()
    return result


if __name__ == "__main__":
    answer = main(*sys.argv[1:])
    print("RESULT " + json.dumps(answer))
