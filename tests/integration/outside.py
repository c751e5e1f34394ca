"""`python -m tests.integration.outside MODEL SENT`: log-probs of vLLM with adapters as the actor sends them.

SENT is a file of `torch.save`: {"tokens": [[token, …], …], "adapters": {name: (tensors, config)}}. The output is one
JSON line: {name: {"logprobs": of every token but the first of each line, "digest": of what the engine holds}}.
"""

import json
import sys
from typing import Any

import torch


def main(model: str, file: str) -> dict[str, Any]:
    from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    given = torch.load(file)
    llm = LLM(
        model,
        max_model_len=64,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        enable_prefix_caching=False,
        worker_extension_cls="verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension",
    )
    request = LoRARequest(VLLM_LORA_NAME, VLLM_LORA_INT_ID, VLLM_LORA_PATH)
    found = {}
    for name, (tensors, config) in given["adapters"].items():
        llm.collective_rpc("remove_lora", args=(VLLM_LORA_INT_ID,))
        llm.collective_rpc("_update_weights", args=(list(tensors.items()), config, True))
        outputs = llm.generate(
            [{"prompt_token_ids": line} for line in given["tokens"]],
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            lora_request=request,
            use_tqdm=False,
        )
        logprobs = []
        for output, line in zip(outputs, given["tokens"], strict=True):
            places = list(zip(line, output.prompt_logprobs or [], strict=True))[1:]
            logprobs.append([place[token].logprob for token, place in places if place])
        digest = llm.collective_rpc("aqn_adapter")[0]["adapter_digest"]
        found[name] = {"logprobs": logprobs, "digest": digest}
    return found


if __name__ == "__main__":
    answer = main(*sys.argv[1:])
    print("RESULT " + json.dumps(answer))
