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


def packed_layer(k: int, n: int, activation: str = "none"):
    """Return (the trainer's packed layer, vLLM's layer with the same bytes and this package's kernel)."""
    from types import SimpleNamespace

    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearLayerConfig

    from verl_aqn.integrations.vllm.cpu_kernel import CpuMxfp4LinearKernel
    from verl_aqn.mxfp4 import Mxfp4Linear
    from verl_aqn.mxfp4.linear import Activation

    torch.manual_seed(0)
    ours = Mxfp4Linear.from_linear(torch.nn.Linear(k, n).bfloat16())
    ours.activation = Activation.parse(activation)
    with set_current_vllm_config(VllmConfig(additional_config={"mxfp4_activation": activation})):
        kernel = CpuMxfp4LinearKernel(MxFp4LinearLayerConfig())
    layer = SimpleNamespace(weight=ours.weight_packed, weight_scale=ours.weight_scale, params_dtype=torch.bfloat16)
    layer.scheme = SimpleNamespace(kernel=kernel)
    layer.quant_method = SimpleNamespace(apply=kernel.apply_weights)
    kernel.process_weights_after_loading(layer)
    return ours, layer


@pytest.mark.parametrize("native_product", [True, False])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("activation", ["none", "even/nearest", "floor/half_away", "mxfp8/floor/nearest"])
def test_the_kernel_computes_what_the_trainer_s_layer_does(activation, tokens, native_product, monkeypatch):
    import torch

    from verl_aqn.integrations.vllm.readback import kernel_activation
    from verl_aqn.mxfp4.kernels import native

    if not native_product:
        monkeypatch.setattr(native, "can_multiply", lambda: False)
    ours, layer = packed_layer(64, 48, activation)
    packed = native.can_multiply()
    assert layer.weight.dtype == (torch.uint8 if packed else torch.bfloat16)
    assert kernel_activation(layer.scheme.kernel) == activation
    x = torch.randn(tokens, 64).bfloat16()
    theirs, wanted = layer.scheme.kernel.apply_weights(layer, x, ours.bias), ours(x)
    if packed:  # float32 sums in another order: rarely, a bfloat16 beside the other
        torch.testing.assert_close(theirs, wanted, rtol=2**-7, atol=2**-12)
        assert (theirs == wanted).float().mean() > 0.99
    else:
        assert torch.equal(theirs, wanted)


@pytest.mark.parametrize("activation", ["none", "even/nearest"])
def test_a_packed_layer_and_its_adapter_are_one_operation(activation, monkeypatch):
    """For a batch in which all tokens have the adapter; for others, the parts are added as vLLM does.

    They are added, too, if activations are rounded: the adapter's are not.
    """
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from verl_aqn.integrations.vllm import cpu_lora, vllm_plugin
    from verl_aqn.mxfp4.kernels import native

    vllm_plugin.register()
    assert BaseLinearLayerWithLoRA._apply_sync is cpu_lora.apply_packed
    ours, base = packed_layer(64, 48, activation)
    layer = object.__new__(BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(layer)
    layer._enable_aux_cuda_stream = False
    object.__setattr__(layer, "base_layer", base)
    layer.lora_a_stacked = tuple(torch.randn(1, 1, 8, 64).bfloat16() for _ in range(2))
    layer.lora_b_stacked = tuple(torch.randn(1, 1, 24, 8).bfloat16() for _ in range(2))
    layer.output_slices = (24, 24)
    layer.punica_wrapper = cpu_lora.SingleAdapterPunicaWrapper(max_num_batched_tokens=8, max_batches=8, device="cpu")
    called = []
    parts = cpu_lora._apply_parts
    monkeypatch.setattr(cpu_lora, "_apply_parts", lambda *a: called.append(len(a[1])) or parts(*a))
    a, b = (torch.cat([one[0, 0] for one in stack]) for stack in (layer.lora_a_stacked, layer.lora_b_stacked))
    for tokens in ((7, 7, 7), (7, 0, 7, 7), (0, 0)):
        mapping = LoRAMapping(index_mapping=tokens, prompt_mapping=tokens, is_prefill=False)
        layer.punica_wrapper.update_metadata(mapping, [7], 1, 32)
        x = torch.randn(len(tokens), 64).bfloat16()
        with torch.inference_mode():
            y = layer.apply(x, ours.bias)
        has = (torch.tensor(tokens) == 7).unsqueeze(1)
        inner = (x.float() @ a.float().T).bfloat16().float() * has
        adapter = torch.cat([inner[:, :8] @ b[:24].float().T, inner[:, 8:] @ b[24:].float().T], dim=1)
        torch.testing.assert_close(y.float(), ours(x).detach().float() + adapter, rtol=2**-6, atol=0.05)
    assert called == ([4, 2] if native.can_multiply() and activation == "none" else [3, 4, 2])


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


def test_float32_norms_are_one_operation_on_a_cpu():
    """vLLM's plain code serves what the compiled norm does not support, with the same values."""
    import torch
    from vllm.ir import ops
    from vllm.platforms import current_platform

    from verl_aqn.integrations.vllm import vllm_plugin

    vllm_plugin.register()
    order = current_platform.get_default_ir_op_priority(None)
    assert order.rms_norm == order.fused_add_rms_norm == ["verl_aqn", "native"]
    torch.manual_seed(0)
    x, rest, weight = torch.randn(9, 576).bfloat16(), torch.randn(9, 576).bfloat16(), torch.randn(576)
    for op, given in ((ops.rms_norm, (x, weight, 1e-5)), (ops.fused_add_rms_norm, (x, rest, weight, 1e-5))):
        with op.set_priority(["verl_aqn", "native"]):
            assert op.dispatch(*given).provider == "verl_aqn"
            ours = op(*given)
            plain = (weight.bfloat16(), None, weight[:64], weight)
            for other, size in zip(plain, (None, None, None, 64), strict=True):
                assert op.dispatch(*given[:-2], other, 1e-5, size).provider == "native"
            assert op.dispatch(*(t.float() if isinstance(t, torch.Tensor) else t for t in given)).provider == "native"
        with op.set_priority(["native"]):
            theirs = op(*given)
        pairs = [(ours, theirs)] if op is ops.rms_norm else list(zip(ours, theirs, strict=True))
        for one, other in pairs:
            assert (one == other).float().mean() > 0.99
            torch.testing.assert_close(one, other, rtol=2**-7, atol=0)


def test_an_embedding_without_an_adapter_costs_nothing():
    import torch
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from verl_aqn.integrations.vllm.cpu_lora import SingleAdapterPunicaWrapper

    torch.manual_seed(0)
    for b in (torch.zeros(1, 1, 16, 4), torch.randn(1, 1, 16, 4)):
        results = []
        for cls in (PunicaWrapperCPU, SingleAdapterPunicaWrapper):
            wrapper = cls(max_num_batched_tokens=8, max_batches=8, device="cpu")
            mapping = LoRAMapping(index_mapping=(7, 7, 7), prompt_mapping=(7, 7, 7), is_prefill=False)
            wrapper.update_metadata(mapping, [7], 1, 32)
            y = torch.ones(3, 16)
            wrapper.add_lora_embedding(y, torch.arange(12.0).view(3, 4), b)
            results.append(y)
        assert torch.equal(*results)


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
