"""`python -m tests.integration.stock MODEL ADAPTER PROMPT`: vLLM's most likely tokens after PROMPT, as a JSON line.

PROMPT is a list of tokens. This module imports nothing of this project; `ours` lists the project's modules that are
loaded nevertheless.
"""

import json
import sys


def main(model: str, adapter: str, prompt: str) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model,
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        enable_lora=True,
        max_lora_rank=32,
        max_loras=1,
    )
    (output,) = llm.generate(
        [{"prompt_token_ids": json.loads(prompt)}],
        SamplingParams(temperature=0, max_tokens=1, logprobs=20),
        lora_request=LoRARequest("exported", 1, adapter),
        use_tqdm=False,
    )
    (place,) = output.outputs[0].logprobs
    return {
        "tops": {token: entry.logprob for token, entry in place.items()},
        "ours": [name for name in sys.modules if name.partition(".")[0] == "verl_aqn"],
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
