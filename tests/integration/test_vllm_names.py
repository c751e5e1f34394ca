"""A family whose modules vLLM renames and fuses differently: base, adapter and responses equal the trainer's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config

from tests.helpers.base_answers import actor_of, loaded
from tests.integration.conftest import ask_vllm
from verl_aqn.checkpoints.adapter import digest_name, served_adapter
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.digest import tensor_digest
from verl_aqn.integrations.verl.base_evidence import BaseRecords
from verl_aqn.runs.judge.base_record import check_base

# Attention and Mamba side by side: `mamba.in_proj` is one tensor over five widths, vLLM calls `mamba` `mamba.mamba`.
CONFIG = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_d_state": 32, "mamba_n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"]


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A packed checkpoint and a PEFT adapter that is not zero."""
    import shutil

    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FalconH1Config(**CONFIG), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(root / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    model = get_peft_model(load_model(root / "packed"), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(root / "adapter")
    return root


def test_renamed_and_fused_modules_are_told_under_the_trainer_s_names(folders):
    from peft import PeftModel
    from safetensors.torch import load_file

    said = ask_vllm("read_back", folders / "packed", folders / "adapter")
    assert said["base"]["base_digest"] == checkpoint_digest(folders / "packed")
    assert (said["base"]["slices"], said["base"]["weights_equal_base"]) == ({}, True)
    packed = folders / "packed"
    record = BaseRecords(packed, "packed", "none", print).record(
        "start", [actor_of(loaded(packed), packed)], [said["base"]], {"actor": 1, "rollout": 1}
    )
    check_base(record, None)  # inside LoRA's wrappers, in an engine that has already responded
    norms = record["holders"]["rollout 0"]["norms"]
    assert norms["live"] == norms["tensors"] == 5
    assert [(one["code"], one["tensors"]) for one in record["not_compared"]] == [("computed", 2)]
    sent = load_file(folders / "adapter" / "adapter_model.safetensors")
    served = served_adapter(((name, tensor.bfloat16()) for name, tensor in sent.items()), lambda name: 16 / 8, 8)
    digest = tensor_digest((digest_name(name), tensor) for name, tensor in served)
    assert said["adapter"]["adapter_digest"] == digest
    assert (said["adapter"]["modules"], said["adapter"]["slices"]) == (2 * len(TARGETS), {})
    model = PeftModel.from_pretrained(load_model(folders / "packed"), folders / "adapter").eval()
    with torch.no_grad():
        logp = model(torch.tensor([said["prompt"]]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    wanted = logp.gather(1, torch.tensor(said["prompt"][1:]).unsqueeze(1)).squeeze(1)
    assert (wanted - torch.tensor(said["logprobs"])).abs().mean() < 0.1
