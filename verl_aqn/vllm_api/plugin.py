"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`).

On a CPU it adds two things that vLLM 0.28 lacks there: a dense MXFP4 kernel, and LoRA products that do not gather
a copy of the adapter for every token.
"""

import importlib.metadata

from verl_aqn.errors import EnvironmentFault

SUPPORTED_VLLM = ("0.23", "0.24", "0.28")

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
    """Register the kernels. vLLM may call this more than once in a process."""
    global _registered
    if _registered:
        return
    check_version()
    from vllm.platforms import PlatformEnum, current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.kernels.linear import register_linear_kernel

        from verl_aqn.vllm_api.cpu_kernel import CpuMxfp4LinearKernel

        register_linear_kernel(CpuMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
        # The one runtime patch of vLLM: the platform names its LoRA wrapper by a string, there is no registry.
        if "PunicaWrapperCPU" not in type(current_platform).get_punica_wrapper():
            raise EnvironmentFault(
                "vLLM's CPU platform no longer names PunicaWrapperCPU: this version is not supported"
            )
        type(current_platform).get_punica_wrapper = classmethod(
            lambda cls: "verl_aqn.vllm_api.cpu_lora.SingleAdapterPunicaWrapper"
        )
    _registered = True


def is_registered() -> bool:
    """Whether `register` ran in this process."""
    return _registered
