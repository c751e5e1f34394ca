"""An engine of vLLM in this process whose decode steps are timed."""

import os
import time
from pathlib import Path
from typing import Any

EXTENSION = "verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension"


class Engine:
    """An engine with one adapter, and with norms as in a run: in float32, so that they can carry noise.

    Args:
        model: folder of the model.
        adapter: folder of a PEFT adapter, which every request uses.
        sequences: the most sequences at once.
        length: the most tokens of a prompt and its response.
        rank: of the adapter.
    """

    def __init__(self, model: Path, adapter: Path, sequences: int, length: int, rank: int):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._engine: Any = LLM(
            str(model),
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=length,
            max_num_seqs=sequences,
            gpu_memory_utilization=0.1,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=rank,
            enable_prefix_caching=False,
            worker_extension_cls=EXTENSION,
        ).llm_engine
        self._adapter = LoRARequest("adapter", 1, str(adapter))

    def decode(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """Sample ``tokens`` tokens after each prompt; return the seconds of each step in which all get one token."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=1.0, seed=0, max_tokens=tokens + 2, ignore_eos=True)
        for prompt in prompts:
            name = f"{time.monotonic_ns()}"
            self._engine.add_request(name, {"prompt_token_ids": prompt}, asked, lora_request=self._adapter)
        while self._engine.engine_core.engine_core.scheduler.waiting:
            self._engine.step()
        times = []
        while self._engine.has_unfinished_requests():
            begun = time.perf_counter()
            self._engine.step()
            times.append(time.perf_counter() - begun)
        return times[2:]
