"""Adapters as users bring them: random adapters saved by PEFT, and the actor's engine with them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 8, "j_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.k_proj": 64, r".*\.down_proj": 3},
}
SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 8, "use_rslora": True},
    "patterns": PATTERNS,
    "rslora with patterns": PATTERNS | {"use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.0\..*_proj"},
    "fan in fan out": {"fan_in_fan_out": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.3},
    "no task": {"task_type": None},
}


def write_adapter(
    folder: Path, base: Path | PreTrainedModel, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Save a random PEFT adapter for a model, or for the bf16 model in a folder."""
    torch.manual_seed(5)
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16) if isinstance(base, Path) else base
    peft = get_peft_model(model, LoraConfig(**{**defaults, **settings}))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32).mul_(0.08).to(dtype)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def built(base: Path, folder: Path, rank: int) -> Any:
    """Return verl's engine with the adapter on the base, built as in a run."""
    engine = bare(base, rank)
    engine.model_config.lora_adapter_path = str(folder)
    engine.module = engine._build_lora_module(engine._build_module())
    return engine


def bare(base: Path, rank: int) -> Any:
    """Return verl's engine without a model, with only what sending an adapter needs."""
    from tests.helpers.engines import bare_engine
    from verl_aqn.integrations.verl.engine import AqnFSDPEngine

    engine: Any = bare_engine(AqnFSDPEngine, base, {})
    engine.model_config.lora_rank = rank
    engine.model_config.lora, engine.model_config.use_shm = {}, False
    engine._uses_fsdp2_cpu_offload_policy = True
    engine._is_offload_param = engine._qat_enabled = False
    return engine


def sent(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what the engine sends to the rollout: tensors and their config."""
    with patch("verl.workers.engine.fsdp.transformer_impl.log_gpu_memory_usage"):  # there is no GPU
        tensors, config = engine.get_per_tensor_param(base_sync_done=True)
    return dict(tensors), config
