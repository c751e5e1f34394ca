"""`python -m verl_aqn.vllm_api.answers REQUEST RESULT`: greedy answers of stock vLLM to prompts, for `verl-aqn export`.

A process of its own, since an engine sets up its process for good. REQUEST and RESULT are JSON files:

request: `model`, `adapter` (a PEFT folder or null), `rank` (of its slot), `engine` (arguments of `vllm.LLM`),
`max_tokens`, `prompts` [[token, …], …], and `expected` texts, one for each prompt.
result: `answers`, for each prompt {"tokens", "text"}, and "tops" where the text is not the expected one: for each token
of the answer the likeliest tokens at its place, {token: log-probability}.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOPS = 20  # what vLLM gives without being asked to allow more


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy answers to ``request["prompts"]``; see the module."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = dict(request["engine"])
    if request["adapter"]:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": request["rank"]}
    llm = LLM(request["model"], **options)
    result = llm.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=TOPS),
        lora_request=LoRARequest("export", 1, request["adapter"]) if request["adapter"] else None,
        use_tqdm=False,
    )
    tokenizer = llm.get_tokenizer()
    found = []
    for output, expected in zip(result, request["expected"], strict=True):
        tokens = list(output.outputs[0].token_ids)
        answer: dict[str, Any] = {"tokens": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=True)}
        if answer["text"] != expected:
            places = output.outputs[0].logprobs or []
            answer["tops"] = [{token: entry.logprob for token, entry in place.items()} for place in places]
        found.append(answer)
    return found


if __name__ == "__main__":
    given, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps({"answers": answers(json.loads(given.read_text()))}))
