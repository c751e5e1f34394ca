"""What the rungs of `verl-aqn selftest` for CUDA and NPU call, checked in the CPU's vLLM and in the text of wheels.

None of these rungs has been run on a device.
"""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ascend_packages import read
from verl_aqn.selftest import graph_rungs, setting_up, small_model
from verl_aqn.selftest.rung import Context


@pytest.fixture
def packed(tmp_path) -> Path:
    from verl_aqn.checkpoints.packing import quantize_checkpoint

    quantize_checkpoint(small_model.make(tmp_path / "models" / "small" / "bf16"), tmp_path / "models/small/packed")
    return tmp_path


def started(monkeypatch, folder: Path, device: str, **options: Any) -> tuple[setting_up.Served, dict[str, Any]]:
    """Return what is served, and the options that an engine on `device` gets."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(setting_up, "EngineProbe", lambda model, given: made.update(given, model=model))
    monkeypatch.setattr("verl_aqn.config.serving.form_of", lambda aqn, chip, experts=False: FORMS[device])
    context = Context(device, 2, folder / "work")
    served = setting_up.serve(context)
    setting_up.start(context, served, **options)
    return served, made


FORMS = {"cuda": "packed", "npu": "bf16"}


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_the_options_of_an_engine_are_vllm_s(monkeypatch, packed, device):
    from vllm.engine.arg_utils import EngineArgs

    served, options = started(monkeypatch, packed, device, enforce_eager=False, tensor_parallel_size=2)
    known = {field.name for field in fields(EngineArgs)}
    assert options.keys() <= known
    assert options["enable_sleep_mode"] is True
    assert (options["enforce_eager"], options["tensor_parallel_size"], options["max_lora_rank"]) == (False, 2, 8)
    assert served.form == FORMS[device]
    assert (options["model"] == str(served.packed)) == (FORMS[device] == "packed")
    assert ("linear_backend" in options) == (device == "cuda")


def test_a_trial_of_a_pass_is_a_valid_compilation(monkeypatch, packed):
    from vllm.config import CompilationConfig

    monkeypatch.setattr("verl_aqn.config.serving.form_of", lambda *_: "packed")
    context = Context("cuda", 1, packed / "work", done={"passes": dict.fromkeys(["eliminate_noops", "fuse_act_quant"])})
    for name in ("fuse_act_quant", "fuse_norm_quant"):
        context.shared["served"] = setting_up.serve(context)
        config = CompilationConfig(**graph_rungs.options(context, name)["compilation_config"])
        assert [one for one in ("fuse_act_quant", "fuse_norm_quant") if getattr(config.pass_config, one)] == [name]


def test_vllm_has_what_the_probe_calls():
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter
    from vllm.config import CompilationConfig
    from vllm.config.compilation import CUDAGraphMode

    assert "level" in inspect.signature(LLM.sleep).parameters
    assert all(hasattr(LLM, name) for name in ("wake_up", "reset_prefix_cache", "collective_rpc", "generate"))
    assert isinstance(compilation_counter.num_cudagraph_captured, int)
    assert CUDAGraphMode.NONE.name == "NONE"
    passes = vars(CompilationConfig().pass_config)
    assert any(name.startswith("fuse_") for name in passes)


def test_vllm_ascend_counts_its_graphs_and_sleeps():
    assert "compilation_counter.num_cudagraph_captured += 1" in read("vllm_ascend/compilation/acl_graph.py")
    worker = read("vllm_ascend/worker/worker.py")
    assert "def sleep(self, level: int = 1)" in worker
    assert "def wake_up(self" in worker


def test_torch_npu_answers_what_the_rungs_ask():
    text = read("torch_npu/npu/__init__.py")
    for name in (
        "is_available", "device_count", "set_device", "synchronize", "mem_get_info", "get_device_properties",
        "get_device_name",
    ):  # fmt: skip
        assert f'"{name}"' in text or f"'{name}'" in text or f" {name}" in text, name


def test_the_kinds_of_devices_are_torch_s_modules():
    import torch

    for name in ("is_available", "device_count", "set_device", "synchronize", "mem_get_info", "get_device_properties"):
        assert hasattr(torch.cuda, name)
