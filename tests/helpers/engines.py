"""verl's engines without their start: no process group and no FSDP, only the code that builds the module."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl_aqn.integrations.verl.packed_base import PackedBase


def bare_engine(cls: type[PackedBase], model: Path, told: dict[str, Any], seed: int = 0) -> PackedBase:
    """Return an engine of class `cls` that has not built anything yet; `told` is the model's override_config."""
    engine = cls.__new__(cls)
    engine.use_remove_padding, engine.ulysses_sequence_parallel_size = False, 1
    engine.engine_config = SimpleNamespace(forward_only=False, seed=seed)
    engine.model_config = SimpleNamespace(
        local_path=str(model),
        override_config=told,
        enable_gradient_checkpointing=False,
        lora_adapter_path=None,
        lora_rank=8,
        lora_alpha=16,
        target_modules="all-linear",
        target_parameters=None,
        exclude_modules=None,
    )
    return engine
