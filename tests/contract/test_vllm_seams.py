"""The places of vLLM that the plugin hooks into."""

import inspect
import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def cpu():
    os.environ.setdefault("VERL_PLATFORM", "cpu")


def test_kernel_registry_takes_mxfp4_for_the_cpu_and_offers_ours():
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    assert list(inspect.signature(linear.register_linear_kernel).parameters) == [
        "kernel_class",
        "platform",
        "kernel_type",
    ]
    plugin.register()
    plugin.register()  # vLLM may call it twice in a process
    names = [kernel.__name__ for kernel in linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU]]
    assert names == ["CpuMxfp4LinearKernel"]


def test_every_kernel_of_vllm_is_known_by_what_it_does_to_activations():
    from vllm.model_executor.kernels import linear

    from verl_aqn.integrations.vllm import vllm_plugin as plugin
    from verl_aqn.integrations.vllm.readback import KERNEL_ACTIVATIONS

    plugin.register()
    names = {kernel.__name__ for kernels in linear._POSSIBLE_MXFP4_KERNELS.values() for kernel in kernels}
    assert names - {"CpuMxfp4LinearKernel"} == set(KERNEL_ACTIVATIONS)


def test_no_kernel_of_vllm_has_mxfp4_weights_and_mxfp8_activations():
    """`check_activations` refuses W4A8 on CUDA. If a kernel appears, accept it there and name it in the read-back."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic, kMxfp8Dynamic
    from vllm.platforms import PlatformEnum

    def able(activations) -> list[str]:
        config = MxFp4LinearLayerConfig(activations)
        kernels = linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CUDA]
        return [kernel.__name__ for kernel in kernels if kernel.can_implement(config)[0]]

    assert {"FlashInferMxFp4LinearKernel", "MarlinMxFp4LinearKernel"} <= set(able(kMxfp4Dynamic))
    assert able(kMxfp8Dynamic) == []


@pytest.mark.parametrize("activation", ["none", "even/nearest", "floor/half_away", "mxfp8/floor/nearest"])
def test_the_kernel_computes_what_the_trainer_s_layer_does(activation):
    from types import SimpleNamespace

    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearLayerConfig

    from verl_aqn.integrations.vllm.cpu_kernel import CpuMxfp4LinearKernel
    from verl_aqn.integrations.vllm.readback import kernel_activation
    from verl_aqn.mxfp4 import Mxfp4Linear
    from verl_aqn.mxfp4.linear import Activation

    torch.manual_seed(0)
    ours = Mxfp4Linear.from_linear(torch.nn.Linear(64, 48).bfloat16())
    ours.activation = Activation.parse(activation)
    layer = SimpleNamespace(weight=ours.weight_packed, weight_scale=ours.weight_scale, params_dtype=torch.bfloat16)
    with set_current_vllm_config(VllmConfig(additional_config={"mxfp4_activation": activation})):
        kernel = CpuMxfp4LinearKernel(MxFp4LinearLayerConfig())
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(kernel.apply_weights(layer, x, ours.bias), ours(x))
    assert kernel_activation(kernel) == activation


def test_the_lora_patch_of_vllm_is_in_place():
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    wrapper = resolve_obj_by_qualname(current_platform.get_punica_wrapper())
    assert wrapper.__mro__[1] is PunicaWrapperCPU
    for method in ("add_lora_linear", "add_lora_logits"):
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (wrapper, PunicaWrapperCPU))
        assert list(ours.parameters) == list(theirs.parameters)


@pytest.mark.parametrize("widths", [(8,), (8, 12), (8, 4, 12)])
def test_lora_products_equal_vllm_s_own(widths):
    """Tokens with and without the adapter, batch after batch, also after vLLM has written another adapter."""
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from verl_aqn.integrations.vllm.cpu_lora import SingleAdapterPunicaWrapper

    torch.manual_seed(0)
    rank, size = 4, sum(widths)
    made = [
        (
            cls(max_num_batched_tokens=8, max_batches=8, device="cpu"),
            tuple(torch.zeros(1, 1, rank, 16) for _ in widths),
            tuple(torch.zeros(1, 1, n, rank) for n in widths),
        )
        for cls in (PunicaWrapperCPU, SingleAdapterPunicaWrapper)
    ]
    batches = [(7, 7, 7), (0, 7, 0, 7, 7), (0, 0, 0), (7, 7, 7, 0, 0), (7, 7, 7, 7, 7)]
    for number, tokens in enumerate(batches):
        if number % 2 == 0:  # as `set_lora` does, outside of inference mode
            for slot in range(len(widths)):
                a, b = torch.randn(rank, 16), torch.randn(widths[slot], rank)
                for _, some_a, some_b in made:
                    some_a[slot][0, 0, :rank, :16].copy_(a, non_blocking=True)
                    some_b[slot][0, 0, : widths[slot], :rank].copy_(b, non_blocking=True)
        x, y = torch.randn(len(tokens), 16), torch.randn(len(tokens), size)
        results = []
        for wrapper, some_a, some_b in made:
            mapping = LoRAMapping(index_mapping=tokens, prompt_mapping=tokens, is_prefill=False)
            wrapper.update_metadata(mapping, [7], 1, 32)
            out = y.clone()
            with torch.inference_mode():
                wrapper.add_lora_linear(out, x, some_a, some_b, 1.0, widths)
            results.append(out)
        without = torch.tensor(tokens) == 0  # vLLM's operators take index −1 for these, which is the last adapter
        torch.testing.assert_close(*(out[~without] for out in results), atol=1e-5, rtol=1e-5)
        assert torch.equal(results[1][without], y[without])
        assert not torch.equal(results[1], y) or without.all()
    assert len(made[1][0]._joined) == (len(widths) > 1)  # joined once, and not again in every batch


def test_vllm_folds_the_scaling_into_b():
    """The trainer's digest of the sent adapter does the same."""
    from vllm.lora.lora_weights import LoRALayerWeights

    assert "self.lora_b *= self.scaling" in inspect.getsource(LoRALayerWeights.optimize)


def test_scheme_hands_the_packed_weight_to_the_kernel_under_the_name_weight():
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Mxfp4

    source = inspect.getsource(CompressedTensorsW4A4Mxfp4)
    assert "layer.weight = Parameter(layer.weight_packed.data" in source
    assert "self.kernel.process_weights_after_loading(layer)" in source


def test_loader_s_hook_has_the_arguments_we_pass_on():
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    assert DefaultModelLoader.load_model is BaseModelLoader.load_model
    original = inspect.getclosurevars(BaseModelLoader.load_model).nonlocals["load"]
    assert list(inspect.signature(original).parameters)[:3] == ["self", "vllm_config", "model_config"]
    source = inspect.getsource(original)
    # The settings of the base's load are kept between the two calls.
    assert source.index("self.load_weights(model, model_config)") < source.index("process_weights_after_loading(model,")


def test_queues_wait_by_a_function_that_can_be_replaced():
    from vllm.distributed.device_communicators import shm_broadcast

    assert "sched_yield" in shm_broadcast.SpinCondition.wait.__code__.co_names
    assert callable(shm_broadcast.sched_yield)
