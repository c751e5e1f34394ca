"""The places where `verl_aqn.stock` hooks into stock verl: the order of verl's actions, and what it rejects by name."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.stock_config import composed

INSTALL = """
import sys
{before}
import verl_aqn.stock
from types import SimpleNamespace
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base
from tests.helpers.stock_config import composed
{after}
"""


def said(before: str, after: str) -> tuple[int, str]:
    """Return exit code and last line of a process that imports the option."""
    env = {**os.environ, "VERL_PLATFORM": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = INSTALL.format(before=before, after=after)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    told = result.stderr if result.returncode else result.stdout
    return result.returncode, told.strip().splitlines()[-1]


def test_the_option_is_imported_after_the_trainer_is_made_and_before_its_data():
    from verl.trainer.main_ppo import TaskRunnerV1
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.workers.config.model import HFModelConfig

    run = inspect.getsource(TaskRunnerV1.__ray_metadata__.modified_class.run)
    assert run.index("trainer_cls(config=config)") < run.index("self.trainer.init()")
    setup = inspect.getsource(PPOTrainer._setup)
    order = ["self._init_tokenizer()", "self._init_dataloader()", "self._init_resource_pool_mgr()", "init_model()"]
    assert [setup.index(one) for one in order] == sorted(setup.index(one) for one in order)
    assert "omega_conf_to_dataclass(self.config.actor_rollout_ref.model)" in inspect.getsource(
        PPOTrainer._init_tokenizer
    )
    assert "import_external_libs(self.external_lib)" in inspect.getsource(HFModelConfig.__post_init__)


def test_requests_get_the_adapter_where_the_engine_lists_it():
    """`listed` and the counted requests depend on this."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    source = inspect.getsource(vLLMHttpServer.generate)
    assert "VLLM_LORA_INT_ID in await self.engine.list_loras()" in source
    assert "self.engine.generate(" in source
    assert "lora_request=lora_request" in source


def test_a_trainer_of_verl_becomes_a_checked_one():
    after = """
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl_aqn.integrations.verl.stock_hook import become_checked
trainer = PPOTrainerSync.__new__(PPOTrainerSync)
trainer.config = composed("+verl_aqn.on_fault=warn")
become_checked(trainer)
rollout = trainer.config.actor_rollout_ref.rollout
print(type(trainer).__name__, trainer.settings.on_fault, rollout.load_format, rollout.calculate_log_probs,
      rollout.engine_kwargs.vllm.worker_extension_cls)
"""
    wanted = "StockTrainer warn safetensors True verl_aqn.integrations.verl.worker_extension.StockWorkerExtension"
    assert said("import verl.trainer.ppo.v1", after) == (0, wanted)


def test_another_trainer_is_refused():
    after = """
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl_aqn.integrations.verl.stock_hook import become_checked
class Mine(PPOTrainerSync):
    pass
trainer = Mine.__new__(Mine)
trainer.config = composed()
become_checked(trainer)
"""
    code, line = said("import verl.trainer.ppo.v1", after)
    assert code == 1
    assert "verl_aqn.stock checks verl's own synchronous trainer, not Mine" in line


def test_the_older_trainer_is_refused():
    code, line = said("sys.modules['verl.trainer.main_ppo_v0'] = sys", "")
    assert code == 1
    assert "cannot check verl's older trainer: set trainer.use_v1=true" in line


REFUSED = {
    "trainer.v1.trainer_mode=separate_async": "trainer.v1.trainer_mode=separate_async: set it to sync",
    "trainer.v1.trainer_mode=colocate_async": "trainer.v1.trainer_mode=colocate_async: set it to sync",
    "actor_rollout_ref.actor.strategy=fsdp_turbo": "actor.strategy=fsdp_turbo: set it to fsdp or fsdp2",
    "actor_rollout_ref.rollout.name=sglang": "rollout.name=sglang: set it to vllm",
    "actor_rollout_ref.model.lora.merge=true": "model.lora.merge=True: set it to false: merged weights have no adapter",
    "actor_rollout_ref.model.lora_rank=0": "model.lora_rank=0: set it to 1 or more: a sync of full weights",
    "actor_rollout_ref.rollout.quantization=fp8": "rollout.quantization=fp8: set it to null",
    "actor_rollout_ref.rollout.data_parallel_size=2": "rollout.data_parallel_size=2: set it to 1",
    "actor_rollout_ref.rollout.pipeline_model_parallel_size=2": "pipeline_model_parallel_size=2: set it to 1",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=mine.Worker": "mine.Worker: set it to null",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_checked_is_refused_by_its_key(override):
    from verl_aqn.config.stock_settings import check_supported
    from verl_aqn.errors import ConfigError

    check_supported(composed())
    with pytest.raises(ConfigError) as refused:
        check_supported(composed(override))
    assert REFUSED[override] in str(refused.value)
    assert "remove actor_rollout_ref.model.external_lib" in str(refused.value)


def test_the_steps_that_are_looked_at_without_the_adapter():
    from verl_aqn.integrations.verl.stock_trainer import StockTrainer

    def steps(*overrides: str) -> list[int]:
        trainer = StockTrainer.__new__(StockTrainer)
        trainer.config, trainer.total_training_steps, found = composed(*overrides), 11, []
        for trainer.global_steps in range(1, 12):
            found += [trainer.global_steps] if trainer.looks_at_use() else []
        return found

    assert steps() == [2, 4, 8, 11]
    assert steps("actor_rollout_ref.rollout.top_p=0.9") == []


def test_what_the_adapter_does_is_told_from_what_kernels_do():
    from verl_aqn.integrations.verl.stock_trainer import use_of_adapter
    from verl_aqn.runs.judge.stock_records import StockJudge, is_visible

    torch.manual_seed(0)
    shape = (8, 16)
    mask = torch.rand(shape) > 0.2
    base = -3 * torch.rand(shape)
    adapted = base + torch.randn(shape)
    for rollout, good in ((adapted, True), (base, False)):
        told = rollout + 0.01 * torch.randn(shape)
        data = {"response_mask": mask, "old_log_probs": adapted, "rollout_log_probs": told}
        record = {"kind": "adapter use", "step": 2, **use_of_adapter(data, base)}
        assert record["tokens"] == int(mask.sum())
        assert is_visible(record)
        judge = StockJudge()
        judge._attempt = {("placed",), ("base", "start"), ("adapter", 0)}
        assert (judge.add(record) is None) == good


NORMS = """
import os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from tests.helpers.vllm_models import config_of, start
from verl_aqn.tasks.smollm2 import tiny_model
from verl_aqn.config.stock_settings import EXTENSION
from verl_aqn.integrations.vllm import vllm_plugin as plugin

plugin.register()
with TemporaryDirectory() as folder:
    model_folder = tiny_model(Path(folder) / "tiny")
    for extension in (EXTENSION, "verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension"):
        config = config_of(model_folder)
        config.parallel_config.worker_extension_cls = extension
        with set_current_vllm_config(config):
            start(Path(folder))
            model = DefaultModelLoader(config.load_config).load_model(config, config.model_config)
        dtypes = {str(parameter.dtype) for name, parameter in model.named_parameters() if "norm" in name}
        print("RESULT", bool(model.aqn_loaded.sources), hasattr(model, "aqn_injector"), *dtypes, flush=True)
os._exit(0)
"""


def test_the_model_of_a_stock_run_is_watched_and_its_norms_are_left_alone():
    pytest.importorskip("vllm")
    env = {**os.environ, "VERL_PLATFORM": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env["VLLM_LOGGING_LEVEL"] = "ERROR"
    result = subprocess.run([sys.executable, "-c", NORMS], env=env, capture_output=True, text=True, check=False)
    told = [line for line in result.stdout.splitlines() if line.startswith("RESULT")]
    assert told == ["RESULT True False torch.bfloat16", "RESULT True True torch.float32"], result.stderr[-2000:]
