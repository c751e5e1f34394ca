"""The plugin that vLLM calls in each of its processes (entry point `vllm.general_plugins`).

In engines of a run it records how the base was loaded, and prepares the norms for noise. On a CPU it adds what vLLM
0.28 lacks there: a dense MXFP4 kernel that computes a layer and its adapter in one operation, LoRA products that do not
gather a copy of the adapter for every token, float32 norms in one operation, MoE layers together with LoRA and under
expert parallelism, and sampling by the seeds of requests. It also makes queues wait without using a whole core. This
file applies all runtime patches of vLLM; tests/contract/test_vllm_seams.py and test_vllm_sampler.py check what the
patches rely on.
"""

import importlib.metadata
import time

from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs.faults import watch
from verl_aqn.runs.stacks import listen

# 0.23 is the NPU's and 0.24 that of verl's own extra: both were read, not run. 0.28 is the CPU's and the GPU's.
SUPPORTED_VLLM = ("0.23", "0.24", "0.28")

POLL_S = 1e-4  # time between two checks of a queue on a CPU

_registered = False


def check_version() -> str:
    """Return the version of the installed vLLM.

    Raises:
        EnvironmentFault: vLLM is missing, or its version is not among `SUPPORTED_VLLM`.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault("vLLM is not installed: run `bash scripts/setup.sh`") from None
    if not version.startswith(SUPPORTED_VLLM):
        raise EnvironmentFault(f"vLLM {version} is not supported (supported: {', '.join(SUPPORTED_VLLM)})")
    return version


def register() -> None:
    """Register the kernels and apply the patches. vLLM may call this more than once in a process."""
    global _registered
    if _registered:
        return
    listen()
    watch()
    check_version()
    from vllm.platforms import PlatformEnum, current_platform

    from verl_aqn.integrations.vllm.observe import observe_adapters

    _patch_loading()
    observe_adapters()
    if current_platform.is_cpu():
        from vllm.distributed.device_communicators import shm_broadcast
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
        from vllm.model_executor.kernels.linear import register_linear_kernel
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        from verl_aqn.integrations.vllm import cpu_norm, cpu_sampler
        from verl_aqn.integrations.vllm.cpu_kernel import CpuMxfp4LinearKernel
        from verl_aqn.integrations.vllm.cpu_lora import apply_packed
        from verl_aqn.integrations.vllm.cpu_moe import CpuMoEMethod

        cpu_sampler.patch()
        cpu_norm.register()

        # An engine waits in a busy loop for its worker's answer, and so takes a core from the worker's threads. It must
        # go on looking: the message that would wake it is lost where two follow closely, and costs 5 s then.
        shm_broadcast.sched_yield = lambda: time.sleep(POLL_S)
        register_linear_kernel(CpuMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
        UnquantizedFusedMoEMethod.register_oot(CpuMoEMethod)
        # The platform names its LoRA wrapper in a string; there is no registry.
        if "PunicaWrapperCPU" not in type(current_platform).get_punica_wrapper():
            raise EnvironmentFault(
                "vLLM's CPU platform no longer names PunicaWrapperCPU: this version is not supported"
            )
        type(current_platform).get_punica_wrapper = classmethod(
            lambda cls: "verl_aqn.integrations.vllm.cpu_lora.SingleAdapterPunicaWrapper"
        )
        BaseLinearLayerWithLoRA._apply_sync = apply_packed
    _registered = True


def _patch_loading() -> None:
    """Patch vLLM's loading of models, where vLLM has no hook, for engines with a worker extension of this package.

    Other engines in the environment, and draft models, are not changed. An engine of a stock run is only observed:
    its norms are not changed.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader as Loader
    from vllm.platforms import current_platform

    from verl_aqn.integrations.vllm.observe import observe_load
    from verl_aqn.noise import NoiseInjector

    load = Loader.load_model

    def load_model(self, vllm_config, model_config, *args, **kwargs):
        extension = vllm_config.parallel_config.worker_extension_cls or ""
        if "verl_aqn" not in extension or model_config is not vllm_config.model_config:
            return load(self, vllm_config, model_config, *args, **kwargs)
        observe_load(self)
        model = load(self, vllm_config, model_config, *args, **kwargs)
        if "stock" in extension.lower():
            return model
        # This must happen before the model is compiled or captured in a graph, because both keep the storage of the
        # norms, and fp32 norms get a new storage here.
        model.aqn_injector = injector = NoiseInjector(model)
        if current_platform.device_name == "npu":
            from verl_aqn.integrations.vllm.ascend_norm import compute_in_float32

            compute_in_float32(model, injector.rms_norms)
        return model

    Loader.load_model = load_model


def is_registered() -> bool:
    """Return whether `register` has run in this process."""
    return _registered
