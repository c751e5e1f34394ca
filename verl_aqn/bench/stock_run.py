"""Stock verl 0.9.1 on a CPU, which `bench step` compares with: `python -m verl_aqn.bench.stock_run CONFIG.yaml`.

It contains only what verl needs to run on a CPU at all: the platform (verl takes it from the plugin), its FSDP engine
registered for one, and a process group that torch accepts. verl imports this module as the model's external_lib.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_aqn.bench.step import SYNCED_LOG
from verl_aqn.integrations.verl.process_group import open_process_group


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class StockEngine(FSDPEngineWithLMHead):
    """verl's own engine, which also appends the bytes of each sync to the file named by `$SYNCED_LOG`."""

    def get_per_tensor_param(self, *args, **kwargs):
        params, peft_config = super().get_per_tensor_param(*args, **kwargs)
        return counted(params), peft_config


def counted(params: Iterator) -> Iterator:
    """Yield the parameters unchanged; after the last one, record their bytes."""
    sent = 0
    for name, tensor in params:
        sent += tensor.nbytes
        yield name, tensor
    with Path(os.environ[SYNCED_LOG]).open("a") as log:
        log.write(f"{sent}\n")


if "MASTER_PORT" in os.environ and __name__ != "__main__":
    open_process_group()


def main(path: str) -> None:
    """Run verl's `main_ppo` with a config that is already composed."""
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    run_ppo(OmegaConf.load(path), task_runner_class=TaskRunnerV1)


if __name__ == "__main__":
    main(sys.argv[1])
