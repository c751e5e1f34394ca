"""`python -m tests.memory.actor CONFIG.yaml`: the actor of a resolved recipe, alone, through one RL step.

verl builds the engine from the config as in a run, but the tokens are random instead of sampled. The step computes
log-probs with entropies of a mini-batch as large as the recipe allows. Two updates follow, so that the second one has
Adam's moments and gradients at the same time. Prints RESULT and the peaks (VmHWM, bytes) after each phase.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.engine.base import EngineRegistry

import verl_aqn.integrations.verl.engine  # noqa: F401  registers the engine
from verl_aqn.preflight.peak import peak_bytes


def batch(config, samples: int) -> TensorDict:
    """Return a mini-batch whose prompts and responses all have the recipe's maximum length."""
    n, prompt, response = (
        int(config.actor_rollout_ref.rollout.n), int(config.data.max_prompt_length),
        int(config.data.max_response_length),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1000, (prompt,), generator=generator) for _ in range(-(-samples // n))]
    prompts = [prompts[i // n] for i in range(samples)]
    responses = [torch.randint(3, 1000, (response,), generator=generator) for _ in range(samples)]

    def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    mask = [torch.cat([torch.zeros(prompt), torch.ones(response)]) for _ in range(samples)]
    return TensorDict(
        {
            "input_ids": jagged(whole),
            "position_ids": jagged([torch.arange(len(row)) for row in whole]),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "loss_mask": jagged(mask),
            "temperature": torch.full((samples,), float(config.actor_rollout_ref.rollout.temperature)),
        },
        batch_size=[samples],
    )


def loss(model_output, data, dp_group):
    """Compute a loss as light as PPO's, which holds a few floats per token."""
    return -model_output["log_probs"].values().sum() * 1e-3, {}


def main(path: Path) -> None:
    config = OmegaConf.load(path)
    found = {"imports": peak_bytes()}
    actor = config.actor_rollout_ref.actor
    torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    actor_config = omega_conf_to_dataclass(actor)
    actor_config.engine.max_token_len_per_gpu = int(actor.ppo_max_token_len_per_gpu)  # as verl's worker does
    engine = EngineRegistry.new(
        model_type="language_model",
        backend=actor.strategy,
        model_config=(model_config := omega_conf_to_dataclass(config.actor_rollout_ref.model, HFModelConfig)),
        engine_config=actor_config.engine,
        optimizer_config=actor_config.optim,
        checkpoint_config=actor_config.checkpoint,
    )
    engine.model_config.model_type = "language_model"
    engine.initialize()
    found["loaded"] = peak_bytes()
    n = int(config.actor_rollout_ref.rollout.n)
    common = {
        "use_remove_padding": model_config.use_remove_padding,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": int(actor.ppo_max_token_len_per_gpu),
        "use_fused_kernels": False,
    }
    with engine.eval_mode():
        data = batch(config, int(config.data.train_batch_size) * n)
        tu.assign_non_tensor(data, **common, calculate_entropy=True)
        engine.infer_batch(data)
    found["log_probs"] = peak_bytes()
    with engine.train_mode():
        for _ in range(2):
            data = batch(config, int(actor.ppo_mini_batch_size) * n)
            tu.assign_non_tensor(data, **common, calculate_entropy=False)
            engine.train_batch(data, loss)
    found["update"] = peak_bytes()
    print("RESULT " + json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main(Path(sys.argv[1]))
