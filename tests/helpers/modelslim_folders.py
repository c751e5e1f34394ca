"""Two tiny models, dense and MoE, each written for Ascend and for vLLM."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints.packing import quantize_checkpoint

CONFIGS = {
    "llama": LlamaConfig(**SMALL_ASCEND, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SMALL_ASCEND, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1),
}
LAYER = "model.layers.0."


@pytest.fixture(scope="module", params=CONFIGS, name="folders")
def modelslim_folders(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Return (model type, ModelSlim folder, compressed-tensors folder of the same model)."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.bfloat16)
    model.save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "modelslim", format="modelslim")
    quantize_checkpoint(root / "source", root / "packed")
    return request.param, root / "modelslim", root / "packed"
