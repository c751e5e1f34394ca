"""Stock vLLM on a packed checkpoint: responses as from its dequantised equivalent, and noise that can be removed."""

from pathlib import Path

import pytest
import torch

from tests.integration.conftest import ask_vllm, start_engine
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.digest import tensor_digest
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.mxfp4.mxfp8 import ARITHMETIC
from verl_aqn.noise import NoiseSpec, check_evidence


def engine(model: Path, *arguments) -> dict:
    """Responses of the engine with a model, and the folders `adapter` and `shards`."""
    root = model.parent
    return ask_vllm("generate", model, root / "adapter", root / "shards", *arguments)


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Packed checkpoint, its exact bf16 equivalent, and a PEFT adapter that is not zero."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("vllm")
    (root / "shards").mkdir()
    quantize_checkpoint(tiny_model, root / "packed")
    dequantize_checkpoint(root / "packed", root / "dense")
    torch.manual_seed(3)
    model = get_peft_model(load_model(root / "packed"), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(root / "adapter")
    return root


@pytest.fixture(scope="module")
def packed(folders):
    return engine(folders / "packed")


@pytest.fixture(scope="module")
def dense(folders):
    return engine(folders / "dense")


@pytest.fixture(scope="module")
def four_bit_activations(folders):
    return engine(folders / "packed", "even/nearest")


def actor_logprobs(folders, answers: dict, activation: str, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """Return the trainer model's log-probs of the engine's responses, with the given rounding of activations."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(folders / "packed", dtype), folders / "adapter").eval()
    for layer in packed_layers(model):
        layer.activation = Activation.parse(activation)
    sums = []
    for prompt, tokens in zip(answers["prompts"], answers["tokens"], strict=True):
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logp = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        sums.append(logp.gather(1, torch.tensor(tokens).unsqueeze(1)).sum().item())
    return sums


def apart(folders, said: dict, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Return the largest difference of trainer and engine in a response, by the rounding in the trainer."""
    rollout = torch.tensor(said["loaded"]["logprobs"])
    return {
        rounding: (torch.tensor(actor_logprobs(folders, said["loaded"], rounding, dtype)) - rollout).abs().max().item()
        for rounding in ("none", "even/nearest", ARITHMETIC)
    }


def test_w4a4_is_the_same_arithmetic_in_trainer_and_rollout(packed, four_bit_activations, folders):
    assert packed["base"]["activations"] == ["none"]
    assert four_bit_activations["base"]["activations"] == ["even/nearest"]
    assert four_bit_activations["base"]["base_digest"] == packed["base"]["base_digest"]
    for said, same, other in ((packed, "none", "even/nearest"), (four_bit_activations, "even/nearest", "none")):
        found = apart(folders, said)
        # No tighter bound: a difference in the last bit of bf16 may round to a different 4-bit value.
        assert found[same] < 0.5 * found[other]


def test_w4a8_is_the_same_arithmetic_in_trainer_and_rollout(packed, four_bit_activations, folders):
    exact = engine(folders / "packed", ARITHMETIC, "float32")
    assert exact["base"]["activations"] == [ARITHMETIC]
    assert exact["base"]["base_digest"] == packed["base"]["base_digest"]
    found = apart(folders, exact, torch.float32)  # measured: 4e-6, 1.3 and 20 nats a response
    assert found[ARITHMETIC] < 1e-3 * min(found["none"], found["even/nearest"])
    # In bf16 a difference in the last bit may round to a different 8-bit value, which changes less than a 4-bit value
    # does (measured: 0.95 and 4.6 nats a response; without rounding 0.3).
    usual = engine(folders / "packed", ARITHMETIC)
    assert usual["base"]["activations"] == [ARITHMETIC]
    assert apart(folders, usual)[ARITHMETIC] < apart(folders, four_bit_activations)["even/nearest"]


@pytest.mark.parametrize("which", ["loaded", "without"])
def test_packed_answers_equal_those_of_the_dequantised_checkpoint(packed, dense, which):
    assert packed[which]["tokens"] == dense[which]["tokens"]
    # Sums of 12 tokens. The kernels add in different orders, and round at different places.
    assert packed[which]["logprobs"] == pytest.approx(dense[which]["logprobs"], abs=0.1)


def test_adapter_matters(packed):
    assert packed["loaded"]["tokens"] != packed["without"]["tokens"]


def test_engine_holds_the_packed_base_bit_for_bit(packed, folders):
    assert packed["base"]["base_digest"] == checkpoint_digest(folders / "packed")
    assert packed["base"]["weights_equal_base"]
    assert packed["base"]["kernel"] == "CpuMxfp4LinearKernel"
    assert packed["base"]["form"] == "packed"


def test_engine_holds_the_values_of_the_packed_base_in_bf16(packed, dense, folders):
    """Devices without MX units serve this: the same number of layers, identified by the digest of dequantised bytes."""
    assert dense["base"]["form"] == "bf16"
    assert dense["base"]["layers"] == packed["base"]["layers"]
    assert dense["base"]["base_digest"] == checkpoint_digest(folders / "packed", form="bf16")
    assert (dense["base"]["kernel"], dense["base"]["activations"]) == ("UnquantizedLinearMethod", ["none"])


def test_engine_holds_the_adapter_under_the_trainer_s_names(packed, folders):
    from safetensors.torch import load_file

    served = []
    for name, tensor in load_file(folders / "adapter" / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensor = tensor.bfloat16()
        served.append((f"{module}.{kind}", tensor * (16 / 8) if kind == "B" else tensor))
    assert packed["adapter"]["modules"] == 14
    assert packed["adapter"]["adapter_digest"] == tensor_digest(served)


def test_noise_changes_the_answers_and_restoring_gives_the_old_ones(packed):
    order = NoiseSpec(step=4, seed=0, sigma=0.3, unit="rms")
    clean = packed["prepared"]["clean_digest"]
    check_evidence(packed["noise"], order, clean)
    check_evidence(packed["restored"], None, clean)
    assert packed["noise"]["modules"] == 5
    assert packed["noisy"]["tokens"] != packed["clean"]["tokens"]
    assert packed["after"] == packed["clean"]


def test_noise_on_linear_weights_changes_the_answers_and_is_taken_away_bit_for_bit(packed):
    order = NoiseSpec(step=4, seed=0, sigma=0.3, unit="rms", targets=("linear",))
    clean = packed["prepared"]["clean_digest"]
    check_evidence(packed["linear"], order, clean)
    check_evidence(packed["linear_restored"], None, clean)
    assert packed["linear"]["modules"] == 14  # under the trainer's names: q, k, v, o, gate, up, down in two layers
    assert "model.layers.1.self_attn.k_proj" in packed["linear"]["groups"][0]["modules"]
    assert packed["linear_noisy"]["tokens"] != packed["clean"]["tokens"]
    assert packed["linear_after"] == packed["clean"]
    assert not packed["linear_base"]["weights_equal_base"]
    assert packed["base_after"] == packed["base"]


def whole(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every weight that can carry noise, assembled from the files of the ranks: {name: {"clean", "noisy"}}."""
    shards = [torch.load(path) for path in sorted(folder.iterdir())]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in shards[0]:
        spans = [span for rank in shards for span in rank[name]["spans"]]
        found[name] = {}
        for when in ("clean", "noisy"):
            found[name][when] = torch.full((max(offset + numel for offset, numel in spans),), torch.nan)
            parts = torch.cat([rank[name][when] for rank in shards]).float().split([numel for _, numel in spans])
            for (offset, numel), part in zip(spans, parts, strict=True):
                found[name][when][offset : offset + numel] = part
    return found


def test_two_tensor_parallel_ranks_hold_the_base_and_the_noise_of_one(packed, folders, tmp_path):
    two_cores = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = start_engine("shards", folders / "packed", tmp_path, **two_cores)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = whole(folders / "shards"), whole(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(one) == 5 + 14  # norms and linear layers
    assert one.keys() == two.keys()
    for name, weights in one.items():
        assert not torch.equal(weights["clean"], weights["noisy"])
        assert all(torch.equal(weights[when], two[name][when]) for when in ("clean", "noisy")), name


def test_an_order_of_sigma_0_changes_no_token_and_no_probability(packed):
    check_evidence(
        packed["silence"], NoiseSpec(step=4, seed=0, sigma=0.0, unit="rms"), packed["prepared"]["clean_digest"]
    )
    assert packed["silent"] == packed["clean"] == packed["loaded"]
    assert packed["silent sampled"] == packed["clean sampled"] != packed["clean"]["tokens"]


def test_layers_left_in_16_bits_are_served(tiny_model, folders):
    """Layers that vLLM merges are left in 16 bits together; the rest stays packed."""
    exclude = ("lm_head", "model.layers.0.self_attn.[qkv]_proj", "model.layers.1.mlp.down_proj")
    quantize_checkpoint(tiny_model, folders / "kept", exclude=exclude)
    served = engine(folders / "kept")["base"]
    assert served["base_digest"] == checkpoint_digest(folders / "kept")
    assert served["weights_equal_base"]
