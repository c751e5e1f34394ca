"""Every place of verl 0.9.1 that the plugin hooks into. A failure here names what a new verl has changed."""

import ast
import importlib
import importlib.util
import inspect
import re
from importlib.metadata import entry_points
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import verl_aqn
from verl_aqn.config.allowed import STRATEGIES
from verl_aqn.config.trackers import LOGGERS
from verl_aqn.launch import watchdog

# Names imported inside functions, or called with named parameters. Overrides are found in the code (below).
SYMBOLS = {
    "verl.plugin.platform.platform_manager:PlatformRegistry.register": ["platform"],
    "verl.plugin.platform.platform_manager:PlatformRegistry.get": ["name"],
    "verl.models.transformers.monkey_patch:apply_monkey_patch": ["model", "use_remove_padding", "ulysses_sp_size"],
    "verl.utils.tensordict_utils:get_non_tensor_data": ["data", "key", "default"],
    "verl.workers.engine.base:EngineRegistry.register": ["model_type", "backend", "device", "vendor"],
    "verl.workers.rollout.replica:RolloutReplicaRegistry.register": ["name", "loader"],
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.clear_kv_cache": ["self"],
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.get_server_address": ["self"],
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.generate": [
        "self",
        "prompt_ids",
        "sampling_params",
        "request_id",
    ],
    "verl.trainer.constants_ppo:get_ppo_ray_runtime_env": [],
    "verl.trainer.main_ppo:run_ppo": ["config", "task_runner_class"],
    "verl.trainer.main_ppo:TaskRunnerV1": None,
    "verl.trainer.ppo.utils:need_critic": None,
    "verl.trainer.ppo.utils:need_reference_policy": None,
    "verl.trainer.ppo.v1:AgentLoopManagerTQ.create": None,
    "verl.utils.config:validate_config": ["config", "use_reference_policy", "use_critic"],
}


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbol_exists_with_its_parameters(symbol):
    module, _, path = symbol.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    wanted = SYMBOLS[symbol]
    if wanted is not None:
        parameters = inspect.signature(inspect.unwrap(found)).parameters
        assert set(wanted) <= set(parameters), list(parameters)


def from_verl(cls):
    """Return verl's classes that one of our classes inherits from, the nearest one first."""
    return [base for base in getattr(cls, "__mro__", ()) if base.__module__.startswith("verl.")]


def overrides():
    """Return `(class, method)` of each `super().method(…)` in a class that inherits from one of verl's."""
    for file in sorted(Path(verl_aqn.__file__).parent.glob("integrations/verl/*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                cls = getattr(importlib.import_module(f"verl_aqn.integrations.verl.{file.stem}"), node.name)
                methods = re.findall(r"\bsuper\(\)\.(\w+)", ast.unparse(node)) if from_verl(cls) else []
                yield from ((cls, method) for method in methods)


def test_overrides_are_of_methods_of_verl_and_take_what_those_take():
    found = set(overrides())
    assert len(found) > 30
    for cls, method in found:
        name = f"{cls.__name__}.{method}"
        assert method in vars(cls), f"{name} does not override what it calls"
        theirs = next((base for base in from_verl(cls) if method in vars(base)), None)
        assert theirs, f"{name}: verl has none"
        ours, verls = (inspect.signature(getattr(owner, method)).parameters for owner in (cls, theirs))
        verls = [name for name in verls if name != "_ray_trace_ctx"]  # Ray adds it to a class that is made an actor
        takes_all = {parameter.kind for parameter in ours.values()} >= {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
        assert takes_all or list(ours)[: len(verls)] == verls, f"{name}{[*ours]}: verl's takes {verls}"


def test_plugin_is_the_cpu_platform_after_importing_verl():
    import verl  # noqa: F401
    from verl.plugin.platform.platform_manager import PlatformRegistry

    from verl_aqn.integrations.verl.platform_cpu import PlatformCPU

    assert PlatformRegistry.get("cpu") is PlatformCPU


def test_cpu_platform_answers_every_abstract_method():
    from verl_aqn.integrations.verl.platform_cpu import PlatformCPU

    assert not getattr(PlatformCPU, "__abstractmethods__", None)
    assert PlatformCPU().is_ipc_supported() is False


@pytest.mark.parametrize("group", ["verl.plugins", "vllm.general_plugins"])
def test_entry_points_load(group):
    (entry,) = entry_points(group=group, name="verl_aqn")
    entry.load()


def test_hooks_surround_step_and_validation_in_the_order_we_rely_on():
    """on_step_begin before the rollout, on_step_end (sync) after the update, validation after that."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer.fit)
    loop = source[source.index("while current_epoch") :]
    order = [
        "self.on_step_begin()",
        "self.step(metrics",
        "self._save_checkpoint()",
        "self.on_step_end()",
        "self.on_validate_begin()",
        "self._validate()",
        "self._compute_metrics(",
    ]
    positions = [loop.index(text) for text in order]
    assert positions == sorted(positions)
    assert source.index("self.on_validate_begin()") < source.index("while current_epoch")


def test_a_validation_dumps_its_answers_once_and_before_its_metrics():
    """At this point math-verify's column is added, and the fractions for the record of the validation are computed."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer._validate)
    assert source.count("self._dump_generations(") == 1
    assert "dump_path=val_data_dir" in source
    assert source.index("self._dump_generations(") < source.index("return self._val_metrics_update(")


def test_last_step_is_validated_and_saved_whatever_the_frequency():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer.fit)
    assert source.count("is_last_step or self.global_steps %") == 2


def test_names_of_loggers_and_strategies_are_verl_s():
    from verl.utils.tracking import Tracking
    from verl.workers.engine.base import EngineRegistry

    import verl_aqn.integrations.verl.engine  # noqa: F401  registers ours

    assert set(LOGGERS) == {*Tracking.supported_backend, "tracking"}
    assert set(STRATEGIES) <= set(EngineRegistry._engines["language_model"])


def test_server_takes_the_worker_extension_from_engine_kwargs():
    """`**engine_kwargs` comes after verl's own `worker_extension_cls`, so ours wins."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    source = inspect.getsource(vLLMHttpServer.launch_server)
    assert source.index('"worker_extension_cls"') < source.index("**engine_kwargs,")


def test_adapter_path_never_sends_the_base():
    """With load_format=safetensors verl assumes that the base is synced, and sends LoRA tensors only."""
    from verl.workers.engine_workers import ActorRolloutRefWorker

    source = inspect.getsource(ActorRolloutRefWorker)
    assert 'self.base_sync_done: bool = "dummy" not in self.config.rollout.load_format' in source
    assert "do_lora_base_sync = not self.base_sync_done" in source


def test_parts_of_a_layer_that_vllm_fuses_keep_their_own_adapters(monkeypatch):
    """verl 0.9.0 gives q, k and v one name in vLLM from 0.25 on, so that one adapter takes the place of the others."""
    from verl.utils.vllm import TensorLoRARequest, VLLMHijack
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.models.llama import LlamaForCausalLM

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", LRUCacheWorkerLoRAManager._load_adapter)
    VLLMHijack.hijack()
    model = SimpleNamespace(hf_to_vllm_mapper=LlamaForCausalLM.hf_to_vllm_mapper)
    worker = SimpleNamespace(
        _adapter_manager=SimpleNamespace(model=model, supported_lora_modules=[], packed_modules_mapping={}),
        lora_config=LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.bfloat16),
        vocab_size=16,
        _lora_model_cls=LoRAModel,
    )
    layers = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
    tensors = {f"base_model.model.{layer}.lora_{part}.weight": torch.ones(8, 8) for layer in layers for part in "AB"}
    request = TensorLoRARequest(
        lora_name="1", lora_int_id=1, lora_path="-", lora_tensors=tensors,
        peft_config={"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    )  # fmt: skip
    assert set(LRUCacheWorkerLoRAManager._load_adapter(worker, request).loras) == set(layers)


def test_refills_go_through_the_trainer_and_after_evictions():
    """At this point AqnTrainer counts discarded prompts, and can refuse to draw more."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    build = inspect.getsource(PPOTrainer._build_replay_buffer)
    assert "refill_fn=self._add_prompts_to_generate" in build
    assert 'sampler_cls = ReplayBuffer if self.trainer_mode == "sync"' in build
    sample = inspect.getsource(ReplayBuffer.sample)
    assert sample.index("self._evict_terminal_groups(") < sample.index("self.refill_fn(")
    reasons = inspect.getsource(ReplayBuffer._terminal_eviction_reasons)
    assert "return set(), dapo_uids, failed_uids, dapo_counts" in reasons
    # verl's own limit has no effect, so ours is needed.
    assert "is ignored by the built-in V1 ReplayBuffer" in inspect.getsource(PPOTrainer._resolve_filter_groups_metric)


def test_sample_ends_before_the_rollout_sleeps_and_the_adapter_changes():
    """At this point the rollout scores its own sequences again: same adapter, without noise."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    step = inspect.getsource(PPOTrainer._step_once)
    positions = [step.index(text) for text in (".sample(", "self.on_sample_end()", "self._update_actor(")]
    assert positions == sorted(positions)
    assert "sleep_replicas" in inspect.getsource(PPOTrainerSync.on_sample_end)


def test_adapter_only_checkpoints_keep_the_value_head():
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    assert 'if "lora_" in k or ".adapter_" in k' in inspect.getsource(FSDPCheckpointManager.save_checkpoint)
    assert BaseCheckpointManager.is_lora_only_state_dict({"base_model.model.lm_head.adapter_row": None})


def test_processes_that_are_watched_have_the_names_of_actors():
    """The watchdog knows a process by its title, which is the name of the actor's class."""
    folders = [Path(importlib.util.find_spec(name).origin).parent for name in ("verl", "transfer_queue", "verl_aqn")]
    text = [file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py")]
    classes = {name for one in text for name in re.findall(r"^ *class (\w+)", one, re.MULTILINE)}
    assert set(watchdog._ACTORS) - classes == set()
