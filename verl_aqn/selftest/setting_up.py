"""The model, the recipe and the engine that several rungs use: as in a run on this device, but small."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.cluster.process_environment import bind_cores
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import SERVED, prepare_serving
from verl_aqn.evaluation.export.export_engine import engine_options, environment
from verl_aqn.integrations.verl.engine_probe import EngineProbe
from verl_aqn.preflight.prepare import tell_workers
from verl_aqn.selftest import small_model
from verl_aqn.selftest.rung import Context

RECIPE = "e12_aggressive_1ep"
PROMPT, RESPONSE = 512, 32  # tokens, for the engine's limits
RANK, ALPHA = 8, 16
SEQUENCES = {"cpu": 32, "cuda": 256, "npu": 256}
UTILIZATION = {"cpu": 0.1, "cuda": 0.3, "npu": 0.3}


@dataclass(frozen=True)
class Served:
    """A packed base: the actor's folder `packed`, the folder that the rollout serves, and the recipe with both."""

    packed: Path
    served: Path
    config: DictConfig

    @property
    def form(self) -> str:
        """The form in which the rollout serves the base: "packed", "bf16" or "int8"."""
        return parse_aqn(self.config).mxfp4.rollout_weight_format

    @property
    def activation(self) -> str:
        """How actor and rollout round activations, "none" for W4A16."""
        return parse_aqn(self.config).mxfp4.activation_arithmetic


def overrides(device: str, model: Path) -> list[str]:
    """Return the overrides of the recipe that all rungs share."""
    return [
        f"profile={device}",
        "experiment=embedded",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.model.lora_rank={RANK}",
        f"actor_rollout_ref.model.lora_alpha={ALPHA}",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        f"actor_rollout_ref.rollout.max_model_len={PROMPT + RESPONSE + 1}",
        f"actor_rollout_ref.rollout.max_num_seqs={SEQUENCES[device]}",
        f"actor_rollout_ref.rollout.gpu_memory_utilization={UTILIZATION[device]}",
    ]


def serve(context: Context, sizes: dict[str, int] | None = None, form: str | None = None) -> Served:
    """Make a small model, pack it, and prepare it for the rollout as a run does.

    `sizes`: see `small_model.make`. `form`: "bf16" serves the packed base's values in bf16 on every device.
    """
    root = context.folder.parent / "models" / ("small" if sizes is None else "large")
    source, packed = small_model.make(root / "bf16", **sizes or {}), root / "packed"
    if not (packed / "config.json").is_file():
        quantize_checkpoint(source, packed)
    config = load_recipe(RECIPE, overrides(context.device, packed))
    if form is not None:
        config.aqn.mxfp4.rollout_weight_format = form
    prepare_serving(config)
    tell_workers(config)
    served = config.actor_rollout_ref.model.override_config.get(SERVED) or packed
    return Served(packed, Path(served), config)


def start(context: Context, base: Served, **options: Any) -> EngineProbe:
    """Start the engine of a run on `base` in this process. `options` replace those of the run."""
    ranks = int(options.get("tensor_parallel_size", 1))
    # TMPDIR is short and belongs to this rung (`climb`), as sockets need it.
    os.environ.update(environment(base.config, os.environ.get("TMPDIR", "/tmp")))
    if ranks > 1:
        if context.device == "cpu":
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind_cores(sorted(os.sched_getaffinity(0)), ranks)
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # adapters are sent to the ranks by a call
    rollout = base.config.actor_rollout_ref.rollout
    special = {"enable_sleep_mode": True} if context.device != "cpu" and rollout.enable_sleep_mode else {}
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}
    chosen = engine_options(base.config, merged=False) | lora | special | options
    if base.form == "bf16":
        chosen.pop("linear_backend", None)
    return EngineProbe(str(base.served), chosen)
