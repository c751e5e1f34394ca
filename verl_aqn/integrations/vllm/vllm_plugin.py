"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`).

In our engines it remembers what the base was loaded with, and readies the norms for noise. On a CPU it adds what vLLM
0.28 lacks there: a dense MXFP4 kernel, LoRA products that do not gather a copy of the adapter for every token, MoE
layers beside LoRA and under expert parallelism, and sampling by the seeds of requests; and queues wait without taking a
core. This file puts all runtime patches of vLLM in place; tests/contract/test_vllm_seams.py and test_vllm_sampler.py
hold what they rely on.
"""

import importlib.metadata
import time

from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs.faults import watch
from verl_aqn.runs.stacks import listen

SUPPORTED_VLLM = ("0.23", "0.24", "0.28")

POLL_S = 1e-4  # between looks at a queue on a CPU

_registered = False


def check_version() -> str:
    """The installed vLLM's version.

    Raises:
        EnvironmentFault: vLLM is missing, or of a version whose seams were not checked.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault("vLLM is not installed: run `bash scripts/setup.sh`") from None
    if not version.startswith(SUPPORTED_VLLM):
        raise EnvironmentFault(f"vLLM {version} is not supported (supported: {', '.join(SUPPORTED_VLLM)})")
    return version


def register() -> None:
    """Register the kernels and put the patches in place. vLLM may call this more than once in a process."""
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
        from vllm.model_executor.kernels.linear import register_linear_kernel
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        from verl_aqn.integrations.vllm import cpu_sampler
        from verl_aqn.integrations.vllm.cpu_kernel import CpuMxfp4LinearKernel
        from verl_aqn.integrations.vllm.cpu_moe import CpuMoEMethod

        cpu_sampler.patch()

        # An engine spins while it waits for its worker's answer, on the cores that this needs for its threads.
        shm_broadcast.sched_yield = lambda: time.sleep(POLL_S)
        register_linear_kernel(CpuMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
        UnquantizedFusedMoEMethod.register_oot(CpuMoEMethod)
        # The platform names its LoRA wrapper by a string; there is no registry.
        if "PunicaWrapperCPU" not in type(current_platform).get_punica_wrapper():
            raise EnvironmentFault(
                "vLLM's CPU platform no longer names PunicaWrapperCPU: this version is not supported"
            )
        type(current_platform).get_punica_wrapper = classmethod(
            lambda cls: "verl_aqn.integrations.vllm.cpu_lora.SingleAdapterPunicaWrapper"
        )
    _registered = True


def _patch_loading() -> None:
    """What can only be done while a model is loaded, where vLLM has no hook; for engines with our worker extension.

    Other engines in the environment, and a draft model, are left alone. An engine of a stock run is only watched:
    its norms stay what they are.
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
        # Before the model is compiled or captured in a graph: norms in fp32 have a storage of their own, which both
        # then hold on to.
        model.aqn_injector = injector = NoiseInjector(model)
        if current_platform.device_name == "npu":
            from verl_aqn.integrations.vllm.ascend_norm import compute_in_float32

            compute_in_float32(model, injector.rms_norms)
        return model

    Loader.load_model = load_model


def is_registered() -> bool:
    """Whether `register` ran in this process."""
    return _registered
