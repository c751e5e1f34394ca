"""Greedy responses of stock vLLM, for `verl-aqn export`.

Use: `python -m verl_aqn.integrations.vllm.greedy_answers REQUEST RESULT`.

It runs in its own process, because the setup of an engine cannot be undone in a process. REQUEST and RESULT are JSON
files.

Fields of the request: `model`; `adapters`, a list of PEFT folders, with null for the model without an adapter (every
entry gets all prompts); `rank`, the maximum LoRA rank; `engine`, arguments of `vllm.LLM`; `max_tokens`; `prompts`
[[token, …], …]; `expected`, a text for each prompt; and `scored`, for each prompt the tokens of a response whose
log-probabilities are wanted (may be empty).

The result has one field `said`: for each of `adapters` {"answers", "logprobs"}. `answers`: for each prompt {"tokens",
"text"}, and also "tops" if the text is not the expected one: for each token of the response the most likely tokens at
its position, {token: log-probability}. `logprobs`: for each prompt the log-probabilities of its scored tokens, as many
as fit into the engine's context.
"""

import json
import sys
from pathlib import Path
from typing import Any

TOPS = 20  # the most that vLLM returns by default (max_logprobs)


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the responses and log-probabilities of the model with each of ``request["adapters"]``.

    The format is that of `said` in the module's docstring.
    """
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

    # vLLM generates one token after the scored ones, so the context needs room for it.
    room = llm.llm_engine.model_config.max_model_len - 1
    requests = {
        number: (prompt, [*prompt, *answer][:room])
        for number, (prompt, answer) in enumerate(zip(request["prompts"], request["scored"], strict=True))
        if answer
    }
    found: list[list[float]] = [[] for _ in request["prompts"]]
    if not requests:
        return found
    prompts = [{"prompt_token_ids": ids} for _, ids in requests.values()]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    result = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    for (number, (prompt, ids)), output in zip(requests.items(), result, strict=True):
        places = zip(ids[len(prompt) :], output.prompt_logprobs[len(prompt) :], strict=True)
        found[number] = [place[token].logprob for token, place in places]
    return found


if __name__ == "__main__":
    given, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps({"said": answers(json.loads(given.read_text()))}))
