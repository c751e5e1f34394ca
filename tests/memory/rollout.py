"""`python -m tests.memory.rollout CONFIG.yaml`: the rollout of a resolved recipe, alone, with a full cache.

vLLM's engine runs in this process with the recipe's settings, worker extension and an adapter. It answers as many
prompts at once as the recipe allows. Prints RESULT and the peaks (VmHWM, bytes) after each phase.
"""

import json
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

from verl_aqn.evaluation.export.export_engine import engine_options
from verl_aqn.preflight.peak import peak_bytes


def adapter(model: str, rank: int, alpha: int) -> str:
    """Write a new PEFT adapter for every linear layer of `model` into a folder."""
    from peft import LoraConfig, get_peft_model

    from verl_aqn.checkpoints.loading import load_model

    folder = tempfile.mkdtemp(prefix="aqn-adapter-")
    peft = get_peft_model(load_model(model), LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    peft.save_pretrained(folder)
    return folder


def main(path: Path, folder: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    config = OmegaConf.load(path)
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    found = {"imports": peak_bytes()}
    options = engine_options(config, merged=False)
    engine = LLM(
        model.path, load_format="auto", enable_lora=True, max_loras=1, max_lora_rank=model.lora_rank, **options
    )  # fmt: skip
    found["loaded"] = peak_bytes()
    length, response = options["max_model_len"], int(config.data.max_response_length)
    prompts = [
        {"prompt_token_ids": [3 + (7 * i + j) % 1000 for j in range(length - response)]}
        for i in range(2 * int(rollout.max_num_seqs))
    ]
    parameters = SamplingParams(max_tokens=response, ignore_eos=True, temperature=1.0, logprobs=0)
    engine.generate(prompts, parameters, lora_request=LoRARequest("adapter", 1, folder), use_tqdm=False)
    found["answered"] = peak_bytes()
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:  # the adapter is made in a separate process, whose memory is not counted
        import subprocess

        config = OmegaConf.load(sys.argv[1])
        model = config.actor_rollout_ref.model
        given = f"{model.path!r}, {model.lora_rank}, {model.lora_alpha}"
        code = f"from tests.memory.rollout import adapter; print(adapter({given}))"
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        sys.argv.append(made.stdout.split()[-1])
    main(Path(sys.argv[1]), sys.argv[2])
