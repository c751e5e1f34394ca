"""Check settings of the rollout's engine that change what it computes: accepted with a plan, or rejected by name."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import ASCEND
from verl_aqn.preflight.findings import Finding

ROLLOUT = "actor_rollout_ref.rollout"
ENGINE = f"{ROLLOUT}.engine_kwargs.vllm"
PLAIN_CACHES, FP8_CACHES = ("auto", "bfloat16"), ("fp8", "fp8_e4m3", "fp8_e5m2")
# Passes of vllm-ascend's graphs that compute a norm together with its neighbours (`vllm_ascend.ascend_config`).
ASCEND_PASSES = ("fuse_norm_quant", "fuse_qknorm_rope", "fuse_allreduce_rms")
CUDA_PASSES = ("fuse_norm_quant", "fuse_allreduce_rms", "enable_sp", "enable_qk_norm_rope_fusion")  # of vLLM


def cache_dtype(config: DictConfig) -> str:
    """Return the type of the rollout's KV cache as vLLM names it."""
    return str(OmegaConf.select(config, f"{ENGINE}.kv_cache_dtype") or "auto")


def check_engine(config: DictConfig) -> Iterator[Finding]:
    """Check quantisation by vLLM, the type of the KV cache, speculative decoding, and graphs on NPUs."""
    yield _quantization(config)
    yield _cache(config)
    yield _speculation(config)
    if (profile := parse_aqn(config).profile) == "npu":
        yield _graphs(config)
    elif profile == "cuda":
        yield _passes(config)


def _quantization(config: DictConfig) -> Finding:
    """Check that vLLM does not round the base itself: the rollout's weights are compared with the folder's."""
    value, fix = _engine(config).get("quantization"), ""
    if value and value not in (ASCEND, "compressed-tensors"):
        fix = (
            "vLLM would round the base again, and its weights could not be compared with the actor's: remove "
            f"{ENGINE}.quantization={value}"
        )
    return Finding("rollout's quantisation", str(value or "as in the folder of the base"), fix)


def _cache(config: DictConfig) -> Finding:
    kind, profile, fix = cache_dtype(config), parse_aqn(config).profile, ""
    if kind in FP8_CACHES and profile == "npu":
        fix = f"vllm-ascend has no FP8 cache for these models: remove {ENGINE}.kv_cache_dtype"
    elif kind not in (*PLAIN_CACHES, *FP8_CACHES):
        fix = f"set {ENGINE}.kv_cache_dtype to one of {', '.join((*PLAIN_CACHES, *FP8_CACHES))}"
    text = f"kv_cache_dtype={kind}"
    if kind in FP8_CACHES:
        text += ", half of the memory; rounding of keys and values is part of aqn/mismatch/kernels"
    return Finding("KV cache", text, fix)


def _speculation(config: DictConfig) -> Finding:
    key = f"{ENGINE}.speculative_config"
    if not _engine(config).get("speculative_config"):
        return Finding("speculative decoding", "off")
    fix = f"a draft model has neither adapter nor noise, and is not read back or planned for: remove {key}"
    return Finding("speculative decoding", "on", fix)


def _graphs(config: DictConfig) -> Finding:
    """Check that graphs call our forward of the norms, which reads their noisy weights."""
    if config.actor_rollout_ref.rollout.enforce_eager:
        return Finding("ACL graphs", "off (enforce_eager=true)")
    options = _engine(config).get("additional_config") or {}
    passes = options.get("ascend_compilation_config") or {}
    fix = ""
    if on := [name for name in ASCEND_PASSES if passes.get(name, True)]:
        key = f"{ENGINE}.additional_config.ascend_compilation_config"
        fix = f"a fused norm may not read its float32 weights: set {key}.{on[0]}=false"
    elif (options.get("xlite_graph_config") or {}).get("enabled"):
        fix = f"xlite graphs do not call the norms of the model: set {ENGINE}.additional_config.xlite_graph_config=null"
    return Finding("ACL graphs", "on, norms not fused", fix)


def _passes(config: DictConfig) -> Finding:
    passes = (_engine(config).get("compilation_config") or {}).get("pass_config") or {}
    on, fix = [name for name in CUDA_PASSES if passes.get(name)], ""
    if on and parse_aqn(config).noise.enabled:
        fix = (
            f"a fused norm may not read its float32 weights: set {ENGINE}.compilation_config.pass_config.{on[0]}=false"
        )
    return Finding("fused norms", ", ".join(on) or "none", fix)


def _engine(config: DictConfig) -> dict[str, Any]:
    found = OmegaConf.select(config, ENGINE)
    kwargs: Any = OmegaConf.to_container(found) if found is not None else {}
    return kwargs or {}
