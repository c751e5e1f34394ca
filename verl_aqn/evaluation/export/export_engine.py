"""Requests to vLLM for responses and log-probabilities, in a process that ends before the call returns."""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cluster.process_environment import engine_environment
from verl_aqn.config.serving import served_rank
from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs.processes import start_module

TIMEOUT_S = 3600


def ask_vllm(
    config: DictConfig,
    model: Path,
    adapters: Sequence[Path | None],
    prompts: list[list[int]],
    expected: list[str],
    scored: list[list[int]],
    *,
    of_run: bool,
) -> list[dict[str, Any]]:
    """Run an engine with the settings of the run ``config`` on ``model`` with each of ``adapters``.

    See `verl_aqn.integrations.vllm.greedy_answers` for the arguments and the result (its `said`). ``of_run``: whether
    ``model`` is the base in the rollout weight format of the run, and not a merged model.

    Raises:
        EnvironmentFault: the engine did not start or did not respond; the message ends with the last line of its log.
    """
    # A short path, because sockets are created below it and their paths are limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="aqn-", dir="/tmp") as temporary:
        request, result, log = (Path(temporary) / name for name in ("request.json", "result.json", "engine.log"))
        question = {
            "model": str(model),
            "adapters": [str(adapter) if adapter else None for adapter in adapters],
            "rank": served_rank(int(config.actor_rollout_ref.model.lora_rank)),
            "engine": engine_options(config, merged=not of_run),
            "max_tokens": int(config.actor_rollout_ref.rollout.response_length),
            "prompts": prompts,
            "expected": expected,
            "scored": scored,
        }
        request.write_text(json.dumps(question))
        process = start_module(
            "verl_aqn.integrations.vllm.greedy_answers", [request, result], environment(config, temporary), log
        )
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise EnvironmentFault(f"vLLM did not respond to {len(prompts)} prompts in {TIMEOUT_S} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the process has its own group, with all ranks of the engine
                process.wait()
        if process.returncode or not result.is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise EnvironmentFault(
                f"vLLM exited with code {process.returncode} on {model}: {lines[-1][:400] if lines else 'no output'}"
            )
        return json.loads(result.read_text())["said"]


def engine_options(config: DictConfig, *, merged: bool) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`: those of the run's rollout, so that its responses can be reproduced.

    They include this project's worker extension, with which norms are kept in fp32; with bf16 norms 6 of 192 responses
    of SmolLM2-135M change. A merged model has no packed layer, so the options for packed layers are left out.
    """
    rollout = config.actor_rollout_ref.rollout
    special: Any = OmegaConf.to_container(rollout.engine_kwargs.get("vllm") or OmegaConf.create({}), resolve=True)
    if merged:
        for key in ("additional_config", "linear_backend", "quantization"):
            special.pop(key, None)
    cpu = config.aqn.profile == "cpu"
    options = {
        "dtype": rollout.dtype,
        "max_model_len": rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "enforce_eager": rollout.enforce_eager,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "tensor_parallel_size": 1 if cpu else rollout.tensor_model_parallel_size,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "trust_remote_code": config.actor_rollout_ref.model.trust_remote_code,
    }
    return {key: value for key, value in (options | special).items() if value is not None}


def environment(config: DictConfig, temporary: str) -> dict[str, str]:
    """Return the environment of the engine's process, which runs the engine core in the same process."""
    env = engine_environment(temporary, cpu=config.aqn.profile == "cpu", ranks=1)
    env.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
    return env
