"""What the profile cuda assumes of vLLM and verl, checked in the CPU's vLLM: test_pins.py has why."""

import typing
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.engine_settings import CUDA_PASSES, FP8_CACHES, PLAIN_CACHES


def test_marlin_is_a_backend_and_serves_mxfp4_alone():
    from vllm.config.kernel import LinearBackend
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    options = load_recipe("e12", ["profile=cuda"]).actor_rollout_ref.rollout.engine_kwargs.vllm
    assert options.linear_backend in typing.get_args(LinearBackend)
    assert options.keys() <= {field.name for field in fields(EngineArgs)}
    possible = linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CUDA]
    left = linear._filter_kernels_by_backend(options.linear_backend, possible)
    assert [kernel.__name__ for kernel in left] == ["MarlinMxFp4LinearKernel"]


def test_no_pass_of_vllm_fuses_a_norm():
    """vLLM's fusions say which passes match norms; those for ROCm or for one model's kernels are left out."""
    import vllm.compilation.passes.fusion as fusion
    from vllm.config import CompilationConfig, PassConfig

    options = load_recipe("e12", ["profile=cuda"]).actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config
    passes = OmegaConf.to_container(options.pass_config)
    assert passes == dict.fromkeys(passes, False)
    config = CompilationConfig(**OmegaConf.to_container(options)).pass_config
    assert not any(getattr(config, key) for key in passes)
    of_norms = {field.name for field in fields(PassConfig) if "norm" in field.name or "rms" in field.name}
    elsewhere = {"fuse_mla_dual_rms_norm", "fuse_qk_norm_rope_kvcache"}  # ROCm; off by default
    assert of_norms - elsewhere == {"fuse_norm_quant", "fuse_allreduce_rms", "enable_qk_norm_rope_fusion"}
    assert of_norms - elsewhere <= set(passes) == set(CUDA_PASSES)
    # Only some patterns have vLLM's own check that a norm's weight has the dtype of its input.
    source = (Path(fusion.__path__[0]) / "allreduce_rms_fusion.py").read_text()
    assert 0 < source.count("extra_check=_norm_input_weight_dtype_match") < source.count("extra_check=")


@pytest.mark.parametrize(("rank", "merge", "level"), [(32, False, 1), (32, True, 2), (0, False, 2)])
def test_verl_keeps_the_rollout_s_weights_in_its_sleep_for_an_adapter_alone(rank, merge, level):
    """Level 2 discards the weights. verl then sends whole weights, which do not include a packed base."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    server = SimpleNamespace(
        config=SimpleNamespace(mtp=None), model_config=SimpleNamespace(lora_rank=rank, lora={"merge": merge})
    )
    server.lora_as_adapter = vLLMHttpServer.lora_as_adapter.fget(server)
    assert vLLMHttpServer._resolve_sleep_level(server) == level


def test_vllm_s_kernels_for_norms_stand_back_where_weights_are_float32():
    """The kernels would read float32 as 16-bit numbers, or fail. vLLM's plain forward takes both."""
    (folder,) = find_spec("vllm").submodule_search_locations
    source = (Path(folder) / "kernels/vllm_c.py").read_text()
    assert source.count("variance_size is None and (weight is None or weight.dtype == x.dtype)") == 2


def test_cpu_engines_have_the_fp8_caches_that_a_recipe_may_ask_for():
    from vllm.config.cache import CacheDType
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert {*PLAIN_CACHES, *FP8_CACHES} <= set(typing.get_args(CacheDType))
    assert set(FP8_CACHES) <= set(CPUAttentionBackend.supported_kv_cache_dtypes)
