"""`python -m verl_aqn.integrations.vllm.greedy_answers REQUEST RESULT`: greedy answers of stock vLLM to prompts, for `verl-aqn export`.

A process of its own, since an engine sets up its process for good. REQUEST and RESULT are JSON files:

request: `model`, `adapters` (a list: PEFT folders, and null for the model alone; each is asked everything in turn),
`rank` (of their slot), `engine` (arguments of `vllm.LLM`), `max_tokens`, `prompts` [[token, …], …], for each prompt an
`expected` text, and `scored`, tokens of an answer whose probabilities are wanted (may be empty).
result: `said`, for each of `adapters` {"answers", "logprobs"}. `answers`: for each prompt {"tokens", "text"}, and
"tops" where the text is not the expected one: for each token of the answer the likeliest tokens at its place, {token:
log-probability}. `logprobs`: for each prompt the log-probabilities of its scored tokens, of as many as the engine's
context has room for.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOPS = 20  # what vLLM gives without being asked to allow more


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model says with each of ``request["adapters"]``; see the module."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    options, adapters = dict(request["engine"]), request["adapters"]
    if any(adapters):
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": request["rank"]}
    llm = LLM(request["model"], **options)
    said = []
    for number, adapter in enumerate(adapters, start=1):
        lora = LoRARequest(f"export-{number}", number, adapter) if adapter else None
        said.append({"answers": _generate(llm, request, lora), "logprobs": _score(llm, request, lora)})
    return said


def _generate(llm: Any, request: dict[str, Any], lora: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=TOPS)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    result = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
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


def _score(llm: Any, request: dict[str, Any], lora: Any) -> list[list[float]]:
    from vllm import SamplingParams

    # One token is made after those that are scored, and there must be room for it.
    room = llm.llm_engine.model_config.max_model_len - 1
    asked = {
        number: (prompt, [*prompt, *answer][:room])
        for number, (prompt, answer) in enumerate(zip(request["prompts"], request["scored"], strict=True))
        if answer
    }
    found: list[list[float]] = [[] for _ in request["prompts"]]
    if not asked:
        return found
    prompts = [{"prompt_token_ids": ids} for _, ids in asked.values()]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    result = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    for (number, (prompt, ids)), output in zip(asked.items(), result, strict=True):
        places = zip(ids[len(prompt) :], output.prompt_logprobs[len(prompt) :], strict=True)
        found[number] = [place[token].logprob for token, place in places]
    return found


if __name__ == "__main__":
    given, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps({"said": answers(json.loads(given.read_text()))}))
