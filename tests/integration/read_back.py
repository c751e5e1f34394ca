"""`python -m tests.integration.read_back MODEL ADAPTER`: vLLM's weights of both and its responses, as a JSON line.

This runs in its own process, because an engine sets up its process only once.
"""

import json
import sys
from pathlib import Path


def main(model: str, adapter: str) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from verl_aqn.checkpoints.loading import open_packed, packed_modules

    llm = LLM(
        model,
        max_model_len=64,
        block_size=32,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        worker_extension_cls="verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension",
    )
    prompt = list(range(5, 45))
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = LoRARequest("test", 1, adapter)
    answer = llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request, use_tqdm=False)[0]
    return {
        "prompt": prompt,
        "logprobs": [next(iter(token.values())).logprob for token in answer.prompt_logprobs[1:]],
        "base": llm.collective_rpc("aqn_base", args=(packed_modules(open_packed(Path(model))),))[0],
        "adapter": llm.collective_rpc("aqn_adapter")[0],
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
