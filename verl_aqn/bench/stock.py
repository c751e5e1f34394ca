"""verl 0.9.1 as it is, on a CPU: `python -m verl_aqn.bench.stock CONFIG.yaml`. What `bench step` compares with.

Nothing of ours is in it but what verl lacks to run on a CPU at all: the platform (verl takes it from the plugin), its
FSDP engine registered for one, and a process group that torch accepts. verl imports this as the model's external_lib.
"""

import os
import sys

from omegaconf import OmegaConf
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_aqn.verl_api.process_group import open_process_group


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class StockEngine(FSDPEngineWithLMHead):
    """verl's own engine."""


if "MASTER_PORT" in os.environ and __name__ != "__main__":
    open_process_group()


def main(path: str) -> None:
    """As verl's `main_ppo`, with a config that is composed already."""
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    run_ppo(OmegaConf.load(path), task_runner_class=TaskRunnerV1)


if __name__ == "__main__":
    main(sys.argv[1])
