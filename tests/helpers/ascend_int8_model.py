"""A model of vLLM on a CPU whose linear layers are those of vllm-ascend's scheme W8A16, run from its wheel's source.

`python -m tests.helpers.ascend_int8_model FOLDER PACKED` loads int8 folder FOLDER, which was made of PACKED, and prints
one JSON line: the reply of a rollout rank, how the layers' products compare with the values, and the replies after one
change at a time. Only torch_npu's operator and vllm-ascend's settings are stand-ins. None of it was run on an NPU.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.helpers.ascend_packages import FOLDER, definitions
from tests.helpers.vllm_models import answer, config_of, load, start
from verl_aqn.checkpoints.disk_base import DiskBase
from verl_aqn.checkpoints.loading import DenseView
from verl_aqn.checkpoints.modelslim import DESCRIPTION
from verl_aqn.integrations.vllm import readback

OPERATOR = "npu_weight_quant_batchmatmul"


def batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Stand in for torch_npu's operator: refuse what its page does not allow on A2 and A3, and compute the product."""
    k, n = weight.shape
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert weight.dtype == torch.int8
    assert antiquant_scale.dtype == antiquant_offset.dtype == x.dtype
    assert tuple(antiquant_scale.shape) == tuple(antiquant_offset.shape) == (n,)
    assert max(k, n) <= 65535
    assert bias is None or (bias.dtype == torch.float32) == (x.dtype == torch.bfloat16)
    values = (weight.to(x.dtype) + antiquant_offset) * antiquant_scale
    out = x.float() @ values.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def stub(name: str, path: str = "", **attributes: Any) -> None:
    """Put a module into `sys.modules`; with `path` it is a package whose files are those of the wheel."""
    module = ModuleType(name)
    if path:
        module.__path__ = [str(FOLDER / path)]
    vars(module).update(attributes)
    sys.modules[name] = module


def linear_method() -> tuple[type, type]:
    """Return vllm-ascend's `AscendLinearMethod` and its scheme W8A16, imported from the wheel's files."""

    def off() -> bool:
        return False

    quantization = "vllm_ascend/quantization"
    stub("torch_npu", **{OPERATOR: batchmatmul})
    stub("vllm_ascend", "vllm_ascend")
    switches = ("enable_dsa_cp_with_layer_shard", "flashcomm2_enable", "mlp_tp_enable", "oproj_tp_enable")
    # VLLM_ASCEND_ENABLE_NZ=0, as in the profile
    stub("vllm_ascend.utils", maybe_trans_nz=lambda weight: weight, **dict.fromkeys(switches, off))
    stub("vllm_ascend.ascend_config", get_ascend_config=off)
    groups = ("get_flashcomm2_otp_group", "get_mlp_tp_group", "get_otp_group")
    stub("vllm_ascend.distributed.parallel_state", **dict.fromkeys(groups, off))
    stub("vllm_ascend.quantization", quantization)
    stub("vllm_ascend.quantization.methods", f"{quantization}/methods", is_mx_quant_type=lambda scheme: False)
    base = importlib.import_module("vllm_ascend.quantization.methods.base")
    for scheme in ("AscendAttentionScheme", "AscendLinearScheme", "AscendMoEScheme"):
        setattr(sys.modules["vllm_ascend.quantization.methods"], scheme, getattr(base, scheme))
    int8 = importlib.import_module("vllm_ascend.quantization.methods.w8a16")
    registry = importlib.import_module("vllm_ascend.quantization.methods.registry")
    assert registry.get_scheme_class("W8A16", "linear") is int8.AscendW8A16LinearMethod
    adapters = importlib.import_module("vllm_ascend.quantization.method_adapters")
    return adapters.AscendLinearMethod, int8.AscendW8A16LinearMethod


def quantization(folder: Path) -> Any:
    """Return vLLM's quantisation config that gives each layer what vllm-ascend's lookup in the description says."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    method, scheme = linear_method()
    description = json.loads((folder / DESCRIPTION).read_text())
    lookup = definitions("quantization/modelslim_config.py", "get_linear_quant_type")["get_linear_quant_type"]
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    class Ascend(QuantizationConfig):
        def get_name(self) -> str:
            return "ascend"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Ascend":
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            kind = lookup(description, prefix, fused)
            assert kind in ("W8A16", "FLOAT"), (prefix, kind)
            return method(scheme()) if kind == "W8A16" else UnquantizedLinearMethod()

    return Ascend()


def products(model: torch.nn.Module, modules: list[str], packed: Path) -> float:
    """Return the largest relative difference of a layer's product from that with the packed base's values."""
    loaded, view = readback.loaded_of(model), DenseView(packed)
    sources: dict[str, list[str]] = {}
    # q, k and v in the order of their rows in the fused layer
    for module in sorted(modules, key=lambda name: loaded.pieces[f"{name}.weight"][0].here):
        sources.setdefault(loaded.pieces[f"{module}.weight"][0].place.rpartition(".")[0], []).append(module)
    most = 0.0
    for place, parts in sources.items():
        layer = model.get_submodule(place)
        weight = torch.cat([view.read(f"{module}.weight") for module in parts]).float()
        x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        expected = x.float() @ weight.T
        out = layer.quant_method.apply(layer, x).float()
        most = max(most, ((out - expected).norm() / expected.norm()).item())
    return most


CHANGES = {"weight": 1, "weight_scale": 1.0, "weight_offset": 2.0**-20}


def main(folder: Path, packed: Path) -> None:
    from vllm.config import set_current_vllm_config

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    modules = [n for n, group in DiskBase(packed).groups.items() if group == "packed"]
    config = config_of(folder)
    config.quant_config = quantization(folder)
    with TemporaryDirectory() as meeting, set_current_vllm_config(config):
        start(Path(meeting))
        model = load(folder, config)
    said: dict[str, Any] = {"clean": answer(model, modules), "products": products(model, modules, packed), "now": {}}
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    for name, step in CHANGES.items():
        tensor = getattr(layer, name).data
        before = tensor.clone()
        tensor.view(-1)[5] += step
        said["now"][name] = answer(model, modules)["weights_equal_base"]
        tensor.copy_(before)
    transposed = layer.weight.data
    layer.weight.data = transposed.t().contiguous()
    said["now"]["layout"] = answer(model, modules)["weights_equal_base"]
    layer.weight.data = transposed
    said["now"]["again"] = answer(model, modules)["weights_equal_base"]
    print("RESULT " + json.dumps(said), flush=True)
    os._exit(0)  # otherwise vLLM's groups warn when the interpreter exits


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
