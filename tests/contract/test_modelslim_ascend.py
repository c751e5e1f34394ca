"""Functions of vllm-ascend that look up modules, create parameters and rearrange them, run on our folders.

They are extracted from the source of the pinned wheel, so that torch_npu is not needed. None of this was run on an NPU.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.ascend_packages import definitions
from tests.helpers.modelslim_folders import LAYER, modelslim_folders  # noqa: F401


def test_vllm_ascend_finds_a_scheme_for_every_layer(folders) -> None:
    kind, folder, _, scheme = folders
    theirs = definitions(
        "quantization/modelslim_config.py",
        "MODELSLIM_CONFIG_FILENAME",
        "get_linear_quant_type",
        "packed_modules_model_mapping",
    )
    skipped = definitions(
        "quantization/modelslim_config.py", "is_layer_skipped_ascend", inside="AscendModelSlimConfig"
    )["is_layer_skipped_ascend"]
    description = json.loads((folder / theirs["MODELSLIM_CONFIG_FILENAME"]).read_text())
    # Without an entry in its table, the mapping is that of vLLM's model class.
    llama = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    fused = theirs["packed_modules_model_mapping"].get(kind, llama)
    layers = ["self_attn.qkv_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_up_proj", "mlp.down_proj"] if kind == "llama" else ["mlp.experts"]
    config = SimpleNamespace(quant_description=description)
    for layer in layers:
        assert theirs["get_linear_quant_type"](description, LAYER + layer, fused) == scheme
        assert not skipped(config, LAYER + layer, fused)
    if kind == "qwen3_moe":
        assert skipped(config, LAYER + "mlp.gate", fused)


METHODS = {
    "W4A4_MXFP4": ("w4a4_mxfp4", "AscendW4A4MXFP4DynamicLinearMethod"),
    "W4A8_MXFP": ("w4a8_mxfp4", "AscendW4A8MXFPDynamicLinearMethod"),
}
NZ = (29, {"customize_dtype": torch.float8_e4m3fn, "input_dtype": "float4_e2m1fn_x2"})


def stand_in(method: Any) -> list[tuple[int, dict[str, Any]]]:
    """Give ``method`` a torch_npu whose cast to another layout changes nothing. Return the arguments of its calls."""
    casts: list[tuple[int, dict[str, Any]]] = []

    def npu_format_cast(tensor: torch.Tensor, form: int, **dtypes: Any) -> torch.Tensor:
        casts.append((form, dtypes))
        return tensor

    method.__globals__["torch_npu"] = SimpleNamespace(
        npu_format_cast=npu_format_cast, float4_e2m1fn_x2="float4_e2m1fn_x2"
    )
    return casts


def call(method: Any, self: Any, *arguments: Any) -> Any:
    """Call a function of a class, which may be static."""
    return method.__func__(*arguments) if isinstance(method, staticmethod) else method(self, *arguments)


def test_vllm_ascend_s_parameters_have_our_shapes(folders) -> None:
    _, folder, _, scheme = folders
    file, method = METHODS[scheme]
    methods = definitions(
        f"quantization/methods/{file}.py",
        "get_weight",
        "get_pergroup_param",
        "process_weights_after_loading",
        inside=method,
    )
    casts = stand_in(methods["process_weights_after_loading"])
    self = SimpleNamespace(group_size=json.loads((folder / "quant_model_description.json").read_text())["group_size"])
    tensors = load_file(folder / "model.safetensors")
    for module, (n, k) in {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64)}.items():
        parameters = call(methods["get_weight"], self, k, n, torch.bfloat16)
        parameters |= methods["get_pergroup_param"](self, k, n, torch.bfloat16)
        layer = SimpleNamespace()
        for name, parameter in parameters.items():
            ours = tensors[f"{LAYER}self_attn.{module}.{name}"]
            assert (ours.shape, ours.dtype) == (parameter.shape, parameter.dtype)
            setattr(layer, name, torch.nn.Parameter(ours.clone(), requires_grad=False))
        methods["process_weights_after_loading"](self, layer)
        assert layer.weight.shape == (k // 2, n)
        assert layer.weight_scale.shape == (k // 64, n, 2)
    assert casts == ([NZ] * 3 if scheme == "W4A8_MXFP" else [])
