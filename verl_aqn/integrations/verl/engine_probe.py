"""vLLM's engine as a run's rollout has it, without the run (`verl-aqn selftest`, `verl-aqn bench decode`).

It gets adapters as in a sync.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """A prompt, the response's tokens, and the log-probs of all tokens but the first, prompt and response in turn."""

    prompt: list[int]
    tokens: list[int]
    of_prompt: list[float]
    of_tokens: list[float]


class EngineProbe:
    """An engine with this project's worker extension. `options`: arguments of `vllm.LLM`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        began = time.monotonic()
        self.llm = LLM(model, **options)
        self.start_s = time.monotonic() - began

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of the worker extension on every rank."""
        self.llm.reset_prefix_cache()
        return self.llm.collective_rpc(method, args=arguments)

    def send(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> float:
        """Replace the adapter as a sync of verl does, without the way between two processes. Return the seconds."""
        from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID

        began = time.monotonic()
        self.llm.collective_rpc("remove_lora", args=(VLLM_LORA_INT_ID,))
        self.llm.collective_rpc("_update_weights", args=(list(tensors.items()), config, True))
        return time.monotonic() - began

    def answers(self, prompts: Sequence[list[int]], tokens: int, *, adapter: bool) -> list[Answer]:
        """Generate `tokens` tokens greedily for each prompt, with all log-probs."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        self.llm.reset_prefix_cache()
        found = []
        for output in self.llm.generate(_ids(prompts), params, lora_request=_lora(adapter), use_tqdm=False):
            prompt, said = list(output.prompt_token_ids), output.outputs[0]
            before = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            after = zip(said.token_ids, said.logprobs, strict=True)
            found.append(
                Answer(
                    prompt,
                    list(said.token_ids),
                    [place[token].logprob for token, place in before],
                    [place[token].logprob for token, place in after],
                )
            )
        return found

    def tokens_per_second(self, batch: int, prompt: int, tokens: int) -> float:
        """Sample `tokens` tokens for each of `batch` prompts at once; return generated tokens per second."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1, seed=0, max_tokens=tokens, ignore_eos=True)
        self.llm.reset_prefix_cache()
        began = time.monotonic()
        outputs = self.llm.generate(_ids(_prompts(batch, prompt)), params, use_tqdm=False)
        seconds = time.monotonic() - began
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert made == batch * tokens, (made, batch, tokens)
        return made / seconds

    def decode_seconds(self, batch: int, prompt: int, tokens: int, adapter: Path) -> list[float]:
        """Return the seconds of `tokens` steps in each of which all of `batch` sequences get one token.

        `adapter`: a PEFT folder, which all sequences use. The engine must compute in this process.
        """
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        engine, lora = self.llm.llm_engine, LoRARequest("adapter", 1, str(adapter))
        params = SamplingParams(temperature=1, seed=0, max_tokens=tokens + 2, ignore_eos=True)
        for number, ids in enumerate(_ids(_prompts(batch, prompt))):
            engine.add_request(f"{time.monotonic_ns()}-{number}", ids, params, lora_request=lora)
        while engine.engine_core.engine_core.scheduler.waiting:
            engine.step()
        times = []
        while engine.has_unfinished_requests():
            began = time.monotonic()
            engine.step()
            times.append(time.monotonic() - began)
        return times[-tokens:]

    def sleep(self) -> None:
        """Put the engine to sleep at the level that a run uses, which keeps the weights."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        """Wake the engine up."""
        self.llm.wake_up()

    def compiled(self) -> dict[str, Any]:
        """Return what is compiled: `eager`, `graphs` (vLLM's mode), `captured` (their number), `passes` that are on."""
        from vllm.compilation.counter import compilation_counter

        config = self.llm.llm_engine.vllm_config
        compilation = config.compilation_config
        passes = {name: value for name, value in vars(compilation.pass_config).items() if isinstance(value, bool)}
        mode = getattr(compilation, "cudagraph_mode", None)
        return {
            "eager": bool(config.model_config.enforce_eager),
            "graphs": getattr(mode, "name", str(mode)),
            "captured": int(compilation_counter.num_cudagraph_captured),
            "passes": sorted(name for name, on in passes.items() if on),
        }


def _prompts(batch: int, length: int) -> list[list[int]]:
    return [[(7 * row + column) % 256 for column in range(length)] for row in range(batch)]


def _ids(prompts: Sequence[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def _lora(adapter: bool) -> Any:
    from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
    from vllm.lora.request import LoRARequest

    return LoRARequest(VLLM_LORA_NAME, VLLM_LORA_INT_ID, VLLM_LORA_PATH) if adapter else None
