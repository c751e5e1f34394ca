"""This project's statements about torch_npu and vllm-ascend, checked against their pinned wheels as text."""

import ast
import inspect
import json
import re

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers.ascend_packages import calls, node, pins, read
from tests.helpers.npu_operators import ANTI, DYNAMIC
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.integrations.vllm.readback import METHOD_ACTIVATIONS
from verl_aqn.preflight.engine_settings import ASCEND_PASSES

SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
MXFP4 = "vllm_ascend/quantization/methods/w4a4_mxfp4.py"
MXFP8 = "vllm_ascend/quantization/methods/w4a8_mxfp4.py"
NORMS = "vllm_ascend/ops/layernorm.py"


def schema(name: str) -> torch.FunctionSchema:
    (line,) = re.findall(rf"func: ({name}\(.*)", read(SCHEMAS))
    return torch._C.parse_schema(f"npu::{line}")


def keywords(call: ast.Call) -> dict[str, str]:
    return {str(keyword.arg): ast.unparse(keyword.value) for keyword in call.keywords}


# ---- versions ----


def test_the_pinned_versions_are_those_that_vllm_ascend_asks_for():
    wanted = pins("requirements-npu.lock")
    assert pins("requirements-contracts.lock").items() <= wanted.items()
    needs = dict(re.findall(r"Requires-Dist: ([\w-]+)==(\S+)", read("vllm_ascend-0.23.0.dist-info/METADATA")))
    assert (needs["torch"], needs["torch-npu"]) == (wanted["torch"], wanted["torch_npu"])
    assert wanted["vllm"] == wanted["vllm-ascend"]


def test_the_wheel_on_pypi_is_built_for_the_a2_alone():
    """On other chips its worker does not start, which `doctor` reports."""
    assert "__device_type__ = 'A2'" in read("vllm_ascend/_build_info.py")
    check = ast.unparse(node("vllm_ascend/utils.py", "check_ascend_device_type"))
    assert "assert _ascend_device_type == cur_device_type" in check
    assert next(calls(node("vllm_ascend/worker/worker.py", "NPUWorker", "__init__"), "check_ascend_device_type"))
    kinds = {child.targets[0].id for child in node("vllm_ascend/utils.py", "AscendDeviceType").body}
    assert kinds == {"A2", "A3", "_310P", "A5"}


# ---- operators ----


@pytest.mark.parametrize("published", [DYNAMIC, ANTI])
def test_our_stand_ins_have_the_operators_schemas(published):
    assert str(schema(published.split("(")[0])) == str(torch._C.parse_schema(f"npu::{published}"))


def test_numbers_of_dtypes():
    source = read("torch_npu/op_plugin/meta/_meta_registrations.py")
    for number, name in {296: "torch_npu.float4_e2m1fn_x2", 293: "torch_npu.float8_e8m0fnu"}.items():
        assert f'{number}: "{name}"' in source
    for number, name in {6: "torch.float32", 15: "torch.bfloat16", 296: "torch.uint8"}.items():
        assert f"    {number}: {name}," in source


def test_the_scheme_for_mxfp4_rounds_activations_as_the_profile_says():
    (quantise,) = calls(node(MXFP4, "AscendW4A4MXFP4DynamicLinearMethod", "apply"), "npu_dynamic_mx_quant")
    given = keywords(quantise)
    assert given == {"dst_type": "torch_npu.float4_e2m1fn_x2", "round_mode": "'round'"}  # half away from zero
    defaults = {argument.name: argument.default_value for argument in schema("npu_dynamic_mx_quant").arguments}
    assert (defaults["scale_alg"], defaults["block_size"], defaults["axis"]) == (0, 32, -1)  # 0: floor, as in `npu`
    aqn = parse_aqn(load_recipe("e12", ["profile=npu", "aqn.mxfp4.activation=mxfp4"]))
    assert METHOD_ACTIVATIONS["AscendW4A4MXFP4DynamicLinearMethod"] == aqn.mxfp4.activation_arithmetic
    (multiply,) = calls(node(MXFP4, "AscendW4A4MXFP4DynamicLinearMethod", "apply"), "npu_quant_matmul")
    known = {argument.name for argument in schema("npu_quant_matmul").arguments}
    assert keywords(multiply).keys() <= known
    assert keywords(multiply)["group_sizes"] == "[1, 1, self.group_size]"


def test_the_scheme_for_w4a8_rounds_activations_to_mxfp8():
    """The published page of the operator defines scale_alg=0 as the floor of log2 of amax minus 8, of E4M3."""
    from verl_aqn.mxfp4.mxfp8 import ARITHMETIC

    apply = node(MXFP8, "AscendW4A8MXFPDynamicLinearMethod", "apply")
    (quantise,) = calls(apply, "npu_dynamic_mx_quant")
    assert keywords(quantise) == {"dst_type": "torch.float8_e4m3fn"}
    defaults = {argument.name: argument.default_value for argument in schema("npu_dynamic_mx_quant").arguments}
    assert {name: defaults[name] for name in ("scale_alg", "block_size", "axis", "round_mode")} == {
        "scale_alg": 0, "block_size": 32, "axis": -1, "round_mode": "rint"  # floor; to nearest, ties to even
    }  # fmt: skip
    aqn = parse_aqn(load_recipe("e12", ["profile=npu", "aqn.mxfp4.activation=mxfp8"]))
    assert METHOD_ACTIVATIONS["AscendW4A8MXFPDynamicLinearMethod"] == aqn.mxfp4.activation_arithmetic == ARITHMETIC
    (multiply,) = calls(apply, "npu_quant_matmul")
    known = {argument.name for argument in schema("npu_quant_matmul").arguments}
    assert keywords(multiply).keys() <= known
    assert keywords(multiply)["group_sizes"] == "[0, 0, self.group_size]"
    assert keywords(multiply)["pertoken_scale_dtype"] == "torch_npu.float8_e8m0fnu"
    assert "get('group_size', 32)" in ast.unparse(node(MXFP8, "AscendW4A8MXFPDynamicLinearMethod", "__init__"))


def test_verl_takes_a_w4a8_base_for_one_that_it_loads_anew_but_never_with_an_adapter():
    """verl rounds bf16 weights again for such a base. An adapter that is sent to a loaded base takes another way."""
    from verl.utils.vllm import vllm_quant_utils
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    assert '("W8A8_MXFP8", "W4A8_MXFP")' in inspect.getsource(vllm_quant_utils.is_vllm_ascend_mx_quant)
    update = inspect.getsource(vLLMColocateWorkerExtension.update_weights_from_ipc)
    adapter = update.index("elif peft_config and base_sync_done:")
    assert adapter < update.index("elif is_quantized_model(")


def test_no_dense_scheme_of_vllm_ascend_leaves_activations_alone():
    """An Ascend 950 therefore means W4A4 or W4A8.

    This is also why the compressed-tensors folder is not served there unchanged.
    """
    found = set()
    for file in ("w4a16_mxfp4", "w4a4_mxfp4", "w4a4_mxfp4_flatquant", "w4a8_mxfp4"):
        for call in calls(ast.parse(read(f"vllm_ascend/quantization/methods/{file}.py")), "register_scheme"):
            scheme, kind = (ast.literal_eval(argument) for argument in call.args)
            found |= {scheme} if kind == "linear" else set()
    assert found == {"W4A4_MXFP4", "W4A4_MXFP4_FLATQUANT", "W4A8_MXFP"}
    assert "mxfp4" not in read("vllm_ascend/quantization/compressed_tensors_config.py").lower()


# ---- norms ----


def test_norms_keep_their_weight_and_hand_it_to_operators_as_it_is():
    norm = node(NORMS, "AscendRMSNorm")
    assert [ast.unparse(base) for base in norm.bases] == ["RMSNorm"]
    assert "self.weight =" not in ast.unparse(norm)
    forward = node(NORMS, "AscendRMSNorm", "forward_oot")
    for operator in ("npu_rms_norm", "npu_add_rms_norm", "npu_add_rms_norm_bias"):
        assert all("self.weight" in [ast.unparse(a) for a in call.args] for call in calls(forward, operator))
        assert next(calls(forward, operator))


def test_those_operators_want_weights_in_the_activations_dtype():
    """Float32 norms need our own forward (verl_aqn/integrations/vllm/ascend_norm.py)."""
    folder = "vllm_ascend/_cann_ops_custom/vendors/custom_transformer/op_impl/ai_core/tbe/config/ascend910b"
    table = json.loads(read(f"{folder}/aic-ascend910b-ops-info.json"))["AddRmsNormBias"]
    x, residual, gamma = (table[f"input{number}"]["dtype"].split(",") for number in range(3))
    assert x == residual == gamma == ["float16", "float32", "bfloat16"]  # columns belong together
    documentation = read("torch_npu/_op_plugin_docs.py")
    (arguments,) = re.findall(r'"npu_rms_norm",(.*?)"""\n\)', documentation, re.DOTALL)
    assert "gamma：Tensor类型，数据类型需要和self保持一致" in arguments  # "the same dtype as self"
    assert "self：Tensor类型，支持float16、bfloat16、float32" in arguments
    assert [argument.name for argument in schema("npu_rms_norm").arguments] == ["self", "gamma", "epsilon"]


def test_eager_mode_fuses_no_norm_with_what_follows_it():
    platform = read("vllm_ascend/platform.py")
    assert re.search(r"if enforce_eager:\n.*\n\s+compilation_config\.mode = CompilationMode\.NONE", platform)
    assert load_recipe("e12", ["profile=npu"]).actor_rollout_ref.rollout.enforce_eager is True


# ---- worker, layers, LoRA ----


def test_the_worker_loads_through_vllm_s_loader_into_memory_that_sleep_keeps():
    runner = node("vllm_ascend/worker/model_runner_v1.py", "NPUModelRunner", "load_model")
    assert next(calls(runner, "get_model"))
    worker = ast.unparse(node("vllm_ascend/worker/worker.py", "NPUWorker"))
    assert "use_memory_pool(tag='weights')" in worker
    assert "allocator.sleep(offload_tags=('weights',) if level == 1 else tuple())" in worker


def test_linear_layers_are_vllm_s_with_the_attributes_that_are_read_back():
    source = read("vllm_ascend/ops/linear.py")
    for ours, theirs in (
        ("AscendQKVParallelLinear", "QKVParallelLinear"),
        ("AscendRowParallelLinear", "RowParallelLinear"),
    ):
        assert f"class {ours}({theirs}):" in source
    for attribute in ("input_size", "output_size", "num_kv_head_replicas", "output_partition_sizes", "tp_rank"):
        assert f"self.{attribute}" in source
    plain = ast.unparse(node("vllm_ascend/ops/linear.py", "AscendUnquantizedLinearMethod"))
    assert "layer.weight.data = maybe_trans_nz(layer.weight.data)" in plain
    nz = ast.unparse(node("vllm_ascend/utils.py", "_should_trans_nz"))
    assert "if not nz_mode:\n        return False" in nz  # so bf16 weights stay as loaded, and can be compared
    wrapper = ast.unparse(node("vllm_ascend/quantization/method_adapters.py", "AscendLinearMethod"))
    assert "self.quant_method = scheme" in wrapper  # `kernel_of`


def test_lora_layers_are_vllm_s():
    source = read("vllm_ascend/lora/utils.py")
    assert "class AscendQKVParallelLinearWithLoRA(QKVParallelLinearWithLoRA):" in source
    assert "class AscendMergedQKVParallelLinearWithLoRA(MergedQKVParallelLinearWithLoRA):" in source
    assert "lora_a_stacked" not in source


# ---- environment ----


def test_what_the_profile_sets_is_read_and_what_it_leaves_is_set_by_verl():
    from verl.plugin.platform.platform_npu import PlatformNPU
    from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV

    config = OmegaConf.to_container(load_recipe("e12", ["profile=npu"]), resolve=True)
    ray_init = config["ray_kwargs"]["ray_init"]
    ours, platform = ray_init["runtime_env"]["env_vars"], PlatformNPU()
    known = {key.value for key in ast.walk(ast.parse(read("vllm_ascend/envs.py"))) if isinstance(key, ast.Constant)}
    assert {name for name in ours if name.startswith("VLLM_ASCEND")} <= known
    assert ours == {"VLLM_ASCEND_ENABLE_NZ": "0", "HCCL_CONNECT_TIMEOUT": "1800"}
    wake_up = ast.unparse(node("vllm_ascend/worker/worker.py", "NPUWorker", "wake_up"))
    assert "weight_nz_mode" in wake_up
    assert "FRACTAL_NZ mode is enabled" in wake_up
    assert re.search(r'"weight_nz_mode",\s+"VLLM_ASCEND_ENABLE_NZ"', read("vllm_ascend/ascend_config.py"))
    theirs = {**PPO_RAY_RUNTIME_ENV["env_vars"], **platform.rollout_env_vars()}
    assert theirs["HCCL_HOST_SOCKET_PORT_RANGE"] == theirs["HCCL_NPU_SOCKET_PORT_RANGE"] == "auto"
    assert theirs["VLLM_ASCEND_AUTO_DETECT_QUANTIZATION"] == "0"  # this is why engine_kwargs.vllm.quantization is set
    assert platform.ray_noset_envvars() == ["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"]


def test_devices_are_asked_for_as_npu_and_blocks_are_of_128():
    from verl.plugin.platform.platform_npu import PlatformNPU
    from verl.single_controller.ray import base

    config = load_recipe("e12", ["profile=npu", "trainer.n_gpus_per_node=16"])
    platform = PlatformNPU()
    assert (platform.ray_resource_name(), platform.ray_resource_options(1)) == ("NPU", {"resources": {"NPU": 1}})
    assert 'node_info.get("NPU", 0)' in inspect.getsource(base)
    assert platform.communication_backend_name() == "hccl"
    assert "num_gpus" not in config.ray_kwargs.ray_init  # with `--num-gpus`, requests for NPUs stayed pending forever
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.block_size == 128
    assert "cache_config.block_size = 128" in ast.unparse(node("vllm_ascend/utils.py", "refresh_block_size"))


# ---- graphs ----


def test_every_pass_that_fuses_a_norm_is_off_in_the_profile():
    """`fuse_muls_add` matches no norm. With enforce_eager=false a graph then calls our forward of the norms."""
    initial = node("vllm_ascend/ascend_config.py", "AscendCompilationConfig", "__init__")
    of_norms = {argument.arg for argument in initial.args.args if re.search("norm|rms", argument.arg)}
    assert of_norms == set(ASCEND_PASSES)
    engine = load_recipe("e12", ["profile=npu"]).actor_rollout_ref.rollout.engine_kwargs.vllm
    assert engine.additional_config == {"ascend_compilation_config": dict.fromkeys(ASCEND_PASSES, False)}
    assert 'additional_config.get("ascend_compilation_config"' in read("vllm_ascend/ascend_config.py")
