"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`).

Everywhere it remembers what MXFP4 layers were loaded with, and readies the norms for noise. On a CPU it adds two things
that vLLM 0.28 lacks there: a dense MXFP4 kernel, and LoRA products that do not gather a copy of the adapter for every
token. All runtime patches of vLLM are in this file; tests/contract/test_vllm_seams.py holds what they rely on.
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
    """Register the kernels and put the patches in place. vLLM may call this more than once in a process."""
    global _registered
    if _registered:
        return
    check_version()
    from vllm.platforms import PlatformEnum, current_platform

    _patch_loading()
    if current_platform.is_cpu():
        from vllm.model_executor.kernels.linear import register_linear_kernel

        from verl_aqn.vllm_api.cpu_kernel import CpuMxfp4LinearKernel

        register_linear_kernel(CpuMxfp4LinearKernel, PlatformEnum.CPU, "mxfp4")
        # The platform names its LoRA wrapper by a string; there is no registry.
        if "PunicaWrapperCPU" not in type(current_platform).get_punica_wrapper():
            raise EnvironmentFault(
                "vLLM's CPU platform no longer names PunicaWrapperCPU: this version is not supported"
            )
        type(current_platform).get_punica_wrapper = classmethod(
            lambda cls: "verl_aqn.vllm_api.cpu_lora.SingleAdapterPunicaWrapper"
        )
    _registered = True


def _patch_loading() -> None:
    """Two things can only be done while a model is loaded, and vLLM has no hook there."""
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Mxfp4 as Scheme
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader as Loader

    from verl_aqn.noise import NoiseInjector
    from verl_aqn.vllm_api.readback import remember_packed

    process, load = Scheme.process_weights_after_loading, Loader.load_model

    def process_weights_after_loading(self, layer):
        remember_packed(layer)  # before the kernel rearranges the packed bytes
        process(self, layer)

    def load_model(self, vllm_config, model_config, *args, **kwargs):
        model = load(self, vllm_config, model_config, *args, **kwargs)
        # Before the model is compiled or captured in a graph: norms in fp32 have a storage of their own, which both
        # then hold on to. Only for engines of ours; the plugin may lie in an environment that others use too.
        ours = "verl_aqn" in (vllm_config.parallel_config.worker_extension_cls or "")
        if ours and model_config is vllm_config.model_config:
            model.aqn_injector = NoiseInjector(model)
        return model

    Scheme.process_weights_after_loading = process_weights_after_loading
    Loader.load_model = load_model


def is_registered() -> bool:
    """Whether `register` ran in this process."""
    return _registered
